"""Which activations need 16 bits? The largest value of each kind of activation in each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from markupsafe import Markup

from qwlora.report.drawing import Drawing, Scale, log_ticks, panels, shortened
from qwlora.report.layer_grid import MOST_COLUMNS, place_of
from qwlora.report.number_format import TIMES, count, listed, significant
from qwlora.report.report_table import Table
from qwlora.report.results_view import Job, code, finite
from qwlora.report.section import Section, View

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


@dataclass(frozen=True)
class Panel:
    """One kind of activation: (low, high, bitwidth) by block."""

    title: str
    module: str
    ranges: dict[int, tuple[float, float, int]]

    def peak(self, block: int) -> float:
        low, high, _ = self.ranges[block]
        return max(abs(low), abs(high))

    @cached_property
    def peaks(self) -> dict[int, float]:
        return {block: self.peak(block) for block in sorted(self.ranges)}

    @cached_property
    def median(self) -> float:
        values = sorted(self.peaks.values())
        return values[len(values) // 2]


def view(job: Job, adapter: str | None) -> View | None:
    """What the template draws."""
    name = adapter or job.adapters[0]
    simulation = job.section("simulation", name)
    if not simulation:
        return None
    shown = _panels(job.section("simulation", name, "ranges"))
    table = _table(simulation)
    if not shown and not table.rows:
        return None
    tokens = job.number("simulation", name, "calibration_tokens")
    low, high = _axis(shown)
    return {
        "tokens": count(tokens) if tokens is not None else "",
        "low": significant(low, 1),
        "high": significant(high, 1),
        "figure": panels(lambda width: [_draw(panel, low, high, width) for panel in shown])
        if shown
        else "",
        "answer": _answer(shown),
        "table": table,
        "left_out": _left_out(simulation),
        "suggest": Markup(
            "What 8 bits would cost, tensor by tensor, is not a part of a run. Find which "
            "activations can go to 8 bits with {}."
        ).format(code(f"qwlora simulate {job.name} --suggest 0.01")),
    }


def _panels(ranges: dict[str, Any]) -> list[Panel]:
    """The kinds that the specification names, or those with the largest values."""
    kinds: dict[str, dict[int, tuple[float, float, int]]] = {}
    for tensor, found in ranges.items():
        place, low, high = place_of(tensor), finite(found.get("min")), finite(found.get("max"))
        if place is None or low is None or high is None or "lora_" in tensor:
            continue
        blocks = kinds.setdefault(place.kind, {})
        before = blocks.get(place.block)
        if before is None or max(abs(low), abs(high)) > max(abs(before[0]), abs(before[1])):
            blocks[place.block] = (low, high, int(found.get("bitwidth") or 0))
    largest = {
        kind: max(max(abs(a), abs(b)) for a, b, _ in v.values()) for kind, v in kinds.items()
    }
    chosen: dict[str, str] = {}
    for module, title in KINDS.items():
        fitting = [k for k in kinds if k.rpartition(".")[0].rpartition(".")[2] == module]
        if fitting:
            chosen[max(fitting, key=lambda k: largest[k])] = title
    if len(chosen) < PANELS // 2:
        names = sorted(kinds, key=lambda k: -largest[k])[:PANELS]
        chosen = {kind: kind for kind in kinds if kind in names}
    return [Panel(title, kind.rpartition(".")[0], kinds[kind]) for kind, title in chosen.items()]


def _axis(shown: list[Panel]) -> tuple[float, float]:
    """The shared axis: from a power of ten below the medians to one above the largest."""
    values = [value for panel in shown for value in panel.peaks.values() if value > 0]
    if not values:
        return 1.0, 10.0
    low = 10.0 ** math.floor(math.log10(min(panel.median or 1.0 for panel in shown)))
    high = 10.0 ** math.ceil(math.log10(max(values)) + 1e-9)
    return (low, high) if high > low else (low, 10 * low)


def _draw(panel: Panel, low: float, high: float, width: int) -> Drawing:
    height, base, right = 116, 100, width - 4
    scale = Scale(low, high, base, 30, logarithmic=True)
    peaks = panel.peaks
    top = max(peaks, key=lambda block: peaks[block])
    drawing = Drawing(
        width,
        height,
        f"{panel.title}: largest absolute activation by layer",
        f"Largest value {significant(peaks[top])} in layer {top}; median over {len(peaks)} layers "
        f"{significant(panel.median)}.",
    )
    drawing.text(4, 12, shortened(panel.title, width - 8, 12), "lb2")
    decades = log_ticks(low, high)
    for number, tick in enumerate(decades):
        drawing.line(4, scale(tick), right, scale(tick))
        if number % max(1, len(decades) // 2) == 0 and number:
            drawing.text(right, scale(tick) - 2, significant(tick, 1), "axs", "end")
    last = max(peaks) + 1
    group = -(-last // MOST_COLUMNS)
    columns: dict[int, int] = {}
    for block, peak in peaks.items():
        column = block // group
        if column not in columns or peak > peaks[columns[column]]:
            columns[column] = block
    step = (width - 8) / (-(-last // group))
    bar = max(min(step * 0.55, 6), 1)
    paths: dict[str, list[str]] = {}
    for column, block in columns.items():
        x, peak = 4 + (column + 0.5) * step, peaks[block]
        bits = panel.ranges[block][2]
        kind = "k-loss" if peak >= STANDS_OUT * panel.median else "k-gain" if bits <= 8 else "k-neu"
        span = (
            f"from {significant(panel.ranges[block][0])} to {significant(panel.ranges[block][1])}"
        )
        y = min(scale(max(peak, low)), base - 1)
        if group == 1:
            word = f"Layer {block}, {panel.title}: {span}, {bits} bits"
            drawing.rect(x - bar / 2, y, bar, base - y, f"mark {kind}", word)
        else:
            paths.setdefault(kind, []).append(
                f"M{x - bar / 2:.1f},{base}v{y - base:.1f}h{bar:g}V{base}z"
            )
    for kind, bars in paths.items():
        drawing.path("".join(bars), f"mark {kind}")
    column = top // group
    x = 4 + (column + 0.5) * step
    anchor = "start" if x < 60 else "end" if x > width - 58 else "middle"
    drawing.text(x, max(scale(peaks[top]) - 4, 26), significant(peaks[top]), "pk", anchor)
    return drawing


def _answer(shown: list[Panel]) -> Markup:
    if not shown:
        return Markup("<b>Only the number of encodings was recorded.</b>")
    out = [
        (panel, block, peak)
        for panel in shown
        for block, peak in panel.peaks.items()
        if peak >= STANDS_OUT * panel.median and panel.median > 0
    ]
    panel, block, peak = max(
        out or [(p, b, v) for p in shown for b, v in p.peaks.items()], key=lambda item: item[2]
    )
    low, high, bits = panel.ranges[block]
    if not out:
        return Markup(
            "<b>None stands out.</b> The largest value is {}, the {} of layer {}; the median of "
            "its kind is {}."
        ).format(significant(peak), panel.title.lower(), block, significant(panel.median))
    blocks = listed([str(b) for p, b, _ in out if p is panel])
    step = f"one step there would be {significant((high - low) / 255, 2)}"
    now = f", on the {bits}-bit grid in use it is {significant((high - low) / (2**bits - 1), 2)}"
    return Markup(
        "<b>The outputs of {} in layer{} {} do.</b> Layer {} reaches {}. On an 8-bit grid {}{}."
    ).format(
        code(panel.module.rpartition(".")[2] or panel.module),
        "" if blocks.isdigit() else "s",
        blocks,
        block,
        significant(peak),
        step,
        now if bits > 8 else "",
    )


def _table(simulation: dict[str, Any]) -> Table:
    by_kind = simulation.get("bits") or {}
    rows: list[list[str | Markup | None]] = [
        [WORDS[kind], f"{bits} bits", count(number)]
        for kind in WORDS
        for bits, number in sorted(by_kind.get(kind, {}).items(), key=lambda item: -int(item[0]))
    ]
    total = finite(simulation.get("encodings"))
    words = f"Bit widths of the {count(total)} encodings" if total is not None else "Bit widths"
    return Table(words, ("What", "Width", "Count"), rows)


def _left_out(simulation: dict[str, Any]) -> str:
    parts = []
    if constants := simulation.get("constants"):
        parts.append(f"{len(constants)} activations had a single value")
    if unseen := simulation.get("unseen"):
        parts.append(f"{len(unseen)} saw no calibration data and stay float")
    return f"{'; '.join(parts)}." if parts else ""


SECTION = Section(
    "activations",
    "Activations",
    "Which activations need 16 bits?",
    "activation_ranges.html",
    view,
    of_job=False,
    of_adapter=True,
)
