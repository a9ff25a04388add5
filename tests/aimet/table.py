"""The table of comparisons. Does not import AIMET, so pytest can collect it anywhere."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class Comparison:
    """One row of the table."""

    name: str = "?"
    tensors: int = 0
    scales: int = 0
    values: int = 0
    scales_differ: int = 0
    worst_ulps: int = 0
    offsets_differ: int = 0
    values_differ: int = 0
    shortcut_differ: int = 0


@dataclass
class Table:
    """Every row of a run."""

    rows: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_markdown(self) -> str:
        head = (
            "| what | tensors | scales | values | scales that differ | by at most | offsets that "
            "differ | values that differ | under `no_grad` |"
        )
        lines = ["", head, "|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
        for row in self.rows:
            cells = (asdict(row) | {"worst_ulps": f"{row.worst_ulps} ulp"}).values()
            words = [f"{cell:,}" if isinstance(cell, int) else cell for cell in cells]
            lines.append(f"| {' | '.join(words)} |")
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"
