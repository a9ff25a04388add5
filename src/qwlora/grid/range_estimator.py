"""The names of the range estimators and their parameters. Free of torch; `estimate_ranges.py`
implements them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from qwlora.errors import CalibrationError

EstimatorName = Literal["min-max", "percentile", "squared-error", "sqnr"]
ESTIMATORS: tuple[str, ...] = get_args(EstimatorName)


@dataclass(frozen=True)
class RangeEstimator:
    """How the range of an activation is chosen from what an observer kept.

    min-max         the lowest and the highest value
    percentile      leaves (100 - percentile) % of the values outside at either end
    squared-error   the least sum of (x - x_hat)^2
    sqnr            the same, with clipped values counted three times
                    (AIMET's `post_training_tf_enhanced`)
    """

    name: str = "min-max"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.name not in ESTIMATORS:
            raise CalibrationError(f"observer {self.name!r} is not one of {', '.join(ESTIMATORS)}")
        if not 50 < self.percentile <= 100:
            raise CalibrationError(f"percentile {self.percentile} is not in (50, 100]")

    @property
    def needs_sample(self) -> bool:
        """Whether the estimator reads a sample of the values, not only their extremes."""
        return self.name != "min-max"

    @property
    def gamma(self) -> float:
        """Weight of the squared error of a clipped value."""
        return 3.0 if self.name == "sqnr" else 1.0


def as_estimator(observer: str | RangeEstimator) -> RangeEstimator:
    """An estimator by name, with its default parameters."""
    return RangeEstimator(observer) if isinstance(observer, str) else observer
