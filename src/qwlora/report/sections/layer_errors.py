"""Which layers lost most, and where did the adapter help? Heat maps and a table.

Layers are a grid: a column for each block of the model, a row for each projection.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qwlora.report.drawing import Drawing, Scale, figure, is_narrow, shortened
from qwlora.report.number_format import (
    Format,
    Path,
    count,
    finite,
    percent,
    precise_percent,
    significant,
    tagged,
)
from qwlora.report.results_view import Job, capitalized
from qwlora.report.sections import Cell, Table, View, section

MOST_COLUMNS = 120  # above, a column is a group of blocks, and shows the worst of them
MOST_LAYERS = 1000  # in the table
MOST_TITLES = 2000  # above this, cells have no tooltip
BINS = 8
EVEN = 2.0  # a map whose largest value is less than this times its median is folded
QUESTION = "Which layers lost most, and where did the adapter help?"
_BLOCK = re.compile(r"^(.*?)\.?\b(\d{1,9})\.(.+)$")


class Place(NamedTuple):
    """Where a tensor is: its block, and its name within the block."""

    block: int
    kind: str

    @property
    def name(self) -> str:
        return f"layer {self.block}, {self.kind.rpartition('.')[2]}"


def place_of(tensor: str) -> Place | None:
    """The place of a tensor or module; None if it is outside the blocks."""
    match = _BLOCK.match(tensor.removesuffix(".weight"))
    if match is None:
        return None
    # Experts have one row for all.
    kind = re.sub(r"\.\d+(?=\.|$)", ".*", match[3])
    return Place(int(match[2]), kind)


class LayerGrid:
    """Values of tensors by place.

    Attributes:
        columns: the first block of each.
        cells: the largest value by (row, column), with its place.
        largest, worst: the cell of the largest value, and its place.
    """

    def __init__(self, placed: Sequence[tuple[Place, float]]):
        last = max(place.block for place, _ in placed)
        self.columns = range(0, last + 1, -(-(last + 1) // MOST_COLUMNS))
        self.rows = list(dict.fromkeys(place.kind for place, _ in placed))
        numbers = {kind: number for number, kind in enumerate(self.rows)}
        self.cells: dict[tuple[int, int], tuple[float, Place]] = {}
        for place, value in placed:
            cell = (numbers[place.kind], place.block // self.columns.step)
            if cell not in self.cells or value > self.cells[cell][0]:
                self.cells[cell] = (value, place)
        self.largest = max(self.cells, key=lambda cell: self.cells[cell][0])
        values = sorted(value for value, _ in self.cells.values())
        self.low, self.median, self.high = values[0], values[len(values) // 2], values[-1]
        self.worst = self.cells[self.largest][1]


class LayerMeasure(NamedTuple):
    """A number of each layer: its key in the results of a layer, its title and its definition."""

    key: str
    title: str
    what: str


MEASURES = (
    LayerMeasure("weight_error", "Weight error", "Share of the weights' energy lost by rounding."),
    LayerMeasure(
        "error",
        "Output error",
        "Share of the layer's output lost, each input weighted by how much it matters.",
    ),
    LayerMeasure(
        "gain", "Adapter gain", "Size of the adapter's update relative to the frozen weight."
    ),
)
Values = dict[str, tuple[float, Path]]  # by layer: a number, and its place in the results


@section("layers", "Layers", QUESTION, position=70, of_job=True, of_adapter=True)
def view(job: Job, adapter: str) -> View | None:
    """What the template draws."""
    of_base, bits = len(job.adapters) == 1 or not adapter, dict[str, str]()
    for name, layer in job.section("base", "layers").items():
        # Such as `int4 symmetric per block of 32`.
        if match := re.match(r"u?int(\d+)", str(layer.get("scheme"))):
            bits[name.removesuffix(".weight")] = match[1]
    values: dict[LayerMeasure, Values] = {}
    for measure in MEASURES:
        path = ("train", adapter, "layers") if measure.key == "gain" else ("base", "layers")
        numbers: Values = {
            name.removesuffix(".weight"): (number, (*path, name, measure.key))
            for name, layer in job.section(*path).items()
            if (number := finite(layer.get(measure.key))) is not None
        }
        if numbers and (adapter if measure.key == "gain" else of_base):
            values[measure] = numbers
    if not values:
        return None
    maps = [
        _map(LayerGrid(placed), measure, len(numbers), bits if len(set(bits.values())) > 1 else {})
        for measure, numbers in values.items()
        if (placed := [(p, n) for layer, (n, _) in numbers.items() if (p := place_of(layer))])
    ]
    measured, missing = {measure.key for measure in values}, ""
    if of_base and job.section("base", "layers"):
        missing = next((k for k in ("weight_error", "error") if k not in measured), "")
    of_one = "Which layers lost most?" if of_base else "Where did the adapter help?"
    return {
        "maps": maps,
        "table": _table(values, bits if of_base else None),
        "missing": missing,
        "solver": str(job.setting("base", "solver") or "chosen"),
        "question": "" if of_base and adapter else of_one,
    }


def _map(
    grid: LayerGrid, measure: LayerMeasure, layers: int, bits: dict[str, str]
) -> dict[str, object]:
    low, high, median, name = grid.low, grid.high, grid.median, grid.worst.name
    if high < EVEN * median:
        span = f"{percent(low)} and {percent(high)}"
        answer = f"All {count(layers)} layers lie within {span}: nothing stands out."
    elif measure.key == "gain":
        answer = f"Training changed {name} most, by {percent(high)}."
    else:
        times = f"{significant(high / median, 2)} times the median" if median else ""
        answer = (
            f"{capitalized(name)} lost most: {percent(high)}, {times or 'the others lose nothing'}."
        )
    title = f"{measure.title} by layer and projection"
    places = {place: number for n, number in bits.items() if (place := place_of(n)) is not None}
    return {
        "title": measure.title,
        "what": measure.what,
        "answer": answer,
        "figure": figure(lambda width: heat_map(grid, width, title, percent, places)),
        "low": percent(low),
        "high": percent(high),
        "folded": high < EVEN * median,
    }


def heat_map(
    grid: LayerGrid,
    width: int,
    title: str,
    written: Format,
    bits: Mapping[Place, str],
    logarithmic: bool = False,
) -> Drawing:
    """A cell for each place, with its bits. Larger values have more contrast; an outline marks the
    largest."""
    narrow, cell, columns = is_narrow(width), 17, len(grid.columns)
    names = [kind.rpartition(".")[2].removesuffix("_proj") for kind in grid.rows]
    left = min(max(64, 6 * max(map(len, names)) + 8), 104)
    left = 48 if narrow and left == 64 else left
    step = (width - left) / columns
    square = step - 1 if step > 4 else step
    height = cell * len(names) + 22
    drawing = Drawing(
        width,
        height,
        title,
        f"{len(grid.cells)} cells: {columns} columns by {len(names)} rows. Smallest "
        f"{written(grid.low)}, largest {written(grid.high)} at {grid.worst.name}.",
    )
    # One value near zero would take most of a logarithmic scale, so it begins at a ten thousandth
    # of its end.
    low = max(grid.low, 1e-4 * grid.high) or 1.0 if logarithmic else grid.low
    shade = Scale(low, max(low, grid.high), 0, BINS, logarithmic)
    has_titles = not narrow and grid.columns.step == 1 and len(grid.cells) <= MOST_TITLES
    for (row, column), (number, place) in grid.cells.items():
        x, y, dark = left + column * step, row * cell, min(BINS - 1, int(shade(number)))
        if has_titles:
            words = f"{capitalized(place.name)}: {written(number)}"
            drawing.rect(x, y, square, cell - 1, f"mark q{dark}", words)
        else:
            drawing.square(x, y, square, cell - 1, f"mark q{dark}")
        if place in bits and step >= 12:
            kind = "dg2" if dark >= 4 else "dg"
            drawing.text(x + square / 2, y + 12, bits[place], kind, "middle")
    for row, name in enumerate(names):
        for column in range(columns):
            if (row, column) not in grid.cells and step > 4:
                words = "Stays float, or was not measured"
                drawing.rect(left + column * step, row * cell, square, cell - 1, "hatch", words)
        drawing.text(left - 6, row * cell + 12, shortened(name, left - 6, 12), "ax", "end")
    row, column = grid.largest
    drawing.rect(left + column * step, row * cell, square, cell - 1, "worst")
    drawing.text(left - 6, height - 6, "layer", "ax", "end")
    tenths = max(1, round(columns / (6 if narrow else 12) / 5) * 5)
    for column in range(0, columns, tenths if columns > 12 else 1):
        x = left + (column + 0.5) * step
        drawing.text(x, height - 6, str(grid.columns[column]), "ax", "middle")
    return drawing


def _table(values: dict[LayerMeasure, Values], bits: dict[str, str] | None) -> Table:
    # An error and a gain cannot be compared, so the rank of a layer is how far it is above the
    # median of a column.
    ranks: dict[str, float] = {}
    for numbers in values.values():
        median = sorted(number for number, _ in numbers.values())[len(numbers) // 2] or 1e-30
        for layer, (number, _) in numbers.items():
            ranks[layer] = max(number / median, ranks.get(layer, 0.0))
    layers = sorted(ranks, key=lambda layer: -ranks[layer])[:MOST_LAYERS]
    rows: list[dict[str, Cell]] = []
    for layer in layers:
        place = place_of(layer)
        row: dict[str, Cell] = {"Layer": capitalized(place.name) if place else layer}
        if bits is not None:
            row["Bits"] = bits.get(layer, "float")
        for measure, numbers in values.items():
            row[measure.title] = None
            if layer in numbers:
                number, path = numbers[layer]
                row[measure.title] = tagged(precise_percent(number), number, path)
        rows.append(row)
    return Table(
        "Layers, those furthest above the median of a column first. Select a heading to sort.",
        rows,
        sortable=True,
        most=12,
        left_out=len(ranks) - len(layers),
    )
