"""Bundles for Qualcomm's Genie: in Genie itself, in a runner that does what it does, and what is
refused."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qwlora.errors import CaptureError, ExportError
from qwlora.formats.aimet_encodings import read_encodings
from qwlora.simulation.adapter_simulations import AdapterSimulations
from qwlora.simulation.kv_cache_graph import CacheSizes, cache_sizes
from qwlora.targets.npu import genie
from qwlora.targets.npu.device_graph import COS, SIN
from qwlora.targets.npu.genie import angles
from qwlora.targets.npu.qnn import QnnModel, open_graph
from qwlora.targets.registry import TARGETS
from targets.npu.conftest import CONTEXT, IDS, PIECE, Files, simulated, write
from targets.proofs import sqnr, with_strength

from .genie_runner import Runner, compile_separately, greedy, in_genie

COUNT, BOS = 24, 1
PROMPT = torch.cat([torch.tensor([[BOS]]), IDS], 1)  # Genie begins a text with BOS
NAMES = {1: f"token_ar1_cl{CONTEXT}_1_of_1", PIECE: f"prompt_ar{PIECE}_cl{CONTEXT}_1_of_1"}


@pytest.mark.slow
def test_a_runner_like_genie_generates_simulated_tokens(
    simulations: AdapterSimulations, files: Files
) -> None:
    """The prompt is longer than a piece of prefill, and its last piece is not full."""
    runner, base = Runner(files("qnn", "genie")), greedy(simulations["base"].logits, PROMPT, COUNT)
    expected = {("zero", 1.0): base}
    for name, alpha in (("first", 1.0), ("second", 1.0), ("first", 0.5), ("first", 0.0)):
        expected[name, alpha] = greedy(with_strength(simulations[name], alpha), PROMPT, COUNT)
    for (name, alpha), tokens in expected.items():
        runner.apply(name, alpha)
        assert runner.generate(PROMPT[0].tolist(), COUNT) == tokens
    assert expected["first", 0.0] == base
    assert len({str(tokens) for tokens in expected.values()}) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "layout", "is_emulated"),
    [
        ("qnn", None, False),
        pytest.param("qnn", None, True, marks=pytest.mark.client),
        ("qairt", None, False),
        ("qnn", "genie", False),
        ("qairt", "genie", False),
    ],
)
def test_graphs_of_every_size_compute_the_simulation_with_the_weights_once(
    target: str, layout: Any, is_emulated: bool, simulations: AdapterSimulations, tmp_path: Path
) -> None:
    sizes = cache_sizes([PIECE, 4, 1], [32, CONTEXT])
    write(simulations, tmp_path, target, layout, graphs=[PIECE, 4, 1], context=[32, CONTEXT])

    def opened(name: str) -> Any:
        if target == "qnn":
            adapter = "zero" if name == "none" else name
            return QnnModel(tmp_path / "base", tmp_path / adapter, htp=is_emulated)
        return TARGETS["qairt"].open(tmp_path, name)

    least = 35 if layout or is_emulated else 45
    for name in ["first"] if is_emulated else ["first", "second", "none"]:
        expected = simulations["base" if name == "none" else name].logits(IDS)
        assert sqnr(opened(name).logits(IDS, steps=4), expected) > least, name
    model, expected = opened("first"), simulations["first"].logits(IDS)
    names = [f"{each.name}{'_1_of_1' if layout else ''}" for each in sizes]
    assert {*model.names} == {*names}
    for name in names:
        model.names = [name]
        assert sqnr(model.logits(IDS), expected) > least, name
    assert len([*tmp_path.rglob("*.data")]) == 1
    if layout:  # which has the largest context, in which positions were compared
        config = json.loads((tmp_path / "genie_config.json").read_text())
        assert config["dialog"]["context"]["size"] == CONTEXT
    if is_emulated:
        device = tmp_path / "base" / "device"
        assert len([*device.glob("*_ctx.onnx")]) == len(sizes)
        assert len([*device.glob("*.bin")]) == 1  # all graphs share it


def with_binaries(folder: Path, compiled: Path) -> Path:
    """A configuration of graphs that were compiled one by one: the emulator cannot load a binary
    that graphs share."""
    content = json.loads((folder / "genie_config.json").read_text())
    binary = content["dialog"]["engine"]["model"]["binary"]
    assert [(folder / path).is_file() for path in binary["ctx-bins"]] == [True]
    binary["ctx-bins"] = sorted(str(path) for path in compiled.glob("*.bin"))
    config = folder / "separate.json"
    config.write_text(json.dumps(content))
    return config


@pytest.mark.slow
@pytest.mark.client
def test_genie_goes_on_in_a_larger_context(simulations: AdapterSimulations, tmp_path: Path) -> None:
    """The prompt fits into the small one, the text after it does not."""
    folder, compiled = tmp_path / "bundle", tmp_path / "compiled"
    compiled.mkdir()
    write(simulations, folder, "qnn", "genie", context=[32, CONTEXT])
    assert len(compile_separately(folder, compiled)) == 4
    request = {"ids": IDS[0].tolist(), "count": COUNT, "runs": [("first", 1.0)]}
    (tokens,) = in_genie(with_binaries(folder, compiled), request)["tokens"]
    assert tokens == greedy(simulations["first"].logits, PROMPT, COUNT)


def expected_shapes(tokens: int) -> dict[str, list[int]]:
    past = CONTEXT - tokens
    return {
        "attention_mask": [1, 1, tokens, CONTEXT],
        "position_ids_cos": [1, 1, tokens, 8],
        "past_key_0_in": [2, 1, 16, past],
        "past_value_1_in": [2, 1, past, 16],
        "past_key_1_out": [2, 1, 16, tokens],
        "lora_alpha": [1],
    }


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "name"), NAMES.items())
def test_graphs_have_the_inputs_that_genie_checks(tokens: int, name: str, files: Files) -> None:
    """And one grid of a key or value that is read and of the one that is written."""
    shapes, base = expected_shapes(tokens), files("qnn", "genie") / "base"
    session = open_graph(base / f"{name}.onnx", False)
    values = {value.name: value for value in (*session.get_inputs(), *session.get_outputs())}
    assert {n: values[n].shape for n in shapes} == shapes
    kinds = {n: f"tensor(uint{8 if 'past' in n else 16})" for n in shapes}
    assert {n: values[n].type for n in shapes} == kinds
    graph = json.loads((base / "graphs.json").read_text())["graphs"][name]
    grids: dict[str, Any] = graph["encodings"]
    assert grids["attention_mask"]["offset"] == -65535  # 0 is its largest code
    assert grids["lora_alpha"]["scale"] == pytest.approx(1 / 65535)
    sections = files("qairt", "genie")
    file = onnx.load(sections / f"{name}_model.onnx", load_external_data=False).graph
    found = {
        value.name: [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*file.input, *file.output)
    }
    assert {n: found[n] for n in shapes} == shapes
    entries = read_encodings(sections / f"{name}_first.encodings").by_name
    assert entries.keys() >= found.keys() - {"input_ids"}
    for key in (n for n in found if n.startswith("past_")):
        own, other = entries[key], entries[key.replace("_in", "_out")]
        assert (own.scale, own.offset) == (other.scale, other.offset)
        assert grids[key] == grids[key.replace("_in", "_out")]


@pytest.mark.parametrize(("theta", "is_same"), [(1e5, True), (1.001e5, False)])
def test_positions_of_a_long_context_are_compared(
    theta: float, is_same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32, in which a model computes angles, is off by 60 steps of 16 bits at the end."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e5}
    shape = {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 64}
    config = LlamaConfig(**shape, rope_parameters=rope)
    turned = LlamaConfig(**shape, rope_parameters={**rope, "rope_theta": theta})
    rotary = LlamaRotaryEmbedding(turned)

    def run_host(_: Any, mask: torch.Tensor, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip((COS, SIN), rotary(torch.zeros(1), positions), strict=True))

    monkeypatch.setattr(genie, "run_host", run_host)
    device = SimpleNamespace(interface=SimpleNamespace(shapes={COS: (1, 32)}), encodings={})
    npu: Any = SimpleNamespace(device=device, sizes=CacheSizes(4096, 32768), host=None)
    origin = SimpleNamespace(model=SimpleNamespace(config=config))
    base: Any = SimpleNamespace(simulation=SimpleNamespace(origin=origin))
    with nullcontext() if is_same else pytest.raises(ExportError, match="base of 100000"):
        genie.refuse_other_positions(npu, base)


@pytest.mark.slow
@pytest.mark.client
def test_genie_itself_generates_what_the_emulator_does(files: Files, tmp_path: Path) -> None:
    folder = files("qnn", "genie")
    runner = Runner(folder, compile_separately(folder, tmp_path))
    config = with_binaries(folder, tmp_path)
    runs = [("first", 1.0), ("first", 0.0), ("second", 1.0), ("first", 0.5), ("first", 1.0)]
    found = in_genie(config, {"ids": IDS[0].tolist(), "count": COUNT, "runs": runs})
    config.unlink()
    assert (found["config"], found["create"]) == (0, 0)
    for (name, alpha), tokens in zip(runs, found["tokens"], strict=True):
        runner.apply(name, alpha)
        assert tokens == runner.generate(PROMPT[0].tolist(), COUNT), (name, alpha)
    assert len({str(tokens) for tokens in found["tokens"]}) == 4


@pytest.mark.slow
@pytest.mark.client
@pytest.mark.parametrize("target", ["qnn", "qairt"])
def test_genie_reads_the_configuration(target: str, files: Files, tmp_path: Path) -> None:
    """Genie refuses unknown keys and missing ones."""
    text = (files(target, "genie") / "genie_config.json").read_text()
    for old, new, is_accepted in (("", "", True), ("rope-dim", "rope-dims", False)):
        (tmp_path / "config.json").write_text(text.replace(old, new) if old else text)
        assert (in_genie(tmp_path / "config.json", {})["config"] == 0) is is_accepted


def test_angles_of_llama3_are_those_of_transformers() -> None:
    rope: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    keys = {key.replace("_", "-"): value for key, value in rope.items()}
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32}
    config = LlamaConfig(**sizes, rope_parameters=rope | {"rope_theta": 5e5})
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(512)[None])
    turned = angles({"rope-dim": 16, "rope-theta": 5e5, "rope-scaling": keys}, 512)
    torch.testing.assert_close(turned.cos().float(), cos[0, :, :16], atol=1e-4, rtol=0)
    torch.testing.assert_close(turned.sin().float(), sin[0, :, :16], atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"alpha": 4}, r"first 2.*second 1.*alpha / rank|alpha / rank.*first 2"),
        ({"rope_theta": 5000.0}, "base of 5000"),
        ({"kind": "Gemma 3"}, r"the last 8 tokens"),
        ({"kind": "Gemma 3", "context": 8}, r"also takes attention_mask_1\b.*layout: genie"),
        ({"context": 2 * PIECE}, "8 and 16"),
    ],
)
def test_what_genie_cannot_run_is_refused(changes: Any, problem: str, tmp_path: Path) -> None:
    sizes = {"graphs": [3 if "kind" in changes else PIECE, 1], "context": [CONTEXT]}
    sizes |= {"context": [changes.pop("context")]} if "context" in changes else {}
    with pytest.raises((CaptureError, ExportError), match=problem):
        write(simulated(**changes), tmp_path / "a", "qnn", "genie", **sizes)
