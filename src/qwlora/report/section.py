"""What a section of the report is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwlora.report.results_view import Job

View = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A question, and a template that answers it.

    Args:
        label: in the list of contents.
        template: a file in `templates/`.
        view: what the template draws, or None to leave the section out. The key `question`
            replaces the question. The adapter is None for what concerns the whole job.
        of_job, of_adapter: whether the section is drawn for the whole job, and for each adapter.
            With a single adapter both are one: `view` is called once, with its name.
    """

    id: str
    label: str
    question: str
    template: str
    view: Callable[[Job, str | None], View | None]
    of_job: bool = True
    of_adapter: bool = False
