"""Bundles for Qualcomm's HTP: what they compute on CPU and emulator, and damaged files."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import qwlora
from qwlora import LayerRule, PlacementRule, Scheme
from qwlora.data.sequences import Sequences
from qwlora.errors import ExportError, MissingExtraError
from qwlora.simulation.adapter_simulations import AdapterSimulations
from qwlora.system.atomic import read_tensors
from qwlora.targets.npu import qnn
from qwlora.targets.npu.htp_rewrites import npu_onnx
from qwlora.targets.npu.npu_graph import npu_graph
from qwlora.targets.npu.qnn import QnnModel
from qwlora.targets.onnx.onnx_runtime import open_model, run_session
from qwlora.targets.proof.checks import LIMITS, Limits, Parity
from qwlora.targets.proof.reference import GRAPHS_NOISE, compare_first, make_reference
from qwlora.targets.registry import TARGETS
from qwlora.targets.weights.gguf import LlamaRuntime
from targets.any_models import EIGHT_BITS, HTP
from targets.npu.conftest import CONTEXT, IDS, PIECE, SCHEMES, Files, simulated, write
from targets.proofs import reference_of, sqnr

GRAPHS = f"prompt_ar{PIECE}_cl{CONTEXT}", f"token_ar1_cl{CONTEXT}"
# what is computed without the HTP's emulator, too
EMULATED = pytest.mark.parametrize(
    "is_emulated", [False, pytest.param(True, marks=pytest.mark.client)]
)


@pytest.mark.slow
@EMULATED
@pytest.mark.parametrize("name", ["first", "second", "zero"])
def test_every_adapter_computes_its_simulation(
    name: str, is_emulated: bool, simulations: AdapterSimulations, files: Files
) -> None:
    folder = files("qnn")
    simulation = simulations["base" if name == "zero" else name]
    reference = reference_of(simulation, IDS, GRAPHS_NOISE)
    compare = partial(compare_first, reference)
    parity = TARGETS["qnn"].open(folder, name).parity(compare, Limits(perplexity_difference=0.02))
    assert parity is not None
    assert parity.problems == []
    assert parity.figures["cpu"]["top1_agreement"] > 0.9
    logits = QnnModel(folder / "base", folder / name, htp=False).logits(IDS)
    expected = simulation.logits(IDS)
    assert sqnr(logits, expected) > 45
    for other in (s for s in simulations.values() if s is not simulation):
        off, own = ((logits - x).abs().mean() for x in (other.logits(IDS), expected))
        assert off > 10 * own
    if is_emulated:
        on_htp = QnnModel(folder / "base", folder / name, htp=True).logits(IDS)
        assert sqnr(on_htp, logits) > 35
        assert parity.figures["htp"].keys() == parity.figures["cpu"].keys()
        assert parity.figures["placement"].keys() == {*GRAPHS}
    else:
        assert "qwlora[qnn]" in parity.figures["not_run"]


@pytest.mark.slow
@EMULATED
def test_activations_of_8_bits(is_emulated: bool, tmp_path: Path) -> None:
    schemes = replace(SCHEMES, activations=Scheme(8, symmetric=False))
    with pytest.raises(ExportError) as refused:
        write(simulated(schemes=schemes), tmp_path)
    for name in ("input_layernorm.weight", "lm_head.weight: int16 symmetric per channel"):
        assert name in str(refused.value)
    norms = PlacementRule("*norm", of="weights", bitwidth=8, symmetric=False)
    head = PlacementRule("lm_head", of="weights", bitwidth=8)
    simulations = simulated(schemes=replace(schemes, rules=[norms, head]))
    write(simulations, tmp_path)
    model = QnnModel(tmp_path / "base", tmp_path / "first", htp=is_emulated, profiles=tmp_path)
    expected, other = (simulations[name].logits(IDS) for name in ("first", "second"))
    assert sqnr(model.logits(IDS), expected) > 20 > 4 * sqnr(other, expected)
    for place in model.placement().values() if is_emulated else ():
        assert (place["partitions"], place["cpu_nodes"]) == (1, 0), place


@pytest.mark.slow
@pytest.mark.client
def test_adapters_switched_in_graphs_equal_separate_runs(files: Files, tmp_path: Path) -> None:
    folder = files("qnn")
    switched = QnnModel(folder / "base", folder / "first", htp=True, profiles=tmp_path / "profiles")
    found = {"before": switched.logits(IDS, steps=4)}
    for name in ("zero", "second", "first"):
        switched.use(folder / name)
        found[name] = switched.logits(IDS, steps=4)
        alone = QnnModel(folder / "base", folder / name, htp=True)
        assert torch.equal(found[name], alone.logits(IDS, steps=4))
    assert torch.equal(found["before"], found["first"])
    assert not torch.equal(found["zero"], found["first"])
    record = json.loads((folder / "base" / "graphs.json").read_text())
    assert record["compiler"]["soc_model"] == "57"
    compiled = {graph["compiled"] for graph in record["graphs"].values()}
    assert compiled == {f"device/{graph}_ctx.onnx" for graph in GRAPHS}
    assert not list((folder / "base").glob("*_ctx.onnx"))  # where the emulator would crash on it
    binaries = list((folder / "base" / "device").glob("*.bin"))
    assert len(binaries) == 1  # both graphs share it


@pytest.mark.slow
def test_an_adapter_is_zero_where_only_the_other_has_layers_and_ranks(files: Files) -> None:
    names = (files("qnn") / name / "adapter.safetensors" for name in ("first", "second"))
    first, second = (read_tensors(file)[0] for file in names)
    assert first.keys() == second.keys()
    sizes = {(first[n].shape, first[n].dtype) for n in first if "lora_A" in n}
    assert sizes == {((64, 4), torch.int8), ((128, 4), torch.int8)}
    for name in first.keys() - {"lora_alpha"}:
        has_second, has_first = "q_proj" not in name, "v_proj" not in name
        own = first[name][:, :2] if "lora_A" in name else first[name][:2]
        assert bool(own.any()) is has_first
        assert int(first[name].count_nonzero()) == int(own.count_nonzero())
        assert bool(second[name].any()) is has_second
    assert (float(first["lora_alpha"]), float(second["lora_alpha"])) == (2, 2)


@pytest.mark.slow
@pytest.mark.client
def test_llama_cpp_runs_in_the_process_of_the_emulator(files: Files, tmp_path: Path) -> None:
    folder = files("qnn")
    QnnModel(folder / "base", folder / "first", htp=True).logits(IDS)
    with pytest.raises(ExportError, match=r"nothing\.gguf.*failed to load model"):
        LlamaRuntime(tmp_path / "nothing.gguf")


@pytest.mark.slow
def test_a_base_that_the_htp_does_not_take_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"embed_tokens.weight: .*weights: w8-tensor"):
        write(simulated(embeddings="w4-channel"), tmp_path)
    assert not list(tmp_path.iterdir())


class Normed(nn.Module):
    """A group norm whose channels have weights and biases of different sizes."""

    def __init__(self, affine: bool):
        super().__init__()
        self.norm = nn.GroupNorm(3, 12, eps=1e-3, affine=affine)
        if affine:
            nn.init.uniform_(self.norm.weight, 0.1, 3)
            nn.init.uniform_(self.norm.bias, -2, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x)
        return normed


class Moved(nn.Module):
    """Convolutions of what is enlarged, and of tokens that become an image, as in a UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first = nn.GroupNorm(3, 12), nn.Conv2d(12, 8, 3, padding=1)
        self.enlarged, self.shortcut = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        (only,) = self.norm(x).split(12, dim=1)  # all channels
        x = nn.functional.interpolate(self.first(only), scale_factor=2.0, mode="nearest")
        tokens = torch.relu(self.enlarged(x) + self.shortcut(x)).flatten(2).mT
        image: Tensor = self.out(tokens.reshape(-1, 8, 8, 8).permute(0, 3, 1, 2).contiguous())
        return image


def on_cpu(
    module: nn.Module, x: Tensor, schemes: qwlora.Schemes = HTP
) -> tuple[Any, Tensor, Tensor]:
    """The ONNX graph of a module, its output in ONNX Runtime, and the simulation's."""
    simulation = qwlora.simulate(module.eval(), {"x": x}, schemes)
    simulation.calibrate([{"x": x}])
    model, _ = npu_onnx(npu_graph(simulation, {"x": x}).device, {})
    (name,) = simulation.graph().interface.outputs
    found = run_session(open_model(model, {}, is_optimized=False), {"x": x})[name]
    return model, found, simulation.outputs({"x": x})[name]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(1, 12, 6, 8), (2, 12, 10)])
def test_a_group_norm_without_the_operator(shape: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.arange(1, 13).view(-1, *[1] * (len(shape) - 2)) + 3
    model, found, expected = on_cpu(Normed(affine), x)
    assert "GroupNormalization" not in {node.op_type for node in model.graph}
    assert sqnr(found, expected) > 75


def test_a_group_norm_with_a_float_weight_is_refused() -> None:
    schemes = replace(HTP, rules=[PlacementRule("norm.weight", keep="float")])
    with pytest.raises(ExportError, match=r"norm\.weight has no grid.*Remove the rule"):
        on_cpu(Normed(True), torch.randn(1, 12, 4), schemes)


def test_convolutions_of_a_moved_value_share_its_rounding() -> None:
    torch.manual_seed(0)
    module = Moved()
    layers = ("first", "enlarged", "shortcut", "out")
    rules = [LayerRule(name, EIGHT_BITS[nn.Conv2d]) for name in layers]
    qwlora.quantize_(module, "w4-channel", solver="rtn", rules=rules)
    model, found, expected = on_cpu(module, torch.randn(1, 12, 4, 4) + 3)
    read = [node.inputs[0] for node in model.graph if node.op_type == "Conv"]
    assert {value.producer().op_type for value in read} == {"DequantizeLinear"}
    assert read[1] is read[2]
    assert sqnr(found, expected) > 80


ANSWERS = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(7))
PLACED = {"partitions": 2, "cpu_nodes": 3, "cpu_names": ["a", "b", "c"]}


class FakeModel:
    """In place of QnnModel, without files and emulator: the HTP computes something else."""

    profiles: Path | None = None

    def __init__(self, *_: Any, htp: bool, profiles: Path | None = None):
        self.htp = htp
        if profiles is not None:
            assert profiles.is_dir()
            FakeModel.profiles = profiles

    def logits(self, ids: Tensor, steps: int) -> Tensor:
        return ANSWERS + 0.1 * self.htp * ANSWERS.flip(1)

    def placement(self) -> dict[str, dict[str, Any]]:
        return {"prefill": {"partitions": 1, "cpu_nodes": 0}, "decode": PLACED}


def parity_of(monkeypatch: pytest.MonkeyPatch, devices: Any = list) -> Parity:
    """The comparison of a bundle that `FakeModel` runs."""
    parity, states = QnnModel.parity, {"adapter": lambda ids: ANSWERS}
    ids = torch.arange(12)[None]
    reference = make_reference(states, Sequences(ids, ids), states)
    monkeypatch.setattr(qnn, "QnnModel", FakeModel)
    monkeypatch.setattr(qnn, "_devices", devices)
    files: Any = SimpleNamespace(folder=Path(), adapter=Path("first"))
    return parity(files, partial(compare_first, reference), LIMITS)


def test_a_bundle_is_compared_on_cpu_and_htp(monkeypatch: pytest.MonkeyPatch) -> None:
    parity = parity_of(monkeypatch)
    assert parity.figures["exact"]["adapter"] == parity.figures["htp"] != parity.figures["cpu"]
    problems = parity.problems
    assert any("on the HTP" in problem for problem in problems)
    assert "partitions of graph decode on the HTP: 2 (limit: at most 1)" in problems
    assert "nodes of graph decode on the CPU (of a, b, c): 3 (limit: at most 0)" in problems
    assert not any("prefill" in problem for problem in problems)


def test_without_the_emulator_a_bundle_is_compared_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parity = parity_of(monkeypatch, mock.Mock(side_effect=MissingExtraError("qwlora[qnn]")))
    assert parity.problems == []
    assert parity.figures["not_run"] == "qwlora[qnn]"


def test_profiles_of_a_runtime_that_fails_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeModel, "placement", mock.Mock(side_effect=ExportError("no profile")))
    with pytest.raises(ExportError, match="no profile"):
        parity_of(monkeypatch)
    assert FakeModel.profiles is not None
    assert not FakeModel.profiles.exists()


def test_a_compiler_that_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compiled(*arguments: object) -> None:
        (tmp_path / "device" / "prefill_ctx.onnx").touch()

    version = SimpleNamespace(__version__="1")
    fakes = {"_devices": list, "open_graph": compiled, "require": lambda *names: version}
    for name, fake in fakes.items():
        monkeypatch.setattr(qnn, name, fake)
    assert "onnxruntime-qnn" in qnn.compile_graphs(tmp_path, ["prefill"])
    assert "exit 139" in (tmp_path / "device" / "README.md").read_text()
    shutil.rmtree(tmp_path / "device")
    with pytest.raises(ExportError, match=r"decode.onnx.*wrote no device/decode_ctx.onnx"):
        qnn.compile_graphs(tmp_path, ["prefill", "decode"])
