"""The table of comparisons. Does not import AIMET, so pytest can collect it anywhere."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Comparison:
    """One row of the table."""

    name: str = "?"
    tensors: int = 0
    scales: int = 0
    values: int = 0
    worst_ulps: int = 0
    scales_differ: int = 0
    offsets_differ: int = 0
    values_differ: int = 0
    shortcut_differ: int = 0


@dataclass
class Table:
    """Every row of a run."""

    rows: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_markdown(self) -> str:
        lines = [
            "",
            "| what | tensors | scales | values | scales that differ | by at most "
            "| offsets that differ | values that differ | under `no_grad` |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for r in self.rows:
            cells = (
                r.name,
                r.tensors,
                r.scales,
                r.values,
                r.scales_differ,
                f"{r.worst_ulps} ulp",
                r.offsets_differ,
                r.values_differ,
                r.shortcut_differ,
            )
            lines.append(
                "| " + " | ".join(f"{c:,}" if isinstance(c, int) else c for c in cells) + " |"
            )
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"
