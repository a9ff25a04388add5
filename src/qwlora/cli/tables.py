"""Tables of text: with similar items in one row, and of scores of tasks."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

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


def score_lines(tasks: dict[str, Any]) -> Iterator[str]:
    """Scores of tasks, as `tasks` in results.json: a line for each task, metric and model."""
    models: dict[str, dict[str, Any]] = {}
    for stage, content in tasks.items():
        if stage in ("float", "base"):
            models[stage] = content
        else:
            models |= {f"{stage}/{adapter}": scores for adapter, scores in content.items()}
    rows = [
        (task, metric, model, score["value"], score["stderr"])
        for model, scores in models.items()
        for task, measured in scores.items()
        for metric, score in measured["metrics"].items()
    ]
    texts = [
        (*names, f"{value:.4f}", "" if error is None else f"{error:.4f}")
        for *names, value, error in sorted(rows, key=lambda row: row[:2])
    ]
    yield from table([("task", "metric", "model", "value", "± stderr"), *texts])


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
