"""The table of `qwlora evaluate DIR --tasks ...`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from qwlora.cli.progress_bars import ProgressDisplay
from qwlora.cli.terminal import console, print_json


def score_job(
    folder: Path, tasks: str, models: str | None, limit: int | None, as_json: bool, quiet: bool
) -> None:
    """Score a job's models and print the table.

    Args:
        tasks, models: names, separated by commas.
    """
    from qwlora.pipeline.commands.evaluate_tasks import evaluate_tasks
    from qwlora.pipeline.commands.model_names import JobModels, model_name

    adapters = JobModels(folder).adapters
    chosen = [model_name(text, adapters) for text in _split(models)] if models else None
    with ProgressDisplay(quiet or as_json) as display:
        found = evaluate_tasks(folder, _split(tasks), chosen, limit, display.track, display.say)
    if as_json:
        print_json(found)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("task", "metric", "model"):
        table.add_column(column, overflow="fold")
    for column in ("value", "± stderr"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in _rows(found):
        table.add_row(*row)
    console(width=120).print(table)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """One row for each task, metric and model; repeated words are left out."""
    by_model: dict[str, dict[str, Any]] = {}
    for stage, content in found.items():
        if stage in ("float", "base"):
            by_model[stage] = content
        else:
            by_model |= {f"{stage}/{adapter}": scores for adapter, scores in content.items()}
    tasks = dict.fromkeys(task for scores in by_model.values() for task in scores)
    for task in tasks:
        first = next(scores[task] for scores in by_model.values() if task in scores)
        for metric in first["metrics"]:
            title = (task, metric)
            for model, scores in by_model.items():
                score = scores.get(task, {}).get("metrics", {}).get(metric)
                if score is not None:
                    error = "" if score["stderr"] is None else f"{score['stderr']:.4f}"
                    yield (*title, model, f"{score['value']:.4f}", error)
                    title = ("", "")
