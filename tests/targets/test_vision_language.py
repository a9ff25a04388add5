"""The language model of a vision-language model: a graph of embeddings, in every target."""

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import qwlora
from conftest import byte_tokenizer
from qwlora.errors import CaptureError
from qwlora.simulation.adapter_simulations import AdapterSimulations
from qwlora.targets.npu.qnn import QnnModel
from qwlora.targets.proof.readme import usage
from qwlora.targets.registry import TARGETS
from simulation.tiny_architectures import VISION_LANGUAGE, image_and_text, with_large_weights
from targets.proofs import sqnr

IDS = torch.randint(7, 256, (2, 12), generator=torch.Generator().manual_seed(3))
SCHEMES = qwlora.Schemes(
    quantize_residual_adds=True,
    symmetric_matmul_second_input=True,
    key_value_bitwidth=8,
    adapter_weights=qwlora.Scheme(8),
)
SIZES: Any = {"graphs": [12, 1], "context": [24]}
MODELS = list(VISION_LANGUAGE)


def all_but_one_slow(names: Iterable[str]) -> list[Any]:
    """The first one is in the fast lane."""
    first, *others = names
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


def adapted(name: str, *adapters: str, layers: str = "", blocks: int = 2) -> Any:
    """The model with adapters on its language model, and integers there only."""
    torch.manual_seed(0)
    model = with_large_weights(VISION_LANGUAGE[name]())
    del model.get_decoder().layers[blocks:]
    language = next(n for n, module in model.named_modules() if module is model.get_decoder())
    towers = (
        f"model.{n}*" for n, m in model.model.named_children() if m is not model.get_decoder()
    )
    linear = [path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    rules = [
        qwlora.LayerRule(tower, None)
        for tower in towers
        if any(path.startswith(tower[:-1]) for path in linear)
    ]
    qwlora.quantize_(model, "w8-channel", solver="rtn", rules=rules)
    config = LoraConfig(
        r=4, target_modules=layers or rf"{language}.*_proj", init_lora_weights=False
    )
    torch.manual_seed(1)
    wrapped = get_peft_model(model, config, adapters[0])
    for adapter in adapters[1:]:
        wrapped.add_adapter(adapter, config)
    return wrapped.eval()


def simulated(name: str) -> tuple[AdapterSimulations, dict[str, Tensor]]:
    """Simulations of two adapters, and a sequence with an image."""
    model = adapted(name, "first", "second")
    batch = image_and_text(model.get_base_model())
    made = qwlora.simulate_adapters(model, batch, SCHEMES, "none")
    made.calibrate([batch, {"input_ids": IDS}])
    positions = batch.pop("position_ids")
    one = {name: tensor[:1] for name, tensor in batch.items()}
    return made, {**one, "position_ids": positions[..., :1, :]}


@pytest.fixture(scope="module")
def qwen() -> tuple[qwlora.Simulation, dict[str, Tensor]]:
    """One block and one adapter, and a sequence with an image."""
    model = adapted("Qwen2-VL", "default", layers=r".*language.*q_proj", blocks=1)
    batch = image_and_text(model.get_base_model())
    made = qwlora.simulate(model, batch, SCHEMES)
    made.calibrate([batch, {"input_ids": IDS}])
    return made, batch


def test_text_is_looked_up_in_the_models_own_table(qwen: Any) -> None:
    simulation = qwen[0]
    assert simulation.inputs == ("inputs_embeds", "attention_mask", "position_ids")
    assert simulation.encodings["inputs_embeds"].scheme.bitwidth == 16
    assert not any("embed_tokens" in name for name in simulation.encodings)
    table = simulation.origin.model.get_base_model().get_input_embeddings()
    counted = torch.arange(12).expand(3, 2, 12)
    given = {"inputs_embeds": table(IDS), "position_ids": counted}
    assert torch.equal(simulation.logits(IDS), simulation.outputs(given)["logits"])
    assert torch.equal(simulation.bind({"input_ids": IDS})["position_ids"], counted)


def test_an_image_has_positions_of_its_own(qwen: Any) -> None:
    simulation, batch = qwen
    counted = {**batch, "position_ids": torch.arange(12)[None]}
    logits, other = (simulation.outputs(b)["logits"] for b in (batch, counted))
    assert torch.equal(logits[:, :4], other[:, :4])
    assert not torch.equal(logits[:, 4:], other[:, 4:])


def test_an_adapter_on_the_vision_tower_is_refused() -> None:
    model = adapted("Qwen2-VL", "default", layers=r".*(q_proj|blocks.*fc1)", blocks=1)
    with pytest.raises(
        CaptureError, match=r"2 weights .*visual\.blocks\.0\.mlp\.fc1.*target_modules"
    ):
        qwlora.simulate(model, image_and_text(model.get_base_model()), SCHEMES)


TOWERS = {
    "SmolVLM": lambda model: model.model.vision_model,
    "Gemma 3, with images": lambda model: model.model.vision_tower,
    "LLaVA": lambda model: model.model.vision_tower,
}


@pytest.mark.parametrize("name", all_but_one_slow(TOWERS))
def test_towers_of_pixels_are_captured(name: str) -> None:
    torch.manual_seed(0)
    tower = TOWERS[name](with_large_weights(VISION_LANGUAGE[name]()))
    pixels = torch.randn(2, 3, 16, 16)
    qwlora.quantize_(tower, "w8-channel", solver="rtn")
    simulation = qwlora.simulate(tower, {"pixel_values": pixels})
    simulation.calibrate([{"pixel_values": pixels}])
    with torch.no_grad():
        expected = tower(pixel_values=pixels).last_hidden_state
    assert sqnr(simulation.outputs({"pixel_values": pixels})["last_hidden_state"], expected) > 30


def test_a_tower_that_counts_patches_is_refused() -> None:
    tower = VISION_LANGUAGE["Qwen2-VL"]().eval().model.visual
    qwlora.quantize_(tower, "w8-channel", solver="rtn")
    patches = {"hidden_states": torch.randn(16, 96), "grid_thw": torch.tensor([[1, 4, 4]])}
    with pytest.raises(CaptureError, match=r"Qwen2VisionTransformer.*data-dependent.*PyTorch"):
        qwlora.simulate(tower, patches)


def test_a_cache_that_another_model_makes_is_left_out() -> None:
    model = adapted("LLaVA", "default", blocks=1)
    assert "use_cache" not in inspect.signature(type(model.get_base_model()).forward).parameters
    batch = image_and_text(model.get_base_model())
    assert qwlora.simulate(model, batch, SCHEMES).captured.interface.outputs == ("logits",)


@pytest.mark.parametrize("name", all_but_one_slow(MODELS))
def test_transformers_and_peft_load_base_and_adapters(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = adapted(name, "first", "second", blocks=1), dict[str, Tensor]()
    base, folders = model.get_base_model(), {n: tmp_path / n for n in ("first", "second")}
    text, batch = base.config.get_text_config(), image_and_text(base)
    text.num_hidden_layers = 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    for adapter, folder in folders.items():
        qwlora.save_adapter(model, folder, qwlora.fingerprint(model), adapter)
        model.set_adapter(adapter)
        with torch.no_grad():
            expected[adapter] = model(**batch).logits
    base = model.unload()
    qwlora.export(base, "hf", tmp_path / "hf", folders, byte_tokenizer())
    for adapter, folder in folders.items():
        model = qwlora.load_adapter(base, folder, adapter_name=adapter)
        base = model
    rows = qwlora.verify(tmp_path / "hf", model, IDS)
    assert {row.what.partition(":")[0] for row in rows if row.passed} == {"first", "second"}
    assert all(row.passed for row in rows)
    monkeypatch.chdir(tmp_path / "hf")
    kind, made = type(model.get_base_model()).__name__, dict[str, Any]()
    code = usage("hf", "base", "second", kind=kind)
    exec(code.partition("```python\n")[2].partition("```")[0], made)
    with torch.no_grad():
        found = made["model"](**batch).logits
    assert sqnr(found, expected["second"]) > 80 > sqnr(found, expected["first"])


def logits_of(target: str, folder: Path, adapter: str, batch: dict[str, Tensor]) -> Tensor:
    """Logits of a sequence with an image, by the files."""
    backend = TARGETS[target]
    runtime: Any = (
        backend.open(folder, adapter) if target != "aimet" else backend.backend.open(folder, "")
    )
    if target == "onnx":
        return runtime.run(batch)["logits"]
    positions = batch["position_ids"]
    return call(runtime, batch["inputs_embeds"], positions)


def call(runtime: Any, embeddings: Tensor, positions: Tensor) -> Tensor:
    cache = runtime.empty_cache()
    return runtime.call("prompt_ar12_cl24", embeddings, 0, cache, positions=positions)[1]["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_target_computes_text_and_image(name: str, tmp_path: Path) -> None:
    simulations, batch = simulated(name)
    for target in ("onnx", "aimet", "qairt"):
        made: Any = simulations["first"] if target == "aimet" else simulations
        sizes = {**SIZES, "graphs": [12]} if target == "aimet" else SIZES
        qwlora.export(made, target, tmp_path / target, sample={"input_ids": IDS[:1]}, **sizes)
        assert all(row.passed for row in qwlora.verify(tmp_path / target, made, IDS))
        expected = simulations["first"].outputs(batch)["logits"]
        assert sqnr(logits_of(target, tmp_path / target, "first", batch), expected) > 50


@pytest.mark.client
@pytest.mark.parametrize("name", MODELS)
def test_the_htp_takes_it_whole(name: str, tmp_path: Path) -> None:
    simulations, batch = simulated(name)
    qwlora.export(simulations, "qnn", tmp_path / "qnn", **SIZES)
    folders = tmp_path / "qnn/base", tmp_path / "qnn/first"
    first = QnnModel(*folders, htp=True)
    before = call(first, batch["inputs_embeds"], batch["position_ids"])
    for adapter in ("first", "second"):
        expected = simulations[adapter].outputs(batch)["logits"]
        first.use(tmp_path / "qnn" / adapter)
        assert sqnr(call(first, batch["inputs_embeds"], batch["position_ids"]), expected) > 25
    first.use(tmp_path / "qnn/first")
    assert torch.equal(call(first, batch["inputs_embeds"], batch["position_ids"]), before)
    rows = qwlora.verify(tmp_path / "qnn", simulations, IDS)
    assert [row.sentence for row in rows if not row.passed] == []
    for what in ("on the CPU (root", "on the HTP (root", "partitions of graph prompt_ar12_cl24"):
        assert sum(what in row.what for row in rows) == 2, what
