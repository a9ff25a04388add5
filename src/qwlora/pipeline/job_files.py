"""Write and read what a job shows people: results.json, report.html and the model cards."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qwlora import strict_json
from qwlora.atomic import write_text
from qwlora.pipeline.directory import Directory
from qwlora.pipeline.directory_errors import as_directory_errors
from qwlora.pipeline.job_report import write_report
from qwlora.pipeline.model_cards import write_cards
from qwlora.pipeline.results import collect_results, merge_results
from qwlora.pipeline.stage import Stage
from qwlora.recipe import Recipe


def write_results(
    directory: Directory,
    recipe: Recipe,
    plan: list[Stage],
    stale: Collection[str],
    keys: dict[str, Any],
) -> dict[str, Any]:
    """Write results.json, report.html and the model cards; `keys` are added to the results."""
    results = collect_results(directory, recipe, plan, stale)
    merge_results(results, keys)
    with as_directory_errors(directory.path):
        write_text(directory.path / "results.json", strict_json.dumps(results, indent=1) + "\n")
    write_report(directory.path, results, recipe)
    write_cards(directory, recipe, results)
    return results


def earlier_results(out: Path) -> dict[str, Any]:
    """The results of an earlier run; empty if there are none, or they are damaged."""
    try:
        found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
