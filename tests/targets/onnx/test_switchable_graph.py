"""One session for a base and adapters of other layers, ranks and scalings."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from conftest import tiny_model
from qwlora import Scheme, Schemes, quantize_, simulate
from qwlora.errors import CaptureError, ExportError
from qwlora.formats import manifest
from qwlora.simulation.simulation import Simulation
from qwlora.targets.onnx.onnx import (
    Onnx,
    ZeroAdapter,
    export_onnx,
    write_adapter,
    write_switchable,
)
from qwlora.targets.onnx.onnx_runtime import OnnxModel
from qwlora.targets.proof.compare import compare_cache
from qwlora.targets.proof.contents import ADAPTER_FILE
from qwlora.targets.proof.folder import RECORD, is_of_base, record_digest
from qwlora.targets.target import ExportedGraph
from targets.proofs import reference_of, verify_simulation

IDS = torch.randint(0, 256, (3, 16), generator=torch.Generator().manual_seed(0))
LONG = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(1))
WIDE = ["q_proj", "o_proj", "down_proj", "up_proj"]


def simulation(seed: int, modules: list[str], **given: object) -> Simulation:
    """Of a Llama of one layer with a random adapter, whose weights have 4 bits."""
    model = tiny_model("llama", layers=1)
    model.set_attn_implementation("eager")
    quantize_(model, "w4-block32", "rtn")
    torch.manual_seed(seed)
    config = LoraConfig(target_modules=modules, init_lora_weights=False, **given)  # type: ignore[arg-type]
    inputs = {"input_ids": IDS[:2, :12], "attention_mask": torch.ones_like(IDS[:2, :12])}
    schemes = Schemes(Scheme(16), adapter_weights=Scheme(4))
    adapted = get_peft_model(model, config).eval()
    if not seed:
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.zero_()
    found = simulate(adapted, inputs, schemes)
    found.calibrate([inputs])
    return found


@dataclass
class Bundle:
    """Folders of a base and of adapters `wide` and `narrow`, and their simulations by name."""

    folder: Path
    simulations: dict[str, Simulation]

    def adapter(self, name: str) -> Path | None:
        return None if name == "base" else self.folder / name

    def logits(self, name: str, runtime: OnnxModel) -> Tensor:
        runtime.use(self.adapter(name))
        return runtime.logits(IDS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle")
    simulations = {
        "base": simulation(0, WIDE, r=4, lora_alpha=8),
        "wide": simulation(1, WIDE, r=4, lora_alpha=8),
        "narrow": simulation(2, ["q_proj", "down_proj"], r=3, lora_alpha=16, use_rslora=True),
    }
    for name, made in simulations.items():
        (folder / name).mkdir()
        if name == "base":
            assert Onnx().write_base(ExportedGraph(made, {}, {}), folder / name) is None
        else:
            write_adapter(made.graph(), folder / "base", folder / name)
    return Bundle(folder, simulations)


def test_one_session_computes_the_base_and_every_adapter(bundle: Bundle) -> None:
    runtime = OnnxModel(bundle.folder / "base")
    layers = {}
    for name, made in bundle.simulations.items():
        runtime.use(bundle.adapter(name))
        reference = ZeroAdapter(made) if name == "base" else made
        parity = verify_simulation(runtime, reference, IDS, layer_tokens=16)
        assert parity.problems == [], name
        assert parity.figures["top1_agreement"] == 1
        layers[name] = parity.figures["layers"]
    assert layers["wide"] - layers["base"] == 3 * len(WIDE)  # lora_A, lora_B, their scaled product


def test_switching_gives_the_bits_of_separate_sessions_and_of_whole_models(
    bundle: Bundle, tmp_path: Path
) -> None:
    together = OnnxModel(bundle.folder / "base")
    alone = {n: bundle.logits(n, OnnxModel(together.folder)) for n in bundle.simulations}
    for name in ("wide", "narrow", "base", "wide", "base", "narrow"):
        assert torch.equal(bundle.logits(name, together), alone[name])
    assert (alone["wide"] - alone["base"]).abs().max() > 0.1
    assert (alone["wide"] - alone["narrow"]).abs().max() > 0.1
    export_onnx(bundle.simulations["wide"].graph(), tmp_path)
    assert torch.equal(OnnxModel(tmp_path).logits(IDS), alone["wide"])


def test_tokens_one_by_one_with_the_cache_are_the_simulation(bundle: Bundle) -> None:
    runtime = OnnxModel(bundle.folder / "base")
    assert runtime.has_cache
    for name, made in bundle.simulations.items():
        own, others = bundle.adapter(name), [bundle.folder / n for n in ("wide", "narrow")]
        reference = ZeroAdapter(made) if name == "base" else made
        cache = compare_cache(runtime, reference_of(reference, LONG), own, others)
        assert cache.problems == [], name
        assert (cache.figures["tokens"], cache.figures["top1_agreement"]) == (16, 1)
        runtime.use(own)
        plain = OnnxModel(bundle.folder / "base")
        plain.use(own)
        tokens = LONG
        for _ in range(4):  # whole sequences
            tokens = torch.cat([tokens, plain.logits(tokens)[:, -1:].argmax(-1)], dim=1)
        assert runtime.decode(LONG, 4) == tokens[0, -4:].tolist()


def test_a_model_without_a_cache_is_written_for_whole_sequences(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise CaptureError("Recurrent returns no past_key_values")

    monkeypatch.setattr("qwlora.simulation.kv_cache_graph.capture_cached", refuse)
    made, wide = bundle.simulations["base"], bundle.simulations["wide"]
    reason = Onnx().write_base(ExportedGraph(made, {}, {}), tmp_path)
    assert reason == "Recurrent returns no past_key_values"
    runtime = OnnxModel(tmp_path)
    assert not runtime.has_cache
    assert [value.name for value in runtime.session.get_inputs()] == ["input_ids", "attention_mask"]
    (tmp_path / "wide").mkdir()
    write_adapter(wide.graph(), tmp_path, tmp_path / "wide")
    for name in ("base", "wide"):
        runtime.use(None if name == "base" else tmp_path / name)
        same = OnnxModel(bundle.folder / "base")
        assert torch.equal(runtime.logits(IDS), bundle.logits(name, same))
        for ids in (LONG, LONG[:, :1]):
            assert runtime.decode(ids, 2) == same.decode(ids, 2)


def test_of_other_adapters_only_the_file_that_is_loaded_is_read(tmp_path: Path) -> None:
    for name, files in (("base", []), ("other", [ADAPTER_FILE, "model.encodings"])):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text(file)
        record = {"base": record_digest(tmp_path / "base")} if name == "other" else {}
        manifest.write(tmp_path / name, RECORD, record, files)
    assert is_of_base(tmp_path, "other")
    (tmp_path / "other" / "model.encodings").unlink()
    assert is_of_base(tmp_path, "other")
    (tmp_path / "other" / ADAPTER_FILE).write_text("changed")
    assert not is_of_base(tmp_path, "other")
    assert not is_of_base(tmp_path, "missing")


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
def test_an_adapter_on_an_embedding_is_switched(tmp_path: Path) -> None:
    layers = ["q_proj", "embed_tokens"]
    zero, own = (simulation(seed, layers, r=4, lora_alpha=8) for seed in (0, 5))
    for name in ("base", "own"):
        (tmp_path / name).mkdir()
    write_switchable(zero.graph(), tmp_path / "base", {}, base_activations=True)
    write_adapter(own.graph(), tmp_path / "base", tmp_path / "own")
    runtime = OnnxModel(tmp_path / "base")
    for folder, reference in ((None, ZeroAdapter(zero)), (tmp_path / "own", own)):
        runtime.use(folder)
        parity = verify_simulation(runtime, reference, IDS, layer_tokens=16)
        assert parity.problems == []


def test_an_adapter_is_small_and_the_weights_are_there_once(bundle: Bundle) -> None:
    sizes = {
        name: sum(file.stat().st_size for file in (bundle.folder / name).iterdir())
        for name in bundle.simulations
    }
    assert max(sizes["wide"], sizes["narrow"]) < sizes["base"] / 5
    assert [file.name for file in (bundle.folder / "wide").iterdir()] == ["adapter.onnx_adapter"]


def test_what_the_base_has_no_place_for_is_refused_by_name(bundle: Bundle, tmp_path: Path) -> None:
    other = simulation(3, ["q_proj", "gate_proj"], r=4)
    with pytest.raises(ExportError, match=r"gate_proj.add, .*base does not.*target_modules"):
        write_adapter(other.graph(), bundle.folder / "base", tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_another_base_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    shared = bundle.simulations["base"].graph()
    write_switchable(shared, tmp_path, {}, base_activations=False)
    with pytest.raises(ExportError, match=r"is not that of the base; export both again"):
        write_adapter(bundle.simulations["wide"].graph(), tmp_path, tmp_path)
