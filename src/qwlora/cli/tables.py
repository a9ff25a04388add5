"""Tables of text: with similar items in one row, and of scores of tasks."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.table import Table

T = TypeVar("T")


def group_similar(
    items: Sequence[T], name_of: Callable[[T], str], kind_of: Callable[[T], Hashable]
) -> list[tuple[str, list[T]]]:
    """Group items of equal kind whose names differ only in numbers.

    Returns (name of the group, items) pairs, in order of each group's first item. Numbers in the
    name are replaced by `*`; where several groups would get the same name, it lists the numbers.
    """
    groups: dict[tuple[str, Hashable], list[T]] = {}
    for item in items:
        groups.setdefault((re.sub(r"\d+", "*", name_of(item)), kind_of(item)), []).append(item)
    which: dict[str, set[str]] = {}
    for (pattern, _), group in groups.items():
        which.setdefault(pattern, set()).add(_numbers(map(name_of, group)))
    named = []
    for (pattern, _), group in groups.items():
        names = list(dict.fromkeys(map(name_of, group)))
        numbered = f"{pattern} ({_numbers(names)})" if len(which[pattern]) > 1 else pattern
        named.append((names[0] if len(names) == 1 else numbered, group))
    return named


def table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lines with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def score_table(tasks: dict[str, Any]) -> Table:
    """Scores of tasks, as `tasks` in results.json: a row for each task, metric and model."""
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("task", "metric", "model"):
        rows.add_column(column, overflow="fold")
    for column in ("value", "± stderr"):
        rows.add_column(column, justify="right", no_wrap=True)
    models: dict[str, dict[str, Any]] = {}
    for stage, content in tasks.items():
        if stage in ("float", "base"):
            models[stage] = content
        else:
            models |= {f"{stage}/{adapter}": scores for adapter, scores in content.items()}
    for task in dict.fromkeys(task for scores in models.values() for task in scores):
        first = next(scores[task] for scores in models.values() if task in scores)
        for metric in first["metrics"]:
            title = (task, metric)  # repeated words are left out
            for model, scores in models.items():
                score = scores.get(task, {}).get("metrics", {}).get(metric)
                if score is not None:
                    error = "" if score["stderr"] is None else f"{score['stderr']:.4f}"
                    rows.add_row(*title, model, f"{score['value']:.4f}", error)
                    title = ("", "")
    return rows


def _numbers(names: Iterable[str]) -> str:
    """The first number of each name, ranges shortened: 0-3,7."""
    numbers = sorted({int(found.group()) for name in names if (found := re.search(r"\d+", name))})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
