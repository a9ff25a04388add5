"""Before an adapter is merged: how much of it the grid would swallow.

    share = |{ij : |Delta_ij| < step_ij / 2}| / |{ij}|,    Delta = scaling * lora_B lora_A,    step_ij the scale of the base's grid at ij

A weight of the base lies on its grid, so after merging and rounding back an entry of Delta below half a step leaves no trace, and one above is rounded to whole
steps. What that costs is measured by whoever has text (`pipeline/merge.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from qwlora.grid.encoding import Encoding, aligned, grouped
from qwlora.grid.float_offset import FloatOffsetEncoding
from qwlora.grid.names import canonical_name


@dataclass(frozen=True)
class Swallowed:
    """One layer: entries of its delta below half a step, all of them, and the delta's root mean square in steps."""

    below: int
    entries: int
    rms_steps: float

    @property
    def share(self) -> float:
        return self.below / self.entries


@torch.no_grad()
def swallowed(model: PeftModel, adapter: str | None = None) -> dict[str, Swallowed]:
    """Each packed layer that has the adapter, by canonical path."""
    adapter = adapter or model.active_adapter
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in (*module.lora_A, *module.lora_embedding_A):
            continue
        encoding = getattr(module.get_base_layer(), "encoding", None)
        if isinstance(encoding, Encoding | FloatOffsetEncoding):
            found[canonical_name(name)] = _of_layer(module.get_delta_weight(adapter).flatten(1).float(), encoding)
    return found


def _of_layer(delta: Tensor, encoding: Encoding | FloatOffsetEncoding) -> Swallowed:
    granularity = encoding.scheme.granularity
    steps = grouped(delta, granularity) / aligned(encoding.scale, granularity, delta.ndim)
    return Swallowed(int((steps.abs() < 0.5).sum()), steps.numel(), float(steps.square().mean().sqrt()))
