"""Scores of tasks that a job keeps: `.qwlora/tasks.json`. See `evaluate_tasks.py`.

    {"adapted/NAME": {"stage": "train/NAME", "key": "...", "tasks": {"arc_easy": {...}}}}

A score is current while the stage that made its model has the same key. A damaged file counts as
empty: its scores can be measured again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwlora import strict_json
from qwlora.atomic import write_text
from qwlora.pipeline.stage import Stage

FILE = "tasks.json"


def current_scores(private: Path, keys: Mapping[str, str]) -> dict[str, Any]:
    """The key `tasks` of results.json: scores by stage, adapter (if it has one) and task.

    Args:
        private: the job's folder `.qwlora`.
        keys: of the stages that are current.
    """
    found: dict[str, Any] = {}
    for model, entry in _read(private).items():
        if keys.get(entry["stage"]) == entry["key"]:
            stage, _, adapter = model.partition("/")
            if adapter:
                found.setdefault(stage, {})[adapter] = entry["tasks"]
            else:
                found[stage] = entry["tasks"]
    return found


def keep_scores(
    private: Path,
    scores: Mapping[str, tuple[str, dict[str, Any]]],
    keys: Mapping[str, str],
) -> None:
    """Add scores; those of other tasks on the same model stay.

    Args:
        scores: by model: the stage that made it, and scores by task.
        keys: of the stages whose artifacts were scored, as recorded when those were made.
    """
    kept = _read(private)
    for model, (stage, tasks) in scores.items():
        before = kept.get(model)
        same = before is not None and before["key"] == keys[stage]
        earlier = before["tasks"] if before is not None and same else {}
        kept[model] = {"stage": stage, "key": keys[stage], "tasks": {**earlier, **tasks}}
    write_text(private / FILE, strict_json.dumps(kept, indent=1) + "\n")


def renamed_scores(private: Path, stages: Sequence[tuple[Stage, Stage]]) -> dict[str, str]:
    """The file by its name in `private`, after stages were renamed; empty if nothing changes."""
    kept, now = _read(private), {before.name: (before, after) for before, after in stages}
    content = {}
    for model, entry in kept.items():
        before, after = now.get(entry["stage"], (None, None))
        if before and after and before.key == entry["key"] and before.adapter:
            model = f"{model.removesuffix(before.adapter)}{after.adapter}"
            entry = {**entry, "stage": after.name, "key": after.key}
        content[model] = entry
    return {} if content == kept else {FILE: strict_json.dumps(content, indent=1) + "\n"}


def _read(private: Path) -> dict[str, Any]:
    try:
        content = json.loads((private / FILE).read_text(encoding="utf-8"))
        return {
            str(model): {
                "stage": str(entry["stage"]),
                "key": str(entry["key"]),
                "tasks": dict(entry["tasks"]),
            }
            for model, entry in content.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
