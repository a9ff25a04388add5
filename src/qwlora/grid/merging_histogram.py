"""A histogram that streams and merges without a remainder: two halves of the data give, count for count, what the whole gives.

The bin of a value is `trunc(x / w)` with a width that is a power of two, `w = 2^e / half`, and `e` the smallest exponent with `|x| < 2^e` for all that was
seen. When a larger value arrives, `w` doubles as often as needed and bins fall together in pairs. That loses nothing, because dividing by a power of two is
exact and `trunc(trunc(x) / 2) = trunc(x / 2)`; so the counts depend on the data alone, not on their order or division.

Truncation gives bin 0 both sides of zero: its centre is zero itself, and exact zeros (after ReLU, in padding) are counted where they are. The width is at most
`2 / half` of the largest magnitude: 1 / 16384 where there are few groups (512 kB each), 1 / 2048 where there are many (64 kB each).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_HALF_OF_FEW, _HALF_OF_MANY = 2**15, 2**12  # bins on either side of zero, bin 0 counted on both
_FEW_GROUPS = 16
_VALUES_AT_ONCE = 2**18  # what a processor's cache holds, with its bins
_BINS_AT_ONCE = 2**20
_SMALLEST_EXPONENT = -100  # keeps half / 2^e inside float32


def half_of(groups: int) -> int:
    """Bins on either side of zero for this many groups."""
    return _HALF_OF_FEW if groups <= _FEW_GROUPS else _HALF_OF_MANY


class Histogram:
    """Counts of values, for a number of groups at once.

    Attributes:
        half: bins on either side of zero, bin 0 being counted on both.
        counts: int64 [groups, 2 half - 1]; column `i` counts bin `i - (half - 1)`.
        exponent: int32 [groups], the `e` above.
    """

    def __init__(self, groups: int, device: torch.device):
        self.half = half_of(groups)
        self.counts: Int64[Tensor, "groups bins"] = torch.zeros(
            groups, 2 * self.half - 1, dtype=torch.int64, device=device
        )
        self.exponent = torch.full((groups,), _SMALLEST_EXPONENT, dtype=torch.int32, device=device)

    def update(
        self, x: Float[Tensor, "groups values"], magnitude: Float[Tensor, " groups"]
    ) -> None:
        """Count finite values whose largest magnitude in each group is `magnitude`."""
        _, exponent = torch.frexp(magnitude)
        self._widen(
            torch.where(magnitude > 0, exponent, _SMALLEST_EXPONENT)
        )  # zero has no exponent, but frexp says 0
        rows = max(
            1, min(_VALUES_AT_ONCE // max(1, x.shape[1]), _BINS_AT_ONCE // self.counts.shape[1])
        )
        for part, per_width, counts in zip(
            x.split(rows), self._per_width().split(rows), self.counts.split(rows), strict=True
        ):
            first = torch.arange(len(part), dtype=torch.int32, device=x.device).unsqueeze(
                1
            ) * counts.shape[1] + (self.half - 1)
            for piece in part.split(_VALUES_AT_ONCE, dim=1):
                bins = (piece * per_width.unsqueeze(1)).to(first.dtype).add_(first)
                counts += torch.bincount(bins.flatten(), minlength=counts.numel()).view(
                    counts.shape
                )

    def merge(self, other: Histogram) -> None:
        """Count what `other` counted."""
        widened = Histogram(len(other.counts), other.counts.device)
        widened.counts, widened.exponent = other.counts, other.exponent
        widened._widen(self.exponent)
        self._widen(other.exponent)
        self.counts += widened.counts

    def centres(self) -> Float[Tensor, "groups bins"]:
        """The middle of each bin, float64."""
        bins = self._bins().double()
        return bins.add(bins.sign(), alpha=0.5) / self._per_width().double().unsqueeze(1)

    def widths(self) -> Float[Tensor, " groups"]:
        """The width of each group's bins; bin 0 is twice as wide."""
        return 1 / self._per_width()

    def edges(
        self, columns: Int64[Tensor, " groups"]
    ) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]:
        """(lower, upper) edge of one column for each group."""
        place = columns - (self.half - 1)
        lower, upper = place - (place <= 0).long(), place + (place >= 0).long()
        return lower / self._per_width(), upper / self._per_width()

    def _bins(self) -> Int64[Tensor, " bins"]:
        return torch.arange(1 - self.half, self.half, device=self.counts.device)

    def _per_width(self) -> Float[Tensor, " groups"]:
        return torch.ldexp(
            torch.full(self.exponent.shape, float(self.half), device=self.exponent.device),
            -self.exponent,
        )

    def _widen(self, exponent: Tensor) -> None:
        """Let bins fall together until no exponent is smaller than `exponent`."""
        wanted = torch.maximum(self.exponent, exponent.to(torch.int32))
        if torch.equal(wanted, self.exponent):
            return
        doublings = (wanted - self.exponent).clamp(max=30).unsqueeze(1)
        merged = torch.div(
            self._bins().unsqueeze(0), 2 ** doublings.long(), rounding_mode="trunc"
        ) + (self.half - 1)
        self.counts = torch.zeros_like(self.counts).scatter_add_(1, merged, self.counts)
        self.exponent = wanted
