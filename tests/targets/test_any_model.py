"""Models that are no causal language models, and the language model of a vision-language model (a
graph of embeddings), with adapters, to the targets of simulations."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import qwlora
from conftest import byte_tokenizer
from qwlora.errors import CaptureError, ExportError
from qwlora.simulation.adapter_simulations import AdapterSimulations
from qwlora.targets.npu.qnn import QnnModel
from qwlora.targets.onnx.onnx_runtime import OnnxModel
from qwlora.targets.proof.readme import usage
from qwlora.targets.registry import TARGETS
from simulation.tiny_architectures import VISION_LANGUAGE, image_and_text, with_large_weights
from targets.any_models import batches, simulated
from targets.npu.test_npu_graph import SCHEMES
from targets.proofs import sqnr

SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("bert", "dit", "unet")]


@pytest.mark.parametrize("kind", ["cnn", *SLOW])
def test_adapters_are_switched_in_one_onnx_session(kind: str, tmp_path: Path) -> None:
    made, tensors = simulated(kind), batches(kind)[0]
    qwlora.export(made, "onnx", tmp_path)
    assert {row.passed for row in qwlora.verify(tmp_path, made, batches(kind))} == {True}
    model = OnnxModel(tmp_path / "base", switches=True)
    found = []
    for name in ("first", "second", "first"):
        model.use(tmp_path / name)
        found.append(model.run(made[name].bind(tensors))[made[name].graph().interface.primary])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    operators = onnx.load(tmp_path / "base/model.onnx", load_external_data=False).graph.node
    assert "Expand" not in {n.op_type for n in operators if kind == "cnn"}  # zeros as a bias


@pytest.mark.parametrize("kind", ["cnn", "bert", *SLOW[1:]])
def test_qairt_files_of_one_graph(kind: str, tmp_path: Path) -> None:
    made = simulated(kind, "adapter_only")
    with pytest.raises(ExportError, match=r"not a causal language model.*Give `sample`"):
        qwlora.export(made, "qairt", tmp_path / "none")
    qwlora.export(made, "qairt", tmp_path / "files", sample=batches(kind)[0])
    assert (tmp_path / "files/forward_model.onnx").is_file()
    # a mask, token ids and time steps are the host's; the classifier of images has none
    assert (tmp_path / "files/forward_host.onnx").is_file() == (kind != "cnn")
    assert (tmp_path / "files/golden/first/forward/golden.json").is_file()
    rows = qwlora.verify(tmp_path / "files", made, batches(kind))
    assert {row.what.partition(":")[0] for row in rows} == {"first", "second"}
    assert all(row.passed for row in rows)


@pytest.mark.client
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", "bert", "dit", "unet"])
def test_the_htp_runs_the_whole_graph(kind: str, tmp_path: Path) -> None:
    made = simulated(kind, "none")
    qwlora.export(made, "qnn", tmp_path, sample=batches(kind)[0])
    rows = qwlora.verify(tmp_path, made, batches(kind))
    assert any("on the HTP" in row.what for row in rows)
    assert [row.what for row in rows if not row.passed] == []
    model = QnnModel(tmp_path / "base", tmp_path / "first", htp=True)
    inputs, found = made["first"].bind(batches(kind)[0]), []
    for name in ("first", "second", "first"):
        model.use(tmp_path / name)
        found.append(next(iter(model.run(inputs).values())))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)))


@pytest.mark.parametrize("target", ["onnx", "qairt"])
def test_an_adapter_of_a_layer_that_is_called_twice(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Shared().eval().requires_grad_(False)
    qwlora.quantize_(model, "w8-channel", solver="rtn")
    lora = LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    batch = {"x": torch.randn(2, 4, 16)}
    made = qwlora.simulate_adapters(get_peft_model(model, lora, "first").eval(), batch)
    made.calibrate([batch])
    qwlora.export(made, target, tmp_path, sample=batch)
    assert all(row.passed for row in qwlora.verify(tmp_path, made, [batch]))


class ConstantBias(nn.Module):
    """A convolution whose bias the model computes from the shape of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 8), nn.Conv2d(3, 4, 1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        weight = self.conv.weight
        bias = torch.full((weight.shape[0],), 0.5)
        return nn.functional.conv2d(self.linear(image), weight, bias)


def test_a_computed_bias_is_kept_and_does_not_overflow(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ConstantBias().eval().requires_grad_(False)
    model.conv.weight *= torch.tensor([1, 1, 0.1, 0.01]).view(4, 1, 1, 1)
    # the convolution has 16 bits per channel, so that 0.5 is more than 2^31 steps of the last ones
    qwlora.quantize_(model, "w8-channel", solver="rtn")
    batch = {"image": torch.randn(1, 3, 8, 8)}
    simulation = qwlora.simulate(model, batch)
    simulation.calibrate([batch])
    qwlora.export(simulation, "onnx_each", tmp_path)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    assert [len(node.input) for node in graph.node if node.op_type == "Conv"] == [3]
    # without its session options ONNX Runtime 1.32 rounds the bias to int32, where it overflows
    assert all(row.passed for row in qwlora.verify(tmp_path, simulation, [batch]))


IDS = torch.randint(7, 256, (2, 12), generator=torch.Generator().manual_seed(3))
SIZES: Any = {"graphs": [12, 1], "context": [24]}
MODELS = list(VISION_LANGUAGE)


def all_but_one_slow(first: str, *others: str) -> list[Any]:
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


def with_adapters(name: str, *adapters: str, layers: str = "", blocks: int = 2) -> Any:
    """The model with adapters on its language model, and integers there only."""
    torch.manual_seed(0)
    model = with_large_weights(VISION_LANGUAGE[name]())
    del model.get_decoder().layers[blocks:]
    language = next(n for n, module in model.named_modules() if module is model.get_decoder())
    linear = [path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    parts = [f"model.{n}" for n, m in model.model.named_children() if m is not model.get_decoder()]
    towers = [part for part in parts if any(path.startswith(part) for path in linear)]
    rules = [qwlora.LayerRule(f"{tower}*", None) for tower in towers]
    qwlora.quantize_(model, "w8-channel", solver="rtn", rules=rules)
    found = layers or rf"{language}.*_proj"
    config = LoraConfig(r=4, target_modules=found, init_lora_weights=False)
    torch.manual_seed(1)
    wrapped = get_peft_model(model, config, adapters[0])
    for adapter in adapters[1:]:
        wrapped.add_adapter(adapter, config)
    return wrapped.eval()


def language_model(name: str) -> tuple[AdapterSimulations, dict[str, Tensor]]:
    """Simulations of two adapters, and a sequence with an image."""
    model = with_adapters(name, "first", "second")
    batch = image_and_text(model.get_base_model())
    made = qwlora.simulate_adapters(model, batch, SCHEMES, "none")
    made.calibrate([batch, {"input_ids": IDS}])
    positions = batch.pop("position_ids")
    one = {name: tensor[:1] for name, tensor in batch.items()}
    return made, {**one, "position_ids": positions[..., :1, :]}


@pytest.fixture(scope="module")
def qwen() -> tuple[qwlora.Simulation, dict[str, Tensor]]:
    """One block and one adapter, and a sequence with an image."""
    model = with_adapters("Qwen2-VL", "default", layers=r".*language.*q_proj", blocks=1)
    batch = image_and_text(model.get_base_model())
    made = qwlora.simulate(model, batch, SCHEMES)
    made.calibrate([batch, {"input_ids": IDS}])
    return made, batch


def test_text_has_the_models_own_table_and_an_image_its_own_positions(qwen: Any) -> None:
    simulation, batch = qwen
    assert simulation.inputs == ("inputs_embeds", "attention_mask", "position_ids")
    assert simulation.encodings["inputs_embeds"].scheme.bitwidth == 16
    assert not any("embed_tokens" in name for name in simulation.encodings)
    table = simulation.origin.model.get_base_model().get_input_embeddings()
    counted = torch.arange(12).expand(3, 2, 12)
    given = {"inputs_embeds": table(IDS), "position_ids": counted}
    assert torch.equal(simulation.logits(IDS), simulation.outputs(given)["logits"])
    assert torch.equal(simulation.bind({"input_ids": IDS})["position_ids"], counted)
    other = {**batch, "position_ids": torch.arange(12)[None]}  # an image has positions of its own
    logits, moved = (simulation.outputs(b)["logits"] for b in (batch, other))
    assert torch.equal(logits[:, :4], moved[:, :4])
    assert not torch.equal(logits[:, 4:], moved[:, 4:])


def test_an_adapter_on_the_vision_tower_is_refused() -> None:
    model = with_adapters("Qwen2-VL", "default", layers=r".*(q_proj|blocks.*fc1)", blocks=1)
    problem = r"2 weights .*visual\.blocks\.0\.mlp\.fc1.*target_modules"
    with pytest.raises(CaptureError, match=problem):
        qwlora.simulate(model, image_and_text(model.get_base_model()), SCHEMES)


TOWERS = {"SmolVLM": "vision_model"}
TOWERS |= dict.fromkeys(("Gemma 3, with images", "LLaVA"), "vision_tower")


@pytest.mark.parametrize("name", all_but_one_slow(*TOWERS))
def test_towers_of_pixels_are_captured(name: str) -> None:
    torch.manual_seed(0)
    tower = getattr(with_large_weights(VISION_LANGUAGE[name]()).model, TOWERS[name])
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


@pytest.mark.parametrize("name", all_but_one_slow(*MODELS))
def test_transformers_and_peft_load_base_and_adapters(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = with_adapters(name, "first", "second", blocks=1), dict[str, Tensor]()
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
    known = TARGETS[target]
    runtime: Any = (
        known.backend.open(folder, "") if target == "aimet" else known.open(folder, adapter)
    )
    if target == "onnx":
        return runtime.run(batch)["logits"]
    return call(runtime, batch["inputs_embeds"], batch["position_ids"])


def call(runtime: Any, embeddings: Tensor, positions: Tensor) -> Tensor:
    cache = runtime.empty_cache()
    return runtime.call("prompt_ar12_cl24", embeddings, 0, cache, positions=positions)[1]["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_target_computes_text_and_image(name: str, tmp_path: Path) -> None:
    simulations, batch = language_model(name)
    for target in ("onnx", "aimet", "qairt"):
        made: Any = simulations["first"] if target == "aimet" else simulations
        sizes = {**SIZES, "graphs": [12]} if target == "aimet" else SIZES
        qwlora.export(made, target, tmp_path / target, sample={"input_ids": IDS[:1]}, **sizes)
        assert all(row.passed for row in qwlora.verify(tmp_path / target, made, IDS))
        expected = simulations["first"].outputs(batch)["logits"]
        assert sqnr(logits_of(target, tmp_path / target, "first", batch), expected) > 50
