"""What was it trained and tested on? Counts of each text, and what was removed from it."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from qwlora.report.number_format import count
from qwlora.report.report_table import Table
from qwlora.report.results_view import Job, finite, tagged, without_folders
from qwlora.report.section import Section, View

KINDS = {
    "text": "plain text",
    "completions": "prompts with completions",
    "conversations": "conversations",
}
PACKINGS = {
    "join": "joined into sequences",
    "documents": "whole documents packed into sequences",
    "none": "one document a sequence",
}
ROWS = {
    "documents": "Documents",
    "tokens": "Tokens",
    "sequences": "Sequences",
    "sequence_tokens": "Tokens of the longest sequence",
    "loss_tokens": "Loss tokens",
    "dropped_tokens": "Tokens dropped at the end",
    "truncated_documents": "Documents cut short",
    "padding_tokens": "Padding tokens",
}


def view(job: Job, adapter: str | None) -> View | None:
    """What the template draws."""
    texts: dict[str, tuple[str, ...]] = {name: ("texts", name) for name in job.section("texts")}
    found = {name: path for name, path in texts.items() if job.section(*path)}
    if not found and job.section("data"):
        found = {"": ("data",)}
    if not found:
        return None
    return {
        "summary": _summary(job, next(iter(found.values()))),
        "tables": [_table(job, name, path) for name, path in found.items()],
        "notes": [note for name, path in found.items() for note in _notes(job, name, path)],
    }


def _summary(job: Job, path: tuple[str, ...]) -> str:
    data = job.section(*path)
    kind, packing = str(data.get("kind", "")), str(data.get("packing", ""))
    source = job.setting("data", "source")
    parts = [KINDS.get(kind, kind), PACKINGS.get(packing, packing)]
    words = ", ".join(part for part in parts if part)
    if len(job.section("texts")) > 1:
        return f"{len(job.section('texts'))} texts; the first: {words}."
    return f"Source {without_folders(str(source))}: {words}." if source else f"{words}."


def _table(job: Job, name: str, path: tuple[str, ...]) -> Table:
    rows: list[list[str | Markup | None]] = []
    for key, title in ROWS.items():
        cells = [_count(job, (*path, part, key)) for part in ("train", "held_out")]
        if any(cell is not None for cell in cells):
            rows.append([title, *cells])
    caption = f"Text of {name}" if name else "Training and held-out text"
    return Table(caption, ("", "Training", "Held out"), rows)


def _count(job: Job, path: tuple[str, ...]) -> Markup | None:
    value = job.number(*path)
    return None if value is None else tagged(count(value), value, path)


def _notes(job: Job, name: str, path: tuple[str, ...]) -> list[str]:
    data: dict[str, Any] = job.section(*path)
    of = f" ({name})" if name else ""
    notes = []
    for key, what, why in (
        (
            "overlapping_documents",
            "documents",
            "were removed from the training text: they repeat held-out ones",
        ),
        (
            "overlapping_paragraphs",
            "paragraphs",
            "were removed from the training text: they are held out, and would make the result "
            "look better than it is",
        ),
        ("skipped_records", "records", "were left out, because they are empty"),
    ):
        if number := finite(data.get(key)):
            notes.append(f"{count(number)} {what}{of} {why}.")
    return notes


SECTION = Section("data", "Data", "What was it trained and tested on?", "data_summary.html", view)
