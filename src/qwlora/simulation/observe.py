"""What a quantizer remembers of the values that passed: the ends of every batch, exactly, the values far out, and a sample of the rest.

    ends      float32 [batches, 2], the lowest and the highest value of each batch
    tails     the lowest and the highest values: the ends of each batch's 64 rows that reach furthest
    sample    up to 16,384 values of all batches, each value having had the same chance

A sample alone misses the few values far out, and ranges are about those. A row is what lies along the last axis. The ends of all rows cost hardly more than
those of the batch, and beyond the 64th of them, few rows have more than one value. Where some reach more than twice as far, which may have many (the first
token of a language model), the furthest 8 are looked at whole. So the tails are as good as known, as far in as `bounds`.

A batch costs one pass for ends and tails, and a copy of at most 8,192 values: rows at equal distances, of every channel. Once the sample is full, half of it
goes, and from later batches half as much is taken; likewise before a batch that would give more, having come after smaller ones. So memory is constant but for
eight bytes a batch, and every estimator (`estimate.py`) works on one pass over the data, for any grid. Where all values fit, the sample is the data.

Merging is exact for ends and tails. Of two samples the one with more of its data is thinned to the density of the other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from qwlora.errors import CalibrationError

VALUES_A_BATCH = 2**13
VALUES = 2**14
ROWS_IN_TAIL, ROWS_LOOKED_AT, VALUES_IN_TAIL = 2**6, 2**3, 2**7  # of a batch
_FAR_OUT = 2.0
_MOST_IN_TAIL = 2**11
# Fractions that fill an interval evenly: where in a stride each batch's rows, and columns, begin.
_ROW_TURN, _COLUMN_TURN = 0.7548776662466927, 0.5698402909980532


class SampleObserver:
    """Ends, tails and sample of one activation.

    Args:
        sampled: whether to keep tails and a sample; the ends alone are enough for some estimators.
    """

    def __init__(self, sampled: bool):
        self.sampled = sampled
        self.batches = 0
        self.count = 0  # values that passed
        self.row_stride = self.column_stride = 0  # 0: not chosen yet
        self._ends = torch.empty(0, 2)
        self._sample: list[Tensor] = []
        self._sampled_values = 0
        self._tails: list[Tensor] = []  # [2, n]: the low one negated, so that both are the largest of something
        self._tail_values = 0
        self._bounds: Tensor | None = None

    @property
    def ends(self) -> Float[Tensor, "batches 2"]:
        """The lowest and the highest value of each batch, float32."""
        return self._ends[: self.batches]

    @property
    def low(self) -> Tensor | None:
        """The lowest value of all, [] float32; None without data."""
        return self.ends[:, 0].amin() if self.batches else None

    @property
    def high(self) -> Tensor | None:
        """The highest, likewise."""
        return self.ends[:, 1].amax() if self.batches else None

    @property
    def sample(self) -> Float[Tensor, " values"]:
        """The sampled values, float32."""
        if len(self._sample) != 1:
            self._sample = [torch.cat(self._sample) if self._sample else torch.empty(0, device=self._ends.device)]
        return self._sample[0]

    @property
    def tails(self) -> Float[Tensor, "2 values"]:
        """Values far out, float32: negated low ones, and high ones. Some may lie within `bounds`."""
        if len(self._tails) != 1:
            self._tails = [torch.cat(self._tails, 1) if self._tails else torch.empty(2, 0, device=self._ends.device)]
        return self._tails[0]

    @property
    def bounds(self) -> Float[Tensor, " 2"]:
        """How far in the tails are known: a negated low value, and a high one."""
        return torch.full((2,), -torch.inf, device=self._ends.device) if self._bounds is None else self._bounds

    @property
    def is_complete(self) -> bool:
        """Whether the sample is all of the data."""
        return self.sampled and self.row_stride * self.column_stride <= 1

    def update(self, x: Float[Tensor, "*shape"]) -> None:
        """Take in the values of `x`; a batch without values is none."""
        if not x.numel():
            return
        x = x.detach()
        if self.batches == len(self._ends):
            grown = torch.empty(max(8, 2 * self.batches), 2, device=x.device)
            grown[: self.batches] = self._ends
            self._ends = grown
        ends = self._ends[self.batches]
        self.batches += 1
        self.count += x.numel()
        if self.sampled:
            rows = x if x.ndim > 1 else x.reshape(-1, 1)
            ends[0], ends[1] = self._take_tails(rows, torch.stack([-rows.amin(-1), rows.amax(-1)]).flatten(1))
            self._take(rows)
        else:
            ends[0], ends[1] = x.amin(), x.amax()  # two passes, faster than torch.aminmax

    def merge(self, other: SampleObserver) -> None:
        """Take in what `other` saw, as if after this.

        Raises:
            CalibrationError: the other one kept no sample, and this one does.
        """
        if not other.batches:
            return
        if self.sampled and not other.sampled:
            raise CalibrationError("it was observed without a sample, which this observer needs; observe with the same observers on both sides")
        self._ends = torch.cat([self.ends.to(other.ends.device), other.ends])
        self.batches += other.batches
        self.count += other.count
        if self.sampled:
            self._merge_sample(other)

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything that is remembered, as tensors."""
        numbers = torch.tensor([self.count, self.row_stride, self.column_stride, int(self.sampled)])
        kept = {"ends": self.ends, "sample": self.sample, "tails": self.tails, "bounds": self.bounds}
        return {"numbers": numbers, **{name: tensor.clone().contiguous() for name, tensor in kept.items()}}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> SampleObserver:
        """Undo `to_tensors`."""
        count, row_stride, column_stride, sampled = tensors["numbers"].tolist()
        made = cls(bool(sampled))
        made._ends, made.batches, made.count = tensors["ends"], len(tensors["ends"]), count
        made.row_stride, made.column_stride, made._sample = row_stride, column_stride, [tensors["sample"]]
        made._tails, made._bounds = [tensors["tails"]], tensors["bounds"]
        made._sampled_values, made._tail_values = len(tensors["sample"]), tensors["tails"].shape[1]
        return made

    def to(self, device: torch.device) -> SampleObserver:
        """The same memory there: what comes by on that device can be added to it."""
        if self._ends.device == device:
            return self
        return self.from_tensors({name: tensor if name == "numbers" else tensor.to(device) for name, tensor in self.to_tensors().items()})

    def _take_tails(self, rows: Tensor, reach: Float[Tensor, "2 rows"]) -> tuple[Tensor, Tensor]:
        """Keep what lies furthest out, given how far each row reaches to either side; returns the lowest and the highest value."""
        furthest, where = reach.topk(max(1, min(ROWS_IN_TAIL, reach.shape[1] // 2)))  # of half of the rows at most, so that the bounds never cross
        bounds = furthest[:, -1]
        if any(far > _FAR_OUT * bound for far, bound in zip(furthest[:, 0].tolist(), bounds.tolist(), strict=True)):
            values = rows.reshape(-1, rows.shape[-1]).index_select(0, where[:, :ROWS_LOOKED_AT].flatten()).view(2, -1)
            values[0].neg_()
            if values.shape[1] > VALUES_IN_TAIL:
                values = values.topk(VALUES_IN_TAIL).values
                bounds = torch.maximum(bounds, values[:, -1])
            self._tails.append(torch.cat([values, furthest[:, ROWS_LOOKED_AT:]], 1).float())
        else:
            self._tails.append(furthest.float())
        self._tail_values += self._tails[-1].shape[1]
        self._bounds = bounds.float() if self._bounds is None else torch.maximum(self._bounds, bounds.float())
        self._shorten_tails()
        return -furthest[0, 0], furthest[1, 0]

    def _shorten_tails(self) -> None:
        if self._tail_values > _MOST_IN_TAIL:
            self._tail_values = _MOST_IN_TAIL // 2
            self._tails = [self.tails.topk(self._tail_values).values]
            self._bounds = torch.maximum(self.bounds, self.tails[:, -1])

    def _take(self, rows: Tensor) -> None:
        columns = rows.shape[-1]
        count = rows.numel() // columns
        if not self.row_stride:
            self.row_stride, self.column_stride = _strides(count, columns)
        while -(-count // self.row_stride) * -(-columns // self.column_stride) > VALUES_A_BATCH:
            self._halve(of_rows=self.row_stride < count)
        first_row, first_column = (int(self.batches * turn % 1 * stride) for turn, stride in ((_ROW_TURN, self.row_stride), (_COLUMN_TURN, self.column_stride)))
        taken = _every(rows, first_row, self.row_stride)[:, first_column :: self.column_stride]
        self._sample.append(taken.flatten().to(torch.float32, copy=True))
        self._sampled_values += len(self._sample[-1])
        while self._sampled_values > VALUES:  # a stride beyond what there is would skip whole batches
            self._halve(of_rows=self.column_stride >= columns or self.row_stride <= min(self.column_stride, count - 1))

    def _halve(self, of_rows: bool) -> None:
        self._thin(self._sampled_values // 2)
        if of_rows:
            self.row_stride *= 2
        else:
            self.column_stride *= 2

    def _thin(self, keep: int) -> None:
        sample = self.sample
        self._sample = [sample[_any_of(len(sample), keep).to(sample.device)]]
        self._sampled_values = keep

    def _merge_sample(self, other: SampleObserver) -> None:
        device = other.ends.device
        self._tails = [torch.cat([self.tails.to(device), other.tails], 1)]
        self._tail_values += other._tail_values
        self._bounds = torch.maximum(self.bounds.to(device), other.bounds)
        self._shorten_tails()
        if not self.row_stride:
            self.row_stride, self.column_stride = other.row_stride, other.column_stride
        ours, theirs = self.row_stride * self.column_stride, other.row_stride * other.column_stride
        added = other.sample
        if theirs < ours:
            added = added[_any_of(len(added), round(len(added) * theirs / ours)).to(added.device)]
        elif ours < theirs:
            self._thin(round(self._sampled_values * ours / theirs))
            self.row_stride, self.column_stride = other.row_stride, other.column_stride
        self._sample = [torch.cat([self.sample.to(added.device), added])]
        self._sampled_values += len(added)
        while self._sampled_values > VALUES:
            self._halve(of_rows=self.row_stride <= self.column_stride)


def _strides(rows: int, columns: int) -> tuple[int, int]:
    """Distances of sampled rows and columns that give no more than a batch may: all columns, while a row is not too much."""
    if columns <= VALUES_A_BATCH:
        return -(-rows // (VALUES_A_BATCH // columns)), 1
    return rows, -(-columns // VALUES_A_BATCH)


def _every(rows: Float[Tensor, "*axes columns"], first: int, stride: int) -> Float[Tensor, "some columns"]:
    """Rows at equal distances, of all axes but the last; copies no others, however `rows` lies in memory."""
    if rows.is_contiguous():
        return rows.view(-1, rows.shape[-1])[first::stride]
    count = rows.numel() // rows.shape[-1]
    return rows[torch.unravel_index(torch.arange(min(first, count), count, stride, device=rows.device), rows.shape[:-1])]


def _any_of(count: int, keep: int) -> Tensor:
    """Ascending indices of `keep` out of `count`, always the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))[:keep].sort().values
