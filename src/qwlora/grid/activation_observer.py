"""What is kept of an activation during calibration: exact ends, the values far out, and a sample.

    ends      float32 [batches, 2]: lowest and highest value of each batch
    tails     lowest and highest values: the ends of the 64 rows of each batch that reach furthest
    sample    up to 12,288 values of all batches, each with the same probability

A sample alone misses the few values far out, and ranges depend on those. A row is the last axis.
The ends of all rows cost hardly more than those of the batch, and rows after the 64th rarely hold
more than one value this large. Where some rows reach more than twice as far and may have many such
values (the first token of a language model), the furthest 8 rows are kept whole. Between `bounds`
and the ends, no value is missing.

A batch costs one pass for ends and tails, and a copy of at most 4,096 values: rows at equal
distances, with all channels if they fit. When the sample is full, half of it is dropped and half as
much is taken from later batches; the same happens before a batch that would contribute more than
smaller ones before it. So memory is constant, except for the ends of each batch, and every
estimator (`estimate_ranges.py`) works on one pass over the data, for any grid. If all values fit,
the sample is the data.

Merging is exact for ends and tails. The denser of two samples is thinned to the density of the
other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from qwlora.errors import CalibrationError

VALUES_A_BATCH = 2**12
VALUES = 3 * VALUES_A_BATCH
ROWS_IN_TAIL, ROWS_LOOKED_AT, VALUES_IN_TAIL = 2**6, 2**3, 2**7  # of a batch
_FAR_OUT = 2.0
_MOST_IN_TAIL = 2**11
# Multiples of these mod 1 fill an interval evenly: where in a stride each batch begins.
_ROW_TURN, _COLUMN_TURN = 0.7548776662466927, 0.5698402909980532


class SampleObserver:
    """Ends, tails and sample of one activation.

    Args:
        sampled: whether to keep tails and sample; min-max needs only the ends.
    """

    def __init__(self, sampled: bool):
        self.sampled = sampled
        self.batches = 0
        self.count = 0  # values that passed
        self.row_stride = self.column_stride = 0  # 0: not chosen yet
        # low ends and tails are negated, so that both sides are the largest of something
        self._ends: list[Tensor] = []  # of each batch, [2]
        self._tails: list[Tensor] = []  # [2, values]
        self._sample: list[Tensor] = []
        self._tail_count = self._sample_count = 0
        self._bounds = (-math.inf, -math.inf)

    @property
    def ends(self) -> Float[Tensor, "batches 2"]:
        """The lowest and the highest value of each batch, float32."""
        if not self._ends:
            return torch.empty(0, 2)
        low, high = torch.stack(self._ends, 1)
        return torch.stack([-low, high], 1)

    @property
    def low(self) -> Tensor | None:
        """The lowest value of all, [] float32; None without data."""
        return self.ends[:, 0].amin() if self.batches else None

    @property
    def high(self) -> Tensor | None:
        """The highest value of all, [] float32; None without data."""
        return self.ends[:, 1].amax() if self.batches else None

    @property
    def sample(self) -> Float[Tensor, " values"]:
        """The sampled values, float32."""
        return torch.cat(self._sample) if self._sample else torch.empty(0)

    @property
    def tails(self) -> Float[Tensor, "2 values"]:
        """float32: negated low values, and high values far out. Some may be inside `bounds`."""
        return torch.cat(self._tails, 1) if self._tails else torch.empty(2, 0)

    @property
    def bounds(self) -> Float[Tensor, " 2"]:
        """How far in the tails are complete: a negated low value, and a high value."""
        return torch.tensor(self._bounds)

    @property
    def is_complete(self) -> bool:
        """Whether the sample is all of the data."""
        return self.sampled and self.row_stride * self.column_stride <= 1

    def update(self, x: Float[Tensor, "*shape"]) -> None:
        """Observe the values of `x`; an empty tensor is not a batch."""
        if not x.numel():
            return
        if x.requires_grad:
            x = x.detach()
        if self.sampled:
            rows = x  # along the last axis, with a single axis of rows where that needs no copy
            if x.ndim < 2 or x.is_contiguous():
                rows = x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1)
            ends = self._take_tails(rows, torch.stack([-rows.amin(-1), rows.amax(-1)]).flatten(1))
        else:
            ends = torch.stack([-x.amin(), x.amax()])  # two passes, faster than torch.aminmax
        self._ends.append(ends.to(torch.float32, copy=True))
        self.batches += 1
        self.count += x.numel()
        if self.sampled:
            self._take(rows)

    def merge(self, other: SampleObserver) -> None:
        """Add what `other` observed."""
        if not other.batches:
            return
        if self.sampled and not other.sampled:
            raise CalibrationError(
                "it was observed without a sample, which this observer needs; observe with the "
                "same observers on both sides"
            )
        vars(self).update(vars(self.to(other._ends[0].device)))
        self._ends += other._ends
        self.batches += other.batches
        self.count += other.count
        if not self.sampled:
            return
        self._add_tails(other.tails, other._bounds)
        if not self.row_stride:
            self.row_stride, self.column_stride = other.row_stride, other.column_stride
        ours, theirs = self.row_stride * self.column_stride, other.row_stride * other.column_stride
        added = other.sample
        if theirs < ours:
            added = added[_any_of(len(added), round(len(added) * theirs / ours)).to(added.device)]
        elif ours < theirs:
            self._thin(round(self._sample_count * ours / theirs))
            self.row_stride, self.column_stride = other.row_stride, other.column_stride
        self._add_to_sample(added)
        while self._sample_count > VALUES:
            self._halve(of_rows=self.row_stride <= self.column_stride)

    def to(self, device: torch.device) -> SampleObserver:
        """A copy of the observer on `device`."""
        moved = copy.copy(self)
        moved._ends, moved._tails, moved._sample = (
            [tensor.to(device) for tensor in tensors]
            for tensors in (self._ends, self._tails, self._sample)
        )
        return moved

    def _take_tails(self, rows: Tensor, reach: Float[Tensor, "2 rows"]) -> Float[Tensor, " 2"]:
        """Keep the values furthest out, given how far each row reaches on either side; returns how
        far all rows reach."""
        # of half of the rows at most, so that the bounds never cross
        furthest, where = reach.topk(max(1, min(ROWS_IN_TAIL, reach.shape[1] // 2)))
        lows, highs = furthest.tolist()
        tails, bounds = furthest, (lows[-1], highs[-1])
        if lows[0] > _FAR_OUT * lows[-1] or highs[0] > _FAR_OUT * highs[-1]:
            looked_at = where[:, :ROWS_LOOKED_AT].flatten()
            values = rows.reshape(-1, rows.shape[-1]).index_select(0, looked_at).view(2, -1)
            values[0].neg_()
            if values.shape[1] > VALUES_IN_TAIL:
                values = values.topk(VALUES_IN_TAIL).values
                bounds = _further(bounds, values[:, -1].tolist())
            tails = torch.cat([values, furthest[:, ROWS_LOOKED_AT:]], 1)
        self._add_tails(tails, bounds)
        return furthest[:, 0]

    def _add_tails(self, tails: Float[Tensor, "2 values"], bounds: Sequence[float]) -> None:
        self._tails.append(tails.float())
        self._tail_count += tails.shape[1]
        self._bounds = _further(self._bounds, bounds)
        if self._tail_count > _MOST_IN_TAIL:
            kept = self.tails.topk(_MOST_IN_TAIL // 2).values
            self._tails, self._tail_count = [kept], kept.shape[1]
            self._bounds = _further(self._bounds, kept[:, -1].tolist())

    def _take(self, rows: Tensor) -> None:
        columns = rows.shape[-1]
        count = rows.numel() // columns
        if not self.row_stride:  # all columns if a row is within a batch's limit
            self.row_stride, self.column_stride = count, -(-columns // VALUES_A_BATCH)
            if columns <= VALUES_A_BATCH:
                self.row_stride, self.column_stride = -(-count // (VALUES_A_BATCH // columns)), 1
        while -(-count // self.row_stride) * -(-columns // self.column_stride) > VALUES_A_BATCH:
            self._halve(of_rows=self.row_stride < count)
        first = int(self.batches * _ROW_TURN % 1 * self.row_stride)
        taken = _every(rows, first, self.row_stride)
        if self.column_stride > 1:
            first = int(self.batches * _COLUMN_TURN % 1 * self.column_stride)
            taken = taken[:, first :: self.column_stride]
        self._add_to_sample(taken)
        while self._sample_count > VALUES:  # a stride beyond the axis would skip whole batches
            self._halve(
                of_rows=self.column_stride >= columns
                or self.row_stride <= min(self.column_stride, count - 1)
            )

    def _add_to_sample(self, values: Tensor) -> None:
        self._sample.append(values.to(torch.float32, copy=True).flatten())
        self._sample_count += values.numel()

    def _halve(self, of_rows: bool) -> None:
        self._thin(self._sample_count // 2)
        if of_rows:
            self.row_stride *= 2
        else:
            self.column_stride *= 2

    def _thin(self, keep: int) -> None:
        sample = self.sample
        self._sample = [sample[_any_of(self._sample_count, keep).to(sample.device)]]
        self._sample_count = keep


def _further(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    return max(a[0], b[0]), max(a[1], b[1])


def _every(rows: Float[Tensor, "*axes columns"], first: int, stride: int) -> Tensor:
    """Rows [some, columns] at equal distances over all axes but the last; copies only those."""
    if rows.ndim == 2:
        return rows[first::stride]
    count = rows.numel() // rows.shape[-1]
    chosen = torch.arange(min(first, count), count, stride, device=rows.device)
    return rows[torch.unravel_index(chosen, rows.shape[:-1])]


@lru_cache(maxsize=16)  # activations have few sizes, and drawing takes longer than a small layer
def _any_of(count: int, keep: int) -> Tensor:
    """Ascending indices of `keep` out of `count`; always the same."""
    generator = torch.Generator().manual_seed(count)
    return torch.randperm(count, generator=generator)[:keep].sort().values
