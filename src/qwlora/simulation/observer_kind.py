"""How a range is chosen from what was observed, as data; free of torch. `estimate.py` does it."""

from __future__ import annotations

from dataclasses import dataclass

from qwlora.errors import CalibrationError

OBSERVERS = ("min-max", "percentile", "squared-error", "sqnr", "moving-average")


@dataclass(frozen=True)
class Estimator:
    """One of the grid's observers, with its number.

        min-max         the lowest and the highest value
        percentile      leaves (100 - percentile) % of the values outside on either side
        squared-error   the least sum of (x - x_hat)^2
        sqnr            the same, clipped values weighing three times (AIMET's `post_training_tf_enhanced`)
        moving-average  the average of each batch's ends, a batch weighing `1 - momentum` times what the next one weighs

    Raises:
        CalibrationError: the name is none of these, or a number is out of its range.
    """

    name: str = "min-max"
    percentile: float = 99.99
    momentum: float = 0.01

    def __post_init__(self) -> None:
        if self.name not in OBSERVERS:
            raise CalibrationError(f"observer {self.name!r} is not one of {', '.join(OBSERVERS)}")
        if not 50 < self.percentile <= 100:
            raise CalibrationError(f"percentile {self.percentile} is not in (50, 100]")
        if not 0 < self.momentum <= 1:
            raise CalibrationError(f"momentum {self.momentum} is not in (0, 1]")

    @property
    def needs_sample(self) -> bool:
        """Whether the ends of each batch are not enough."""
        return self.name not in ("min-max", "moving-average")

    @property
    def gamma(self) -> float:
        """What a clipped value's squared error weighs."""
        return 3.0 if self.name == "sqnr" else 1.0


def as_estimator(observer: str | Estimator) -> Estimator:
    """An estimator by its name, with its usual numbers."""
    return Estimator(observer) if isinstance(observer, str) else observer
