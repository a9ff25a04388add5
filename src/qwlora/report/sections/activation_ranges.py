"""Which activations need 16 bits? The largest value of each kind of activation in each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from qwlora.report.drawing import Drawing, Scale, log_ticks, panels, shortened
from qwlora.report.number_format import TIMES, count, finite, significant
from qwlora.report.results_view import Job
from qwlora.report.sections import Cell, Table, View, section
from qwlora.report.sections.layer_errors import LayerGrid, Place, place_of

PANELS = 8
STANDS_OUT = 20.0  # times the median of its kind
KINDS = {  # the part of a name that says what a kind is, in transformers' decoders
    "input_layernorm": "Attention input",
    "q_proj": "Queries",
    "k_proj": "Keys",
    "v_proj": "Values",
    "o_proj": "Attention output",
    "post_attention_layernorm": "MLP input",
    "mlp": f"Gate {TIMES} up",
    "down_proj": "MLP output",
}
WORDS = {
    "base": "Base weights",
    "adapter": "Adapter weights",
    "parameter": "Norm, embedding and other weights",
    "activation": "Activations",
}


class Range(NamedTuple):
    """What an encoding spans."""

    low: float
    high: float
    bitwidth: int

    @property
    def peak(self) -> float:
        return max(abs(self.low), abs(self.high))

    def step(self, bitwidth: int) -> str:
        """The size of one step on a grid of `bitwidth` bits."""
        return significant((self.high - self.low) / (2**bitwidth - 1), 2)


@dataclass(frozen=True)
class Panel:
    """One kind of activation: its ranges by block."""

    title: str
    module: str
    ranges: dict[int, Range]

    @cached_property
    def median(self) -> float:
        values = sorted(r.peak for r in self.ranges.values())
        return values[len(values) // 2]

    @property
    def top(self) -> int:
        """The block with the largest value."""
        return max(self.ranges, key=lambda block: self.ranges[block].peak)

    def stands_out(self, block: int) -> bool:
        return self.ranges[block].peak >= STANDS_OUT * self.median


@section(
    "activations", "Activations", "Which activations need 16 bits?", position=50, of_adapter=True
)
def view(job: Job, adapter: str) -> View | None:
    """What the template draws."""
    simulation = job.section("simulation", adapter)
    shown, table = _panels(job.section("simulation", adapter, "ranges")), _table(simulation)
    if not shown and not table.rows:
        return None
    # one axis: from a power of ten below the medians to one above the largest
    low, high, largest = 1.0, 10.0, max((p.ranges[p.top].peak for p in shown), default=0.0)
    if largest > 0:
        low = 10.0 ** math.floor(math.log10(min(panel.median or 1.0 for panel in shown)))
        high = max(10.0 ** math.ceil(math.log10(largest) + 1e-9), 10 * low)
    drawn = panels(lambda width: [_draw(panel, low, high, width) for panel in shown])
    tokens = job.number("simulation", adapter, "calibration_tokens")
    constants, unseen = (len(simulation.get(key) or ()) for key in ("constants", "unseen"))
    left_out = [f"{constants} activations had a single value"] * bool(constants)
    left_out += [f"{unseen} saw no calibration data and stay float"] * bool(unseen)
    return {
        "tokens": count(tokens) if tokens is not None else "",
        "low": significant(low, 1),
        "high": significant(high, 1),
        "figure": drawn if shown else "",
        **_worst(shown),
        "table": table,
        "left_out": f"{'; '.join(left_out)}." if left_out else "",
        "command": f"qwlora simulate {job.name} --suggest 0.01",
    }


def _panels(ranges: dict[str, Any]) -> list[Panel]:
    """The kinds that have a name in `KINDS`, or else those with the largest values."""
    kinds: dict[str, dict[int, Range]] = {}
    for tensor, entry in ranges.items():
        place, low, high = place_of(tensor), finite(entry.get("min")), finite(entry.get("max"))
        if place is None or low is None or high is None or "lora_" in tensor:
            continue
        new = Range(low, high, int(entry.get("bitwidth") or 0))
        blocks = kinds.setdefault(place.kind, {})
        blocks[place.block] = max(new, blocks.get(place.block, new), key=lambda r: r.peak)
    largest = {kind: max(r.peak for r in blocks.values()) for kind, blocks in kinds.items()}
    titles: dict[str, str] = {}
    for module, title in KINDS.items():
        fitting = [k for k in kinds if k.rpartition(".")[0].rpartition(".")[2] == module]
        if fitting:
            titles[max(fitting, key=lambda k: largest[k])] = title
    if len(titles) < PANELS // 2:
        names = sorted(kinds, key=lambda k: -largest[k])[:PANELS]
        titles = {kind: kind for kind in kinds if kind in names}
    return [
        Panel(title, kind.rpartition(".")[0], dict(sorted(kinds[kind].items())))
        for kind, title in titles.items()
    ]


def _draw(panel: Panel, low: float, high: float, width: int) -> Drawing:
    base, right = 100, width - 4
    scale = Scale(low, high, base, 30, logarithmic=True)
    top = panel.top
    largest = significant(panel.ranges[top].peak)
    drawing = Drawing(
        width,
        116,
        f"{panel.title}: largest absolute activation by layer",
        f"Largest value {largest} in layer {top}; median over {len(panel.ranges)} layers "
        f"{significant(panel.median)}.",
    )
    drawing.text(4, 12, shortened(panel.title, width - 8, 12), "lb2")
    decades = log_ticks(low, high)
    for number, tick in enumerate(decades):
        drawing.line(4, scale(tick), right, scale(tick))
        if number % max(1, len(decades) // 2) == 0 and number:
            drawing.text(right, scale(tick) - 2, significant(tick, 1), "axs", "end")
    grid = LayerGrid([(Place(block, ""), entry.peak) for block, entry in panel.ranges.items()])
    group, step = grid.columns.step, (width - 8) / len(grid.columns)
    bar = max(min(step * 0.55, 6), 1)
    for (_, column), (_, place) in grid.cells.items():
        entry, x = panel.ranges[place.block], 4 + (column + 0.5) * step - bar / 2
        kind = "k-gain" if entry.bitwidth <= 8 else "k-neu"
        kind = f"mark {'k-loss' if panel.stands_out(place.block) else kind}"
        y = min(scale(max(entry.peak, low)), base - 1)
        if group == 1:
            span = f"from {significant(entry.low)} to {significant(entry.high)}"
            words = f"Layer {place.block}, {panel.title}: {span}, {entry.bitwidth} bits"
            drawing.rect(x, y, bar, base - y, kind, words)
        else:
            drawing.square(x, y, bar, base - y, kind)
    x = 4 + (top // group + 0.5) * step
    anchor = "start" if x < 60 else "end" if x > width - 58 else "middle"
    drawing.text(x, max(scale(panel.ranges[top].peak) - 4, 26), largest, "pk", anchor)
    return drawing


def _worst(shown: list[Panel]) -> View:
    """The largest value, of those that stand out if any do."""
    places = [(panel, block) for panel in shown for block in panel.ranges]
    out = [(panel, block) for panel, block in places if panel.stands_out(block) and panel.median]
    largest = max(out or places, key=lambda p: p[0].ranges[p[1]].peak, default=None)
    if largest is None:
        return {"panel": None}
    panel, block = largest
    blocks = [str(b) for p, b in out if p is panel]
    return {"panel": panel, "block": block, "blocks": blocks, "range": panel.ranges[block]}


def _table(simulation: dict[str, Any]) -> Table:
    by_kind = simulation.get("bits") or {}
    rows: list[dict[str, Cell]] = [
        {"What": words, "Width": f"{bits} bits", "Count": count(number)}
        for kind, words in WORDS.items()
        for bits, number in sorted(by_kind.get(kind, {}).items(), key=lambda item: -int(item[0]))
    ]
    total = finite(simulation.get("encodings"))
    caption = f"Bit widths of the {count(total)} encodings" if total is not None else "Bit widths"
    return Table(caption, rows)
