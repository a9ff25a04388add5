"""The modules that stand behind quantized values in the simulated graph."""

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
    """What a quantizer does with a value that passes."""

    FLOAT = "float"
    OBSERVE = "observe"
    SIMULATE = "simulate"
    RECIPROCAL = "reciprocal"  # simulate, multiplying by 1 / scale: the arithmetic's noise floor (see `Simulation.perturbed_logits`)


class Quantizer(nn.Module):
    """Observes an activation while calibrating and fake-quantizes it afterwards.

    What was observed stays: another `scheme` takes effect with the next freeze, without data.

    Args:
        name: of the encoding.
        scheme: one scale for the tensor.
        estimator: how the range is chosen from what was observed.
        minimum, maximum: fixed ends of the range; None takes what the estimator says.
        in_place: whether nobody but this quantizer reads what it is given, so that it may write into it.

    Raises:
        CalibrationError: the scheme has several scales.
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
        self.fixed = False  # whether the encoding came from elsewhere, so that it is not calibrated
        self.seen: Tensor | None = None
        self.keep = False
        self.scheme = scheme

    @property
    def scheme(self) -> Scheme:
        """The grid that is asked for. Setting another one forgets the encoding, not what was observed."""
        return self._scheme

    @scheme.setter
    def scheme(self, scheme: Scheme) -> None:
        if not isinstance(scheme.granularity, PerTensor) or scheme.float_offset:
            raise CalibrationError(
                f"{self.name}: an activation has one scale and an integer offset, not {scheme}"
            )
        self._scheme, self.encoding = scheme, None

    @property
    def is_pinned(self) -> bool:
        """Whether both ends of the range are fixed, so that no data is needed."""
        return self.minimum is not None and self.maximum is not None

    def forward(self, x: Tensor) -> Tensor:
        match self.mode:
            case Mode.OBSERVE:
                self.observer.update(x)
            case Mode.SIMULATE:
                x = self._simulate(x, self._known_encoding())
            case Mode.RECIPROCAL:
                x = _by_reciprocal(x, self._known_encoding())
        if self.keep:
            self.seen = x.clone()  # the model may go on in place
        return x

    def _simulate(self, x: Tensor, encoding: Encoding) -> Tensor:
        """`fake_quantize`; in place where nobody sees it and no gradient is asked for."""
        wants_gradient = torch.is_grad_enabled() and (
            x.requires_grad or encoding.scale.requires_grad
        )
        return (
            encoding.fake_quantize_(x)
            if self.in_place and not wants_gradient
            else encoding.fake_quantize(x)
        )

    def _known_encoding(self) -> Encoding:
        if self.encoding is None:
            raise CalibrationError(
                f"{self.name} has no encoding; call freeze, after observe if nothing was observed yet"
            )
        return self.encoding

    @property
    def is_mask(self) -> bool:
        """Whether values came by that only a mask holds, at an end of the range that is not fixed."""
        ends = ((self.observer.low, self.minimum), (self.observer.high, self.maximum))
        return any(
            seen is not None and fixed is None and abs(float(seen)) > MASK_MAGNITUDE
            for seen, fixed in ends
        )

    @property
    def is_infinite(self) -> bool:
        """Whether an infinity came by."""
        return any(
            seen is not None and bool(seen.isinf())
            for seen in (self.observer.low, self.observer.high)
        )

    @property
    def is_constant(self) -> bool:
        """Whether all values that came by were one."""
        low, high = self.observer.low, self.observer.high
        return low is not None and high is not None and bool(low == high)

    def extra_repr(self) -> str:
        return f"{self.name}, {self.scheme}, {self.mode}"


class FrozenWeight(nn.Module):
    """A weight on its grid, computed once: it no longer moves, and doing it anew in each forward costs more than the layer.

    Attributes:
        mode: FLOAT hands the weight through as it is.
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
    """`fake_quantize` of a per-tensor encoding with `x * (1 / scale)` in place of `x / scale`."""
    low, high = encoding.offset, encoding.offset + encoding.scheme.steps
    return torch.mul(x, 1.0 / encoding.scale).round_().clamp_(low, high).mul_(encoding.scale)
