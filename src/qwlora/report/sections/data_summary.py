"""What was it trained and tested on? Counts of each text, and what was removed from it."""

from __future__ import annotations

from qwlora.report.number_format import count, finite
from qwlora.report.results_view import Job, without_folders
from qwlora.report.sections import Cell, Table, View, section

KINDS = {
    "text": "plain text",
    "completions": "prompts with completions",
    "conversations": "conversations",
}
PACKINGS = {
    "join": "joined into sequences",
    "documents": "whole documents packed into sequences",
    "none": "one document per sequence",
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
REMOVED = {
    "repeated_documents": "documents{} were removed from the held-out text: they are trained on.",
    "repeated_paragraphs": "paragraphs{} were removed from the training text: they are held "
    "out, and would make the result look better than it is.",
    "skipped_records": "records{} were left out, because they are empty.",
}


@section("data", "Data", "What was it trained and tested on?", position=100, of_job=True)
def view(job: Job, adapter: str) -> View | None:
    """What the template draws."""
    paths = job.texts()
    first = job.section(*next(iter(paths.values())))
    if not first:
        return None
    kind, packing = str(first.get("kind", "")), str(first.get("packing", ""))
    kinds = (KINDS.get(kind, kind), PACKINGS.get(packing, packing))
    summary = f"{', '.join(filter(None, kinds))}."
    if len(paths) > 1:
        summary = f"{len(paths)} texts; the first: {summary}"
    elif source := job.setting("data", "source"):
        summary = f"Source {without_folders(str(source))}: {summary}"
    return {
        "summary": summary,
        "tables": [_table(job, name, path) for name, path in paths.items()],
        "notes": [
            f"{count(number)} {words.format(f' ({name})' if name else '')}"
            for name, path in paths.items()
            for key, words in REMOVED.items()
            if (number := finite(job.section(*path).get(key)))
        ],
    }


def _table(job: Job, name: str, path: tuple[str, ...]) -> Table:
    rows: list[dict[str, Cell]] = [
        {
            "": title,
            "Training": job.shown(count, *path, "train", key),
            "Held out": job.shown(count, *path, "held_out", key),
        }
        for key, title in ROWS.items()
    ]
    caption = f"Text of {name}" if name else "Training and held-out text"
    return Table(caption, [row for row in rows if row["Training"] or row["Held out"]])
