"""How large the update of each trained layer is, relative to the frozen weight.

    update    dW = scaling B A      [out, in], rank r
    gain      |dW| / |W|            Frobenius norms, W the frozen weight

|dW|^2 = scaling^2 tr((B^T B) (A A^T)) needs only products of size [r, r]. DoRA's magnitudes are not
included. Layers with adapters of another form (embeddings, convolutions) are left out.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qwlora.nn import PackedLayer, weight_out_in
from qwlora.parameter_names import canonical_name

DIGITS = 6  # significant


@torch.no_grad()
def adapter_updates(model: nn.Module) -> dict[str, dict[str, float]]:
    """`gain` of the active adapter's layers, by name."""
    updates = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        active = next((a for a in module.active_adapters if a in module.lora_A), None)
        base = module.get_base_layer()
        if active is None or not isinstance(base, nn.Linear | Conv1D):
            continue
        size = module.scaling[active] * _product_norm(
            module.lora_B[active].weight, module.lora_A[active].weight
        )
        weight = base.tensor.dequantize() if isinstance(base, PackedLayer) else weight_out_in(base)
        frozen = float(weight.detach().norm())
        updates[canonical_name(name)] = (
            {"gain": float(f"{size / frozen:.{DIGITS}g}")} if frozen else {}
        )
    return updates


def _product_norm(second: Tensor, first: Tensor) -> float:
    """The norm of `second @ first` ([out, r] @ [r, in]) without forming the product."""
    left, right = second.detach().double().cpu(), first.detach().double().cpu()
    squares = ((left.T @ left) * (right @ right.T)).sum()
    return float(squares.clamp_min(0).sqrt())
