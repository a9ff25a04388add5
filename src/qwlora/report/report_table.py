"""Tables of the report: what a template's macro `table` draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

MOST_ROWS = 50  # further rows are shown on request


@dataclass(frozen=True)
class Table:
    """A table. The first cell of a row names it; None is a value that was not measured.

    Args:
        marked: numbers of the rows to highlight.
        left: numbers of the columns that hold words.
        sortable: a reader may sort it by any column.
    """

    caption: str | Markup
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Markup | None]]
    marked: Sequence[int] = field(default=())
    left: Sequence[int] = field(default=())
    sortable: bool = False
    note: str | Markup = ""

    @property
    def first_rows(self) -> Sequence[Sequence[str | Markup | None]]:
        """The rows that are shown at once."""
        return self.rows[:MOST_ROWS]

    @property
    def other_rows(self) -> list[list[str | None]]:
        """Those that are shown on request, as HTML."""
        return [
            [None if cell is None else str(Markup.escape(cell)) for cell in row]
            for row in self.rows[MOST_ROWS:]
        ]
