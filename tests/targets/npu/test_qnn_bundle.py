"""Bundles for Qualcomm's HTP: what they compute on CPU and emulator, and damaged files."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qwlora
from qwlora import LayerRule, PlacementRule, Scheme
from qwlora.errors import ExportError
from qwlora.simulation.adapter_simulations import AdapterSimulations
from qwlora.system.atomic import read_tensors
from qwlora.targets.npu.htp_rewrites import npu_onnx
from qwlora.targets.npu.npu_graph import npu_graph
from qwlora.targets.npu.qnn import QnnModel
from qwlora.targets.onnx.onnx_runtime import open_model, run_session
from qwlora.targets.proof.checks import Limits
from qwlora.targets.proof.reference import GRAPHS_NOISE, compare_first
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


def quantized(module: nn.Module) -> nn.Module:
    """The module with convolutions of 8 bits."""
    layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)]
    rules = [LayerRule(name, EIGHT_BITS[nn.Conv2d]) for name in layers]
    qwlora.quantize_(module, "w4-channel", solver="rtn", rules=rules)
    return module


def device_graph(
    module: nn.Module, x: Tensor, schemes: qwlora.Schemes = HTP
) -> tuple[Any, str, Tensor]:
    """The ONNX graph of a module, the name of its output, and what the simulation computes."""
    simulation = qwlora.simulate(module.eval(), {"x": x}, schemes)
    simulation.calibrate([{"x": x}])
    model, _ = npu_onnx(npu_graph(simulation, {"x": x}).device, {})
    (name,) = simulation.graph().interface.outputs
    return model, name, simulation.outputs({"x": x})[name]


def on_cpu(module: nn.Module, x: Tensor) -> tuple[Any, Tensor, Tensor]:
    """The ONNX graph of a module, its output in ONNX Runtime, and the simulation's."""
    model, name, expected = device_graph(module, x)
    found = run_session(open_model(model, {}, is_optimized=False), {"x": x})[name]
    return model, found, expected


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
        device_graph(Normed(True), torch.randn(1, 12, 4), schemes)


def test_convolutions_of_a_moved_value_share_its_rounding() -> None:
    torch.manual_seed(0)
    model, found, expected = on_cpu(quantized(Moved()), torch.randn(1, 12, 4, 4) + 3)
    read = [node.inputs[0] for node in model.graph if node.op_type == "Conv"]
    assert {value.producer().op_type for value in read} == {"DequantizeLinear"}
    assert read[1] is read[2]
    assert sqnr(found, expected) > 80
