"""The sections of the report: a question each, and its answer in numbers and drawings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from markupsafe import Markup

from qwlora.report.results_view import Job

DETAILS = 70
View = dict[str, Any]
Cell = str | Markup | None


@dataclass(frozen=True)
class ReportSection:
    """A question, and the template of its module's name, which answers it.

    Args:
        label: in the list of contents.
        position: in the page; folded from `DETAILS` on.
        of_job, of_adapter: whether the section is drawn for the whole job, and for each adapter.
            With a single adapter, `view` is called once, with its name.
        view: returns the data for the template, or None to omit the section. The key `question`
            replaces the question. For the whole job, the adapter's name is empty.
    """

    id: str
    label: str
    question: str
    view: Callable[[Job, str], View | None]
    _: KW_ONLY
    position: int
    of_job: bool = False
    of_adapter: bool = False

    def drawn(self, job: Job, adapter: str, id: str) -> View | None:
        if (view := self.view(job, adapter)) is None:
            return None
        return {
            "id": id,
            "label": self.label,
            "position": self.position,
            "question": view.get("question") or self.question,
            "template": f"{self.view.__module__.rpartition('.')[2]}.html",
            "view": view,
        }


def section(
    id: str, label: str, question: str, **options: Any
) -> Callable[[Callable[[Job, str], View | None]], ReportSection]:
    """Decorator of a section's `view`; its arguments are those of `ReportSection`."""
    return partial(ReportSection, id, label, question, **options)


@dataclass(frozen=True)
class Table:
    """A table. The first cell of a row names it; None is a value that was not measured.

    Args:
        rows: cells by column; all rows have the same columns.
        marked: numbers of the rows to highlight.
        words: columns of words, which are aligned left.
        most: number of rows shown at once; the others are shown on request.
        left_out: number of rows that the page does not have.
    """

    caption: str | Markup
    rows: Sequence[Mapping[str, Cell]]
    marked: Sequence[int] = ()
    words: Collection[str] = ()
    sortable: bool = False
    most: int = 50
    note: str | Markup = ""
    left_out: int = 0


def sections() -> list[ReportSection]:
    """The `view` of every module in this folder, by position."""
    # Found by listing the folder, so a new section is one module here and one template.
    modules = [import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__)]
    return sorted((module.view for module in modules), key=lambda view: view.position)
