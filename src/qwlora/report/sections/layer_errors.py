"""Which layers lost most, and where did the adapter help? Heat maps and a table."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from qwlora.report.drawing import MOST_TITLES, Drawing, figure, shortened
from qwlora.report.layer_grid import Grid, grid_of, place_of
from qwlora.report.number_format import count, percent, precise_percent, significant
from qwlora.report.report_table import MOST_SENT, Table
from qwlora.report.results_view import NOT_MEASURED, Job, code, finite, tagged
from qwlora.report.section import Section, View

BINS = 8
EVEN = 2.0  # a map whose largest value is less than this times its median is folded


@dataclass(frozen=True)
class Map:
    """One heat map.

    Args:
        bits: digits to print into the cells, if layers have different bitwidths.
        folded: nothing stands out, so the map is folded into its sentence.
    """

    title: str
    what: str
    answer: str
    figure: Markup
    low: str
    high: str
    folded: bool


def view(job: Job, adapter: str | None) -> View | None:
    """What the template draws."""
    single = len(job.adapters) == 1
    name = job.adapters[0] if single else adapter
    of_base, of_adapter = single or adapter is None, single or adapter is not None
    maps: list[Map] = []
    bits = _bits(job)
    width = next(iter(set(bits.values()))) if len(set(bits.values())) == 1 else None
    if of_base:
        rounding = f"{width} bits" if width else "integers"
        maps += _maps(
            _values(job, "weight_error"),
            "Weight error",
            f"Share of the weights' energy lost by rounding to {rounding}.",
            percent,
            bits if width is None else {},
        )
        maps += _maps(
            _values(job, "error"),
            "Output error",
            "Share of the layer's output lost, each input weighted by how much it matters.",
            percent,
            bits if width is None else {},
        )
    if of_adapter and name:
        maps += _maps(
            _trained(job, name, "gain"),
            "Adapter gain",
            "Size of the adapter's update relative to the frozen weight.",
            percent,
            {},
            "Training changed {layer} most, by {largest}.",
        )
    table = _table(job, name if of_adapter else None, of_base)
    if not maps and not table.rows:
        return None
    return {
        "maps": maps,
        "table": table if table.rows else None,
        "missing": _missing(job) if of_base else "",
        "question": "Which layers lost most, and where did the adapter help?"
        if single
        else "Which layers lost most?"
        if of_base
        else "Where did the adapter help?",
    }


def _values(job: Job, key: str) -> dict[str, float]:
    layers = job.section("base", "layers")
    found = {name: finite(report.get(key)) for name, report in layers.items()}
    return {name: value for name, value in found.items() if value is not None}


def _trained(job: Job, adapter: str, key: str) -> dict[str, float]:
    layers = job.section("train", adapter, "layers")
    found = {name: finite(report.get(key)) for name, report in layers.items()}
    return {name: value for name, value in found.items() if value is not None}


def _bits(job: Job) -> dict[str, int]:
    """Bitwidth of each packed tensor, from its scheme (`int4 symmetric per block 32`)."""
    found = {}
    for name, report in job.section("base", "layers").items():
        if match := re.match(r"u?int(\d+)", str(report.get("scheme", ""))):
            found[name] = int(match[1])
    return found


def _maps(
    values: dict[str, float],
    title: str,
    what: str,
    write: Callable[[float], str],
    bits: dict[str, int],
    answer: str = "",
) -> list[Map]:
    grid = grid_of(values)
    if grid is None:
        return []
    numbers = sorted(value for value, _ in grid.cells.values())
    low, high, median = numbers[0], numbers[-1], numbers[len(numbers) // 2]
    place = grid.cells[grid.largest][1]
    even = high < EVEN * median
    if even:
        span = f"{write(low)} and {write(high)}"
        sentence = f"All {count(len(values))} layers lie within {span}: nothing stands out."
    elif answer:
        sentence = answer.format(layer=place.name, largest=write(high))
    else:
        times = (
            f"{significant(high / median, 2)} times the median"
            if median
            else "the others lose nothing"
        )
        sentence = f"{place.name[:1].upper()}{place.name[1:]} lost most: {write(high)}, {times}."
    digits = {
        (where.block, where.kind): str(width)
        for name, width in bits.items()
        if (where := place_of(name)) is not None
    }
    drawn = figure(lambda width: _draw(grid, width, title, write, low, high, digits))
    if grid.left_out:
        what += (
            f" The {count(grid.left_out)} kinds of layers with the smallest values are left out."
        )
    return [Map(title, what, sentence, drawn, write(low), write(high), even)]


def _draw(
    grid: Grid,
    width: int,
    title: str,
    write: Callable[[float], str],
    low: float,
    high: float,
    digits: dict[tuple[int, str], str],
) -> Drawing:
    left, cell = (64 if width > 500 else 48), 17
    step = (width - left) / len(grid.columns)
    gap = 1 if step > 4 else 0
    height = cell * len(grid.rows) + 22
    value, place = grid.cells[grid.largest]
    drawing = Drawing(
        width,
        height,
        f"{title} by layer and projection",
        f"{len(grid.cells)} cells: {len(grid.columns)} columns by {len(grid.rows)} projections. "
        f"Smallest {write(low)}, largest {write(value)} at {place.name}. The table lists the "
        "largest.",
    )
    is_grouped = grid.columns[0][1] > grid.columns[0][0]
    titled = width > 900 and not is_grouped and len(grid.cells) <= MOST_TITLES
    paths: dict[int, list[str]] = {}
    for (row, column), (number, where) in grid.cells.items():
        x, y = left + column * step, row * cell
        shade = min(BINS - 1, int(BINS * (number - low) / ((high - low) or 1)))
        if titled:
            word = f"{where.name[:1].upper()}{where.name[1:]}: {title.lower()} {write(number)}"
            drawing.rect(x, y, step - gap, cell - 1, f"mark q{shade}", word)
        else:
            w = step - gap
            paths.setdefault(shade, []).append(f"M{x:.1f},{y}h{w:.1f}v{cell - 1}h-{w:.1f}z")
        if (digit := digits.get((where.block, where.kind))) and step >= 12:
            kind = "dg2" if shade >= 4 else "dg"
            drawing.text(x + (step - gap) / 2, y + 12, digit, kind, "middle")
    for shade, squares in sorted(paths.items()):
        drawing.path("".join(squares), f"mark q{shade}")
    for row in range(len(grid.rows)):
        for column in range(len(grid.columns)):
            if (row, column) not in grid.cells and step > 4:
                word = "Stays float, or was not measured"
                drawing.rect(left + column * step, row * cell, step - gap, cell - 1, "hatch", word)
    for row, kind in enumerate(grid.rows):
        name = kind.rpartition(".")[2].removesuffix("_proj")
        drawing.text(left - 6, row * cell + 12, shortened(name, left - 6, 12), "ax", "end")
    row, column = grid.largest
    drawing.rect(left + column * step, row * cell, step - gap, cell - 1, "worst")
    drawing.text(left - 6, height - 6, "layer", "ax", "end")
    every = (
        max(1, round(len(grid.columns) / (6 if width < 500 else 12) / 5) * 5)
        if len(grid.columns) > 12
        else 1
    )
    for column in range(0, len(grid.columns), every):
        x = left + (column + 0.5) * step
        drawing.text(x, height - 6, str(grid.columns[column][0]), "ax", "middle")
    return drawing


def _table(job: Job, adapter: str | None, of_base: bool) -> Table:
    """The layers, by how far above the median they are in any column."""
    bits = _bits(job)
    columns: list[
        tuple[str, dict[str, float], Callable[[float], str], Callable[[str], tuple[str, ...]]]
    ] = []
    if of_base:
        columns += [
            (
                "Weight error",
                _values(job, "weight_error"),
                precise_percent,
                lambda n: ("base", "layers", f"{n}.weight", "weight_error"),
            ),
            (
                "Output error",
                _values(job, "error"),
                precise_percent,
                lambda n: ("base", "layers", f"{n}.weight", "error"),
            ),
        ]
    if adapter is not None:
        name = adapter
        columns += [
            (
                "Adapter gain",
                _trained(job, name, "gain"),
                precise_percent,
                lambda n: ("train", name, "layers", n, "gain"),
            ),
        ]
    columns = [column for column in columns if column[1]]
    values = [
        {layer.removesuffix(".weight"): value for layer, value in found.items()}
        for _, found, _, _ in columns
    ]
    order = {name: n for n, name in enumerate(dict.fromkeys(n for v in values for n in v))}
    medians = [sorted(v.values())[len(v) // 2] or 1e-30 for v in values]

    def rank(layer: str) -> float:
        return max(v[layer] / m for v, m in zip(values, medians, strict=True) if layer in v)

    layers = sorted(order, key=lambda layer: (-rank(layer), order[layer]))[:MOST_SENT]
    headings = ["Layer", *(["Bits"] if of_base else []), *(title for title, _, _, _ in columns)]
    rows: list[list[str | Markup | None]] = []
    for layer in layers:
        place = place_of(layer)
        shown = f"{place.name[:1].upper()}{place.name[1:]}" if place else layer
        row: list[str | Markup | None] = [shown]
        if of_base:
            width = bits.get(f"{layer}.weight", bits.get(layer))
            row.append(str(width) if width else "float")
        for (_, _, write, path), found in zip(columns, values, strict=True):
            number = found.get(layer)
            row.append(
                None if number is None else tagged(write(number), number, _path(job, path, layer))
            )
        rows.append(row)
    return Table(
        "Layers, those furthest above the median of a column first. Select a heading to sort.",
        headings,
        rows if columns else [],
        sortable=True,
        most=12,
        left_out=len(order) - len(layers),
    )


def _path(job: Job, path: Callable[[str], tuple[str, ...]], layer: str) -> tuple[str, ...]:
    """The path of a layer's value; fused experts have no `.weight`."""
    found = path(layer)
    if job.get(*found) is None:
        return tuple(part.removesuffix(".weight") for part in found)
    return found


def _missing(job: Job) -> Markup | str:
    if not job.section("base", "layers"):
        return ""
    if not _values(job, "weight_error"):
        return Markup(
            "Weight error: {}. This base was made by an older version, or kept its file's integers."
        ).format(NOT_MEASURED)
    if not _values(job, "error"):
        return Markup(
            "Error of the layer's <em>output</em>, which weighs each weight by how much it "
            "matters: {}. The {} solver does not look at data; {} records it."
        ).format(NOT_MEASURED, code(str(job.setting("base", "solver") or "chosen")), code("gptq"))
    return ""


SECTION = Section(
    "layers",
    "Layers",
    "Which layers lost most, and where did the adapter help?",
    "layer_errors.html",
    view,
    of_job=True,
    of_adapter=True,
)
