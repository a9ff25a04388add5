"""Plain PEFT training, as in AIMET's guide: AdamW on the adapter, one sequence per step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

RATE = 1e-3


def train_(model: nn.Module, sequences: Iterable[Tensor]) -> list[float]:
    """One step for each sequence [1, tokens]; returns the losses."""
    parameters = [p for n, p in model.named_parameters() if "lora_" in n and p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, RATE)
    losses = []
    for ids in sequences:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
