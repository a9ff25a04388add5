"""Which activations need 16 bits? The largest value in each module of each layer."""

from __future__ import annotations

from typing import Any, NamedTuple

from qwlora.report.drawing import figure
from qwlora.report.number_format import count, finite, significant
from qwlora.report.results_view import Job
from qwlora.report.sections import Cell, Table, View, section
from qwlora.report.sections.layer_errors import LayerGrid, Place, heat_map, place_of

STANDS_OUT = 20.0  # times the median of its module in all layers
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
        return significant((self.high - self.low) / (2**bitwidth - 1), 2)


@section(
    "activations", "Activations", "Which activations need 16 bits?", position=80, of_adapter=True
)
def view(job: Job, adapter: str) -> View | None:
    """What the template draws."""
    simulation = job.section("simulation", adapter)
    ranges, table = _ranges(job.section("simulation", adapter, "ranges")), _table(simulation)
    if not ranges and not table.rows:
        return None
    tokens = job.number("simulation", adapter, "calibration_tokens")
    constants, unseen = (len(simulation.get(key) or ()) for key in ("constants", "unseen"))
    left_out = [f"{constants} activations had a single value"] * bool(constants)
    left_out += [f"{unseen} saw no calibration data and stay float"] * bool(unseen)
    return {
        "tokens": count(tokens) if tokens is not None else "",
        "map": _map(ranges) if ranges else None,
        "table": table,
        "left_out": f"{'; '.join(left_out)}." if left_out else "",
        "command": f"qwlora simulate {job.name} --suggest 0.01",
    }


def _ranges(recorded: dict[str, Any]) -> dict[Place, Range]:
    # A cell is a module, and its largest activation decides. An adapter's are not the layer's.
    ranges: dict[Place, Range] = {}
    for tensor, entry in recorded.items():
        place, low, high = place_of(tensor), finite(entry.get("min")), finite(entry.get("max"))
        if place is None or low is None or high is None or "lora_" in tensor:
            continue
        place = Place(place.block, place.kind.rpartition(".")[0] or "output")
        new = Range(low, high, int(entry.get("bitwidth") or 0))
        ranges[place] = max(new, ranges.get(place, new), key=lambda r: r.peak)
    return ranges


def _map(ranges: dict[Place, Range]) -> View:
    grid = LayerGrid([(place, r.peak) for place, r in ranges.items()])
    modules: dict[str, list[float]] = {}
    for value, place in grid.cells.values():
        modules.setdefault(place.kind, []).append(value)
    # Modules differ by orders of magnitude, so each is compared with itself in other layers.
    medians = {kind: sorted(values)[len(values) // 2] for kind, values in modules.items()}
    cells = sorted(grid.cells.values(), key=lambda cell: -cell[0])
    out = [place for value, place in cells if 0 < STANDS_OUT * medians[place.kind] <= value]
    worst = out[0] if out else grid.worst
    widths = {place: str(r.bitwidth) for place, r in ranges.items()}
    bits = widths if len(set(widths.values())) > 1 else {}
    title = "Largest absolute activation by layer and module"
    return {
        "figure": figure(lambda width: heat_map(grid, width, title, significant, bits, True)),
        "low": significant(grid.low, 2),
        "high": significant(grid.high, 2),
        "module": worst.kind.rpartition(".")[2],
        "block": worst.block,
        "blocks": [str(block) for block, kind in sorted(out) if kind == worst.kind],
        "range": ranges[worst],
        "median": medians[worst.kind],
    }


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
