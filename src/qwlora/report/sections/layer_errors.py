"""Which layers lost most, and where did the adapter help? Heat maps and a table.

Layers are a grid: a column for each block of the model, a row for each projection.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qwlora.report.drawing import Drawing, figure, is_narrow, shortened
from qwlora.report.number_format import (
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
MOST_KINDS = 60  # rows; those with the largest values
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
        """`layer 3, v_proj`."""
        return f"layer {self.block}, {self.kind.rpartition('.')[2]}"


def place_of(tensor: str) -> Place | None:
    """The place of a tensor or module; None if it is outside the blocks."""
    match = _BLOCK.match(tensor.removesuffix(".weight"))
    if match is None:
        return None
    kind = re.sub(r"\.\d+(?=\.|$)", ".*", match[3])  # experts: one row for all
    return Place(int(match[2]), kind)


class LayerGrid:
    """Values of tensors by place.

    Attributes:
        rows: kinds, in the order of the model.
        columns: the first block of each.
        cells: the largest value by (row, column), with its place.
        largest: the cell of the largest value.
        left_out: number of kinds that have no row, since there are too many.
    """

    def __init__(self, placed: Sequence[tuple[Place, float]]):
        last = max(place.block for place, _ in placed)
        self.columns = range(0, last + 1, -(-(last + 1) // MOST_COLUMNS))
        worst: dict[str, float] = {}
        for place, value in placed:
            worst[place.kind] = max(value, worst.get(place.kind, value))
        kept = set(sorted(worst, key=lambda kind: -worst[kind])[:MOST_KINDS])
        self.rows = [kind for kind in worst if kind in kept]
        self.left_out = len(worst) - len(self.rows)
        numbers = {kind: number for number, kind in enumerate(self.rows)}
        self.cells: dict[tuple[int, int], tuple[float, Place]] = {}
        for place, value in placed:
            if place.kind in kept:
                cell = (numbers[place.kind], place.block // self.columns.step)
                if cell not in self.cells or value > self.cells[cell][0]:
                    self.cells[cell] = (value, place)
        self.largest = max(self.cells, key=lambda cell: self.cells[cell][0])


@dataclass(frozen=True)
class LayerMeasure:
    """A number of each layer.

    Args:
        what: its definition.
        path: of the layers in the results.
        key: of the number in a layer's dict.
    """

    title: str
    what: str
    path: tuple[str, ...]
    key: str

    def values(self, job: Job) -> dict[str, float]:
        """The numbers by layer."""
        layers = job.section(*self.path).items()
        numbers = {name: finite(report.get(self.key)) for name, report in layers}
        return {name: number for name, number in numbers.items() if number is not None}


@section("layers", "Layers", QUESTION, position=40, of_job=True, of_adapter=True)
def view(job: Job, adapter: str) -> View | None:
    """What the template draws."""
    of_base = len(job.adapters) == 1 or not adapter
    schemes = {n: str(of.get("scheme")) for n, of in job.section("base", "layers").items()}
    # `int4 symmetric per block 32`
    matches = {name: re.match(r"u?int(\d+)", scheme) for name, scheme in schemes.items()}
    bits = {name: match[1] for name, match in matches.items() if match}
    widths = set(bits.values())
    rounding = f"{next(iter(widths))} bits" if len(widths) == 1 else "integers"
    measures = []
    if of_base:
        what = f"Share of the weights' energy lost by rounding to {rounding}."
        measures.append(LayerMeasure("Weight error", what, ("base", "layers"), "weight_error"))
        what = "Share of the layer's output lost, each input weighted by how much it matters."
        measures.append(LayerMeasure("Output error", what, ("base", "layers"), "error"))
    if adapter:
        what = "Size of the adapter's update relative to the frozen weight."
        measures.append(LayerMeasure("Adapter gain", what, ("train", adapter, "layers"), "gain"))
    values = {measure: numbers for measure in measures if (numbers := measure.values(job))}
    if not values:
        return None
    maps = [
        _map(LayerGrid(placed), measure, numbers, {} if len(widths) == 1 else bits)
        for measure, numbers in values.items()
        if (placed := [(p, number) for name, number in numbers.items() if (p := place_of(name))])
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
    grid: LayerGrid, measure: LayerMeasure, values: dict[str, float], bits: dict[str, str]
) -> dict[str, object]:
    """One heat map. `folded`: nothing stands out, so the map is folded into its sentence.

    Args:
        bits: of each layer, to print them into the cells; empty if all layers have the same.
    """
    numbers = sorted(value for value, _ in grid.cells.values())
    low, high, median = numbers[0], numbers[-1], numbers[len(numbers) // 2]
    name = grid.cells[grid.largest][1].name
    if high < EVEN * median:
        span = f"{percent(low)} and {percent(high)}"
        answer = f"All {count(len(values))} layers lie within {span}: nothing stands out."
    elif measure.key == "gain":
        answer = f"Training changed {name} most, by {percent(high)}."
    else:
        times = f"{significant(high / median, 2)} times the median" if median else ""
        answer = (
            f"{capitalized(name)} lost most: {percent(high)}, {times or 'the others lose nothing'}."
        )
    left_out = f" The {count(grid.left_out)} kinds of layers with the smallest values are left out."
    return {
        "title": measure.title,
        "what": measure.what + left_out * bool(grid.left_out),
        "answer": answer,
        "figure": figure(lambda width: _draw(grid, width, measure.title, low, high, bits)),
        "low": percent(low),
        "high": percent(high),
        "folded": high < EVEN * median,
    }


def _draw(
    grid: LayerGrid, width: int, title: str, low: float, high: float, bits: dict[str, str]
) -> Drawing:
    left, cell, columns = (48 if is_narrow(width) else 64), 17, len(grid.columns)
    step = (width - left) / columns
    square = step - 1 if step > 4 else step
    height = cell * len(grid.rows) + 22
    drawing = Drawing(
        width,
        height,
        f"{title} by layer and projection",
        f"{len(grid.cells)} cells: {columns} columns by {len(grid.rows)} projections. "
        f"Smallest {percent(low)}, largest {percent(high)} at "
        f"{grid.cells[grid.largest][1].name}. The table lists the largest.",
    )
    has_titles = not is_narrow(width) and grid.columns.step == 1 and len(grid.cells) <= MOST_TITLES
    digits = {place_of(name): number for name, number in bits.items()}
    for (row, column), (number, place) in grid.cells.items():
        x, y = left + column * step, row * cell
        shade = min(BINS - 1, int(BINS * (number - low) / ((high - low) or 1)))
        if has_titles:
            words = f"{capitalized(place.name)}: {title.lower()} {percent(number)}"
            drawing.rect(x, y, square, cell - 1, f"mark q{shade}", words)
        else:
            drawing.square(x, y, square, cell - 1, f"mark q{shade}")
        if place in digits and step >= 12:
            kind = "dg2" if shade >= 4 else "dg"
            drawing.text(x + square / 2, y + 12, digits[place], kind, "middle")
    for row, kind in enumerate(grid.rows):
        for column in range(columns):
            if (row, column) not in grid.cells and step > 4:
                words = "Stays float, or was not measured"
                drawing.rect(left + column * step, row * cell, square, cell - 1, "hatch", words)
        name = kind.rpartition(".")[2].removesuffix("_proj")
        drawing.text(left - 6, row * cell + 12, shortened(name, left - 6, 12), "ax", "end")
    row, column = grid.largest
    drawing.rect(left + column * step, row * cell, square, cell - 1, "worst")
    drawing.text(left - 6, height - 6, "layer", "ax", "end")
    tenths = max(1, round(columns / (6 if is_narrow(width) else 12) / 5) * 5)
    for column in range(0, columns, tenths if columns > 12 else 1):
        x = left + (column + 0.5) * step
        drawing.text(x, height - 6, str(grid.columns[column]), "ax", "middle")
    return drawing


def _table(values: dict[LayerMeasure, dict[str, float]], bits: dict[str, str] | None) -> Table:
    """The layers, by how far above the median they are in any column.

    Args:
        bits: of each layer; None without a column for them.
    """
    ranks: dict[str, float] = {}
    names: dict[tuple[str, str], str] = {}
    for measure, numbers in values.items():
        median = sorted(numbers.values())[len(numbers) // 2] or 1e-30
        for name, number in numbers.items():
            layer = name.removesuffix(".weight")
            names[measure.key, layer] = name
            ranks[layer] = max(number / median, ranks.get(layer, 0.0))
    layers = sorted(ranks, key=lambda layer: -ranks[layer])[:MOST_LAYERS]
    rows: list[dict[str, Cell]] = []
    for layer in layers:
        place = place_of(layer)
        row: dict[str, Cell] = {"Layer": capitalized(place.name) if place else layer}
        if bits is not None:
            row["Bits"] = bits.get(f"{layer}.weight", bits.get(layer, "float"))
        for measure, numbers in values.items():
            row[measure.title] = None
            if (name := names.get((measure.key, layer), "")) in numbers:
                path = (*measure.path, name, measure.key)
                row[measure.title] = tagged(precise_percent(numbers[name]), numbers[name], path)
        rows.append(row)
    return Table(
        "Layers, those furthest above the median of a column first. Select a heading to sort.",
        rows,
        sortable=True,
        most=12,
        left_out=len(ranks) - len(layers),
    )
