"""How large the update of each trained layer is, and how many directions it uses.

    update           dW = scaling B A                   [out, in], rank r
    singular values  of dW, from those of R_B R_A^T     B = Q_B R_B,  A^T = Q_A R_A
    gain             |dW| / |W|                         Frobenius norms, W the frozen weight

DoRA's magnitudes are not included. Layers with adapters of another form (embeddings, convolutions)
are left out.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qwlora.nn import PackedLayer, weight_out_in
from qwlora.parameter_names import canonical_name

DIGITS = 6  # significant


@torch.no_grad()
def adapter_updates(model: nn.Module) -> dict[str, dict[str, Any]]:
    """`singular_values`, largest first, and `gain` of the active adapter's layers, by name."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        active = next((a for a in module.active_adapters if a in module.lora_A), None)
        if active is None:
            continue
        base = module.get_base_layer()
        if not isinstance(base, nn.Linear | Conv1D):
            continue
        first, second = module.lora_A[active], module.lora_B[active]
        values = module.scaling[active] * update_values(second.weight, first.weight)
        report: dict[str, Any] = {
            "singular_values": [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
        }
        if size := _norm(base):
            report["gain"] = float(f"{float(values.norm()) / size:.{DIGITS}g}")
        found[canonical_name(name)] = report
    return found


def update_values(second: Tensor, first: Tensor) -> Tensor:
    """Singular values of `second @ first` ([out, r] @ [r, in]) without forming the product."""
    upper = torch.linalg.qr(second.detach().double().cpu(), mode="r").R
    lower = torch.linalg.qr(first.detach().double().cpu().T, mode="r").R
    return torch.linalg.svdvals(upper @ lower.T)


def _norm(layer: nn.Module) -> float:
    """The norm of a layer's frozen weight."""
    weight = layer.tensor.dequantize() if isinstance(layer, PackedLayer) else weight_out_in(layer)
    return float(weight.detach().norm())
