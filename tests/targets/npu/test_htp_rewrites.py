"""What graphs for the HTP have in place of operators that it does not take, without the HTP."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qwlora
from qwlora import LayerRule, PlacementRule
from qwlora.errors import ExportError
from qwlora.simulation.kv_cache_graph import npu_graph
from qwlora.targets.npu.htp_rewrites import npu_onnx
from qwlora.targets.npu.qnn import open_graph, placement
from qwlora.targets.onnx.onnx_model import save_graph
from qwlora.targets.onnx.onnx_runtime import open_model, run_session
from targets.any_models import EIGHT_BITS, HTP
from targets.proofs import sqnr


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


@pytest.mark.client
def test_the_htp_takes_it_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 12, 4, 4) + 3
    model, name, expected = device_graph(quantized(Moved()), x)
    save_graph(model, tmp_path / "model.onnx")
    session = open_graph(tmp_path / "model.onnx", True, tmp_path / "profile")
    assert sqnr(run_session(session, {"x": x})[name], expected) > 50
    place = placement(session, edges=2)
    assert (place["partitions"], place["cpu_nodes"]) == (1, 0), place["cpu_names"]
