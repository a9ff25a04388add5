"""Tables of the report: what a template's macro `table` draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

MOST_ROWS = 50


@dataclass(frozen=True)
class Table:
    """A table. The first cell of a row names it; None is a value that was not measured.

    Args:
        marked: numbers of the rows to highlight.
        left: numbers of the columns that hold words.
        sortable: a reader may sort it by any column.
        most: rows that are shown at once; the others are shown on request.
    """

    caption: str | Markup
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Markup | None]]
    marked: Sequence[int] = field(default=())
    left: Sequence[int] = field(default=())
    sortable: bool = False
    most: int = MOST_ROWS
    note: str | Markup = ""

    @property
    def first_rows(self) -> Sequence[Sequence[str | Markup | None]]:
        """The rows that are shown at once."""
        return self.rows[: self.most]

    @property
    def other_rows(self) -> list[list[str | None]]:
        """Those that are shown on request, as HTML."""
        return [
            [None if cell is None else str(Markup.escape(cell)) for cell in row]
            for row in self.rows[self.most :]
        ]
