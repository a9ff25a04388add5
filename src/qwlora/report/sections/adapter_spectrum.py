"""Is the rank right? Singular values of the adapter's updates, by projection."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup

from qwlora.report.drawing import Drawing, Scale, log_ticks, panels, shortened
from qwlora.report.job import Job, finite
from qwlora.report.layer_grid import place_of
from qwlora.report.section import Section, View
from qwlora.report.written_numbers import count, significant

ENERGY = 0.9
TOO_LOW = 0.1  # the last singular value, relative to the first


@dataclass(frozen=True)
class Panel:
    """Singular values of the layers of one kind, each largest first."""

    title: str
    values: list[list[float]]

    @property
    def rank(self) -> int:
        return max(len(row) for row in self.values)

    def quantile(self, number: int, share: float) -> float:
        """Of the values with this number, over all layers that have one."""
        column = sorted(row[number] for row in self.values if len(row) > number)
        return column[min(len(column) - 1, int(share * len(column)))]


def needed(row: list[float]) -> int:
    """How many directions carry 90% of the update's energy."""
    total = sum(value * value for value in row)
    carried = 0.0
    for number, value in enumerate(row, 1):
        carried += value * value
        if carried >= ENERGY * total:
            return number
    return len(row)


def view(job: Job, adapter: str | None) -> View | None:
    """What the template draws."""
    name = adapter or job.adapters[0]
    kinds: dict[str, list[list[float]]] = {}
    for layer, report in job.section("train", name, "layers").items():
        row = [x for x in map(finite, report.get("singular_values") or []) if x is not None]
        if not row or not row[0] > 0:
            continue
        place = place_of(layer)
        kinds.setdefault((place.kind if place else layer).rpartition(".")[2], []).append(row)
    if not kinds:
        return None
    shown = [Panel(kind, values) for kind, values in kinds.items()]
    high = max(row[0] for panel in shown for row in panel.values)
    smallest = min(min(v for v in row if v > 0) for panel in shown for row in panel.values)
    low = max(smallest, high * 1e-4)
    low = low if low < high else high / 10
    layers = max(len(panel.values) for panel in shown)
    return {
        "layers": count(layers),
        "low": significant(low, 1),
        "high": significant(high, 2),
        "figure": panels(lambda width: [_draw(panel, low, high, width) for panel in shown[:12]]),
        "answer": _answer(shown),
    }


def _draw(panel: Panel, low: float, high: float, width: int) -> Drawing:
    height, bottom, top, right = 112, 96, 24, width - 4
    rank = panel.rank
    x = Scale(0, max(rank - 1, 1), 8, width - 8)
    y = Scale(low, high, bottom, top, logarithmic=True)
    middle = [panel.quantile(n, 0.5) for n in range(rank)]
    enough = needed(middle)
    drawing = Drawing(
        width,
        height,
        f"{panel.title}: singular values of the adapter update",
        f"Median over {len(panel.values)} layers falls from {significant(middle[0])} to "
        f"{significant(middle[-1])}; {ENERGY:.0%} of the energy is in the first {enough} of "
        f"{rank} directions.",
    )
    drawing.text(4, 12, shortened(panel.title, width - 8, 12), "lb2")
    for tick in log_ticks(low, high):
        drawing.line(4, y(tick), right, y(tick))
        drawing.text(right, y(tick) - 2, significant(tick, 1), "axs", "end")
    drawing.band(
        [(x(n), y(panel.quantile(n, 0.9999))) for n in range(rank)],
        [(x(n), y(panel.quantile(n, 0.0))) for n in range(rank)],
        "band",
    )
    drawing.polyline([(x(n), y(value)) for n, value in enumerate(middle)], "mark l-train")
    if rank == 1:
        drawing.circle(x(0), y(middle[0]), 3, "mark d-gain")
    edge = x(min(enough - 1, rank - 1)) if rank > 1 else x(0)
    drawing.line(edge, top, edge, bottom, "ref")
    near = edge > width - 90
    drawing.text(
        edge + (-4 if near else 4),
        bottom + 12,
        f"90% in {enough} of {rank}",
        "axs",
        "end" if near else "start",
    )
    return drawing


def _answer(shown: list[Panel]) -> Markup:
    rows = [row for panel in shown for row in panel.values]
    rank = max(panel.rank for panel in shown)
    needs = sorted(needed(row) for row in rows)
    middle, most = needs[len(needs) // 2], needs[-1]
    ends = sorted(row[-1] / row[0] for row in rows if len(row) > 1)
    if ends and ends[len(ends) // 2] > TOO_LOW and middle > rank / 2:
        return Markup(
            "<b>Rank {} may be too low.</b> In half of the {} layers the last direction is still "
            "{:.0%} or more of the first. Try a higher rank."
        ).format(rank, count(len(rows)), math.floor(100 * ends[len(ends) // 2]) / 100)
    lower = " A lower rank is worth a try." if most < rank else ""
    return Markup(
        "<b>Rank {} is enough.</b> In half of the {} layers the first {} of {} directions carry "
        "90% of the update; no layer needs more than {}.{}"
    ).format(rank, count(len(rows)), middle, rank, most, lower)


SECTION = Section(
    "spectrum",
    "Rank",
    "Is the rank right?",
    "adapter_spectrum.html",
    view,
    of_job=False,
    of_adapter=True,
)
