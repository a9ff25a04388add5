"""Modules that quantize activations and weights in a simulated graph."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor, nn

from qwlora.errors import CalibrationError
from qwlora.grid.activation_observer import SampleObserver
from qwlora.grid.encoding import Encoding
from qwlora.grid.range_estimator import Estimator
from qwlora.grid.scheme import PerTensor, Scheme

MASK_MAGNITUDE = 1e30


class Mode(StrEnum):
    """What a quantizer does."""

    FLOAT = "float"
    OBSERVE = "observe"
    SIMULATE = "simulate"
    RECIPROCAL = "reciprocal"  # simulate with x * (1 / scale); see `perturbed_outputs`


class Quantizer(nn.Module):
    """Observes an activation during calibration and fake-quantizes it afterwards.

    Observations are kept, so another `scheme` takes effect with the next freeze, without new data.

    Args:
        name: of the encoding.
        scheme: must be per tensor.
        estimator: how the range is chosen. Default: min-max.
        minimum, maximum: fixed ends of the range. None: as estimated.
        in_place: whether the input may be overwritten.

    Raises:
        CalibrationError: the scheme has several scales, or float offsets.
    """

    def __init__(
        self,
        name: str,
        scheme: Scheme,
        estimator: Estimator | None = None,
        minimum: float | None = None,
        maximum: float | None = None,
        in_place: bool = False,
    ):
        super().__init__()
        self.name, self.estimator = name, estimator or Estimator()
        self.minimum, self.maximum, self.in_place = minimum, maximum, in_place
        self.mode = Mode.FLOAT
        self.observer = SampleObserver(self.estimator.needs_sample and not self.is_pinned)
        self.encoding: Encoding | None = None
        self.fixed = False  # set by `fix_encodings`: not calibrated
        self.record = False  # whether forward stores its result in `recorded`
        self.recorded: Tensor | None = None
        self.scheme = scheme

    @property
    def scheme(self) -> Scheme:
        """The requested grid. Setting it removes the encoding and keeps the observations."""
        return self._scheme

    @scheme.setter
    def scheme(self, scheme: Scheme) -> None:
        if not isinstance(scheme.granularity, PerTensor) or scheme.float_offset:
            raise CalibrationError(
                f"{self.name}: activations need a per-tensor scheme with an integer offset, "
                f"not {scheme}"
            )
        self._scheme, self.encoding = scheme, None

    @property
    def is_pinned(self) -> bool:
        """Whether both ends of the range are fixed, so that it needs no data."""
        return self.minimum is not None and self.maximum is not None

    def forward(self, x: Tensor) -> Tensor:
        match self.mode:
            case Mode.OBSERVE:
                self.observer.update(x)
            case Mode.SIMULATE:
                x = self._simulate(x, self._known_encoding())
            case Mode.RECIPROCAL:
                x = _by_reciprocal(x, self._known_encoding())
        if self.record:
            self.recorded = x.clone()  # later operators may overwrite x
        return x

    def _simulate(self, x: Tensor, encoding: Encoding) -> Tensor:
        """`fake_quantize`, in place if that is allowed and no gradient is needed."""
        if self.in_place and not (torch.is_grad_enabled() and x.requires_grad):
            return encoding.fake_quantize_(x)
        return encoding.fake_quantize(x)

    def _known_encoding(self) -> Encoding:
        if self.encoding is None:
            raise CalibrationError(
                f"{self.name} has no encoding; call calibrate, or freeze after observe"
            )
        return self.encoding

    @property
    def is_mask(self) -> bool:
        """Whether an end of the range that is not fixed is beyond 1e30."""
        ends = ((self.observer.low, self.minimum), (self.observer.high, self.maximum))
        return any(
            observed is not None and fixed is None and abs(float(observed)) > MASK_MAGNITUDE
            for observed, fixed in ends
        )

    @property
    def is_infinite(self) -> bool:
        """Whether an infinite value was observed."""
        ends = (self.observer.low, self.observer.high)
        return any(end is not None and bool(end.isinf()) for end in ends)

    @property
    def is_constant(self) -> bool:
        """Whether all observed values were equal."""
        low, high = self.observer.low, self.observer.high
        return low is not None and high is not None and bool(low == high)

    def extra_repr(self) -> str:
        return f"{self.name}, {self.scheme}, {self.mode}"


class FrozenWeight(nn.Module):
    """A weight quantized once; doing that in every forward costs more than the layer itself.

    Attributes:
        mode: FLOAT returns the float weight.
    """

    def __init__(self, weight: Tensor, encoding: Encoding):
        super().__init__()
        self.encoding = encoding
        self.mode = Mode.SIMULATE
        self.value: Tensor
        self.register_buffer("value", encoding.fake_quantize(weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.mode is Mode.FLOAT else self.value


def _by_reciprocal(x: Tensor, encoding: Encoding) -> Tensor:
    """`fake_quantize` of a per-tensor encoding with `x * (1 / scale)` instead of `x / scale`."""
    low, high = encoding.offset, encoding.offset + encoding.scheme.steps
    return torch.mul(x, 1.0 / encoding.scale).round_().clamp_(low, high).mul_(encoding.scale)
