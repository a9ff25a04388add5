"""Names of layers as a grid: a column for each block of the model, a row for each projection."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MOST_COLUMNS = 120  # above, a column is a group of blocks, and shows the worst of them
MOST_KINDS = 60  # rows; those with the largest values
_BLOCK = re.compile(r"^(.*?)\.?\b(\d{1,9})\.(.+)$")


@dataclass(frozen=True)
class Place:
    """Where a tensor is: its block, and its name within the block."""

    block: int
    kind: str

    @property
    def name(self) -> str:
        """`layer 3, v_proj`."""
        return f"layer {self.block}, {self.kind.rpartition('.')[2]}"


def place_of(tensor: str) -> Place | None:
    """The place of a tensor or module; None if it is outside the blocks."""
    match = _BLOCK.match(tensor.removesuffix(".weight"))
    if match is None:
        return None
    kind = re.sub(r"\.\d+(?=\.|$)", ".*", match[3])  # experts: one row for all
    return Place(int(match[2]), kind)


def blocks_per_column(last: int) -> int:
    """How many blocks share a column, if `last` is the last block."""
    return -(-(last + 1) // MOST_COLUMNS)


@dataclass(frozen=True)
class LayerGrid:
    """Values by place.

    Args:
        rows: kinds, in the order of the model.
        columns: the first block of each.
        cells: the largest value by (row, column), with its place.
        left_out: number of kinds that have no row, since there are too many.
    """

    rows: tuple[str, ...]
    columns: range
    cells: Mapping[tuple[int, int], tuple[float, Place]]
    left_out: int

    @property
    def largest(self) -> tuple[int, int]:
        """The cell of the largest value."""
        return max(self.cells, key=lambda cell: self.cells[cell][0])


def grid_of(values: Mapping[str, float]) -> LayerGrid | None:
    """Arrange values of tensors; None if none is in a block."""
    placed = [(place, value) for name, value in values.items() if (place := place_of(name))]
    if not placed:
        return None
    last = max(place.block for place, _ in placed)
    group = blocks_per_column(last)
    worst: dict[str, float] = {}
    for place, value in placed:
        worst[place.kind] = max(value, worst.get(place.kind, value))
    kept = set(sorted(worst, key=lambda kind: -worst[kind])[:MOST_KINDS])
    rows = {kind: number for number, kind in enumerate(k for k in worst if k in kept)}
    cells: dict[tuple[int, int], tuple[float, Place]] = {}
    for place, value in placed:
        if place.kind in rows:
            cell = (rows[place.kind], place.block // group)
            if cell not in cells or value > cells[cell][0]:
                cells[cell] = (value, place)
    return LayerGrid(tuple(rows), range(0, last + 1, group), cells, len(worst) - len(rows))
