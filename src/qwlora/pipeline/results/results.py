"""Collects the results of all current stages: the content of results.json (docs/results.md)."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qwlora.pipeline.job.directory import Directory
from qwlora.pipeline.plan.stage import Stage
from qwlora.recipe import Recipe
from qwlora.recipe.yaml_core import dump_yaml
from qwlora.report.results_view import Job

RESULTS_FORMAT = 1
TIMING = "timing"  # of one stage, in its record; `stages` and `sizes` in results.json


def collect_results(
    directory: Directory, recipe: Recipe, plan: list[Stage], stale: Collection[str]
) -> dict[str, Any]:
    """The results of all stages of `plan` that are not stale."""
    results: dict[str, Any] = {"format": RESULTS_FORMAT, "recipe": recipe.name, "stages": {}}
    if recipe.model.trust_remote_code:
        results["trust_remote_code"] = True
    for stage in plan:
        if stage.name not in stale:
            record = directory.records[stage.name]
            found = {key: value for key, value in record.results.items() if key != TIMING}
            merge_results(results, _by_text(found, stage, recipe))
            entry = results["stages"].setdefault(stage.verb, {"seconds": 0.0, "parts": {}})
            entry["seconds"] += record.seconds
            timing = dict(record.results.get(TIMING, {}))
            size = timing.pop("bytes", None)
            entry["parts"][stage.name] = {"seconds": record.seconds, **timing}
            if size is not None and stage.artifact is not None:
                results.setdefault("sizes", {})[stage.artifact] = size
    return results


def _by_text(results: dict[str, Any], stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """A stage's results. If adapters have different texts, counts and perplexities are also listed
    by text, so that adapters can be compared on each other's."""
    texts = recipe.texts()
    if len(texts) < 2:
        return results
    text = stage.name.partition("/on/")[2]
    if not text:
        own = recipe.base_text() if stage.adapter is None else recipe.data_of(stage.adapter)
        text = next((name for name, data in texts.items() if data == own), "base")
    found = {key: value for key, value in results.items() if key != "data"}
    if "data" in results:
        found["texts"] = {text: results["data"]}
    if "train" in results:
        found["train"] = {
            name: {**measured, "text": text} for name, measured in results["train"].items()
        }
    for key in ("perplexity", "perplexity_stderr", "perplexity_document_stderr"):
        measured = {
            kind: value
            for kind, value in results.get(key, {}).items()
            if kind in ("float", "base", "adapted")
        }
        if measured and text in texts:
            found[key] = {**results[key], "on": {text: measured}}
    return found


def merge_results(into: dict[str, Any], part: dict[str, Any]) -> None:
    """Add `part` to the results `into`, in place; numbers in both are those of `part`."""
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge_results(into[key], value)
        else:
            into[key] = copy.deepcopy(value)  # so that later merges do not change the records


def job_of(
    folder: Path,
    recipe: Recipe,
    results: Mapping[str, Any],
    stale: Mapping[tuple[str, str], str] | None = None,
) -> Job:
    """A job as its report and its model cards read it."""
    content = recipe.model_dump(mode="json")
    return Job(results, content, dump_yaml(content), folder.absolute().name, stale or {})
