"""What graphs for the HTP have in place of operators that it does not take, without the HTP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qwlora
from qwlora import PlacementRule
from qwlora.errors import ExportError
from qwlora.simulation.kv_cache_graph import npu_graph
from qwlora.targets.npu.htp_rewrites import npu_onnx
from qwlora.targets.onnx.onnx_runtime import open_model, run_session
from targets.any_models import HTP
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
