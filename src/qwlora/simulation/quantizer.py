"""The module that stands behind a quantized value in the simulated graph."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor, nn

from qwlora.errors import CalibrationError
from qwlora.grid.encoding import Encoding
from qwlora.grid.observer import MinMaxObserver
from qwlora.grid.scheme import Scheme

MASK_MAGNITUDE = 1e30


class Mode(StrEnum):
    """What a quantizer does with a value that passes."""

    FLOAT = "float"
    OBSERVE = "observe"
    SIMULATE = "simulate"
    RECIPROCAL = "reciprocal"  # simulate, multiplying by 1 / scale: the arithmetic's noise floor (see `Simulation.perturbed_logits`)


class Quantizer(nn.Module):
    """Observes a value while calibrating and fake-quantizes it afterwards; the encoding is fixed once made."""

    def __init__(self, name: str, scheme: Scheme):
        super().__init__()
        self.name, self.scheme = name, scheme
        self.mode = Mode.FLOAT
        self.observer = MinMaxObserver(scheme)
        self.encoding: Encoding | None = None
        self.fixed = False  # whether the encoding came from elsewhere, so that it is not calibrated
        self.seen: Tensor | None = None
        self.keep = False

    def forward(self, x: Tensor) -> Tensor:
        match self.mode:
            case Mode.OBSERVE:
                self.observer.update(x)
            case Mode.SIMULATE if self.encoding is not None:
                x = self.encoding.fake_quantize(x)
            case Mode.RECIPROCAL if self.encoding is not None:
                x = _by_reciprocal(x, self.encoding)
        if self.keep:
            self.seen = x
        return x

    @property
    def is_mask(self) -> bool:
        """Whether values came by that only a mask holds."""
        low, high = self.observer.low, self.observer.high
        return low is not None and high is not None and bool(max(-float(low.min()), float(high.max())) > MASK_MAGNITUDE)

    def freeze(self) -> None:
        """Fix the encoding from what was observed.

        Raises:
            CalibrationError: nothing was observed, or something that is not finite.
        """
        try:
            self.encoding = self.observer.encoding()
        except CalibrationError as error:
            raise CalibrationError(f"{self.name}: {error}") from error

    def extra_repr(self) -> str:
        return f"{self.name}, {self.scheme}, {self.mode}"


def _by_reciprocal(x: Tensor, encoding: Encoding) -> Tensor:
    """`fake_quantize` of a per-tensor encoding with `x * (1 / scale)` in place of `x / scale`."""
    low, high = encoding.offset, encoding.offset + encoding.scheme.steps
    return torch.mul(x, 1.0 / encoding.scale).round_().clamp_(low, high).mul_(encoding.scale)
