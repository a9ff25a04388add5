"""Which layers lost most, and where did the adapter help? Heat maps and a table."""

from __future__ import annotations

import re
from dataclasses import dataclass

from markupsafe import Markup

from qwlora.report.drawing import Drawing, figure, shortened
from qwlora.report.layer_grid import LayerGrid, grid_of, place_of
from qwlora.report.number_format import (
    NOT_MEASURED,
    count,
    finite,
    percent,
    precise_percent,
    significant,
    tagged,
)
from qwlora.report.report_section import MOST_SENT, Cell, Table, View, section
from qwlora.report.results_view import Job, capitalized, code

BINS = 8
MOST_TITLES = 2000  # above this, cells have no tooltip
EVEN = 2.0  # a map whose largest value is less than this times its median is folded
QUESTION = "Which layers lost most, and where did the adapter help?"


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

    @property
    def is_of_adapter(self) -> bool:
        return self.path[0] == "train"


@section("layers", "Layers", QUESTION, position=40, of_job=True, of_adapter=True)
def view(job: Job, adapter: str) -> View | None:
    """What the template draws."""
    of_base = len(job.adapters) == 1 or not adapter
    bits = _bits(job)
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
    maps = [
        _map(grid, measure, numbers, {} if len(widths) == 1 else bits)
        for measure, numbers in values.items()
        if (grid := grid_of(numbers)) is not None
    ]
    if not values:
        return None
    has_layers = of_base and bool(job.section("base", "layers"))
    of_one = "Which layers lost most?" if of_base else "Where did the adapter help?"
    return {
        "maps": maps,
        "table": _table(values, bits if of_base else None),
        "missing": _missing(job, {measure.key for measure in values}) if has_layers else "",
        "question": QUESTION if of_base and adapter else of_one,
    }


def _bits(job: Job) -> dict[str, int]:
    """Bitwidth of each packed tensor, from its scheme (`int4 symmetric per block 32`)."""
    schemes = {
        n: str(layer.get("scheme", "")) for n, layer in job.section("base", "layers").items()
    }
    matches = {name: re.match(r"u?int(\d+)", scheme) for name, scheme in schemes.items()}
    return {name: int(match[1]) for name, match in matches.items() if match}


def _map(
    grid: LayerGrid, measure: LayerMeasure, values: dict[str, float], bits: dict[str, int]
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
    elif measure.is_of_adapter:
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
    grid: LayerGrid, width: int, title: str, low: float, high: float, bits: dict[str, int]
) -> Drawing:
    left, cell, columns = (64 if width > 500 else 48), 17, len(grid.columns)
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
    has_titles = width > 500 and grid.columns.step == 1 and len(grid.cells) <= MOST_TITLES
    digits = {place_of(name): str(number) for name, number in bits.items()}
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
    tenths = max(1, round(columns / (6 if drawing.is_narrow else 12) / 5) * 5)
    for column in range(0, columns, tenths if columns > 12 else 1):
        x = left + (column + 0.5) * step
        drawing.text(x, height - 6, str(grid.columns[column]), "ax", "middle")
    return drawing


def _table(values: dict[LayerMeasure, dict[str, float]], bits: dict[str, int] | None) -> Table:
    """The layers, by how far above the median they are in any column.

    Args:
        bits: of each layer; None without a column for them.
    """
    columns = {
        measure: {name.removesuffix(".weight"): (name, number) for name, number in numbers.items()}
        for measure, numbers in values.items()
    }
    ranks: dict[str, float] = {}
    for cells, numbers in zip(columns.values(), values.values(), strict=True):
        median = sorted(numbers.values())[len(numbers) // 2] or 1e-30
        for layer, (_, number) in cells.items():
            ranks[layer] = max(number / median, ranks.get(layer, 0.0))
    layers = sorted(ranks, key=lambda layer: -ranks[layer])[:MOST_SENT]
    rows: list[dict[str, Cell]] = []
    for layer in layers:
        place = place_of(layer)
        row: dict[str, Cell] = {"Layer": capitalized(place.name) if place else layer}
        if bits is not None:
            row["Bits"] = str(bits.get(f"{layer}.weight", bits.get(layer)) or "float")
        for measure, cells in columns.items():
            row[measure.title] = None
            if layer in cells:
                name, number = cells[layer]
                path = (*measure.path, name, measure.key)
                row[measure.title] = tagged(precise_percent(number), number, path)
        rows.append(row)
    return Table(
        "Layers, those furthest above the median of a column first. Select a heading to sort.",
        rows,
        sortable=True,
        most=12,
        left_out=len(ranks) - len(layers),
    )


def _missing(job: Job, measured: set[str]) -> Markup | str:
    if "weight_error" not in measured:
        return Markup("Weight error: {}. The base has the integers of its file.").format(
            NOT_MEASURED
        )
    if "error" not in measured:
        return Markup(
            "Error of the layer's <em>output</em>, which weighs each weight by how much it "
            "matters: {}. The {} solver does not look at data; {} records it."
        ).format(NOT_MEASURED, code(str(job.setting("base", "solver") or "chosen")), code("gptq"))
    return ""
