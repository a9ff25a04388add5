"""Tables of the report: what a template's macro `table` draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from qwlora.report.results_view import Tagged

MOST_ROWS = 50
MOST_SENT = 10_000  # rows in the page; the others are in results.json


@dataclass(frozen=True)
class Table:
    """A table. The first cell of a row names it; None is a value that was not measured.

    Args:
        marked: numbers of the rows to highlight.
        left: numbers of the columns that hold words.
        sortable: a reader may sort it by any column.
        most: rows that are shown at once; the others are shown on request.
        left_out: rows that the page does not have.
    """

    caption: str | Markup
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Markup | None]]
    marked: Sequence[int] = field(default=())
    left: Sequence[int] = field(default=())
    sortable: bool = False
    most: int = MOST_ROWS
    note: str | Markup = ""
    left_out: int = 0

    @property
    def first_rows(self) -> Sequence[Sequence[str | Markup | None]]:
        """The rows that are shown at once."""
        return self.rows[: self.most]

    @property
    def other_rows(self) -> list[list[str | list[str | float] | None]]:
        """Those that are shown on request: HTML, or a number as its text and six digits of it."""
        return [[_compact(cell) for cell in row] for row in self.rows[self.most :]]


def _compact(cell: str | Markup | None) -> str | list[str | float] | None:
    if cell is None:
        return None
    if isinstance(cell, Tagged) and cell.text:
        return [str(escape(cell.text)), float(f"{cell.value:.6g}")]
    return str(escape(cell))
