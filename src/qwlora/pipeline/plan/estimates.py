"""The estimate of a job that `qwlora plan` prints and `qwlora run` begins with: what its stages
need, what this machine has, and what does not fit.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwlora.errors import size
from qwlora.export.registry import TARGETS
from qwlora.formats.user_path import user_path
from qwlora.pipeline.job.digests import Digests
from qwlora.pipeline.job.job_texts import UnreadTexts
from qwlora.pipeline.plan.forecast import FLOAT, Forecast, Forecaster
from qwlora.pipeline.plan.plan import make_plan, resolve_compute
from qwlora.pipeline.plan.stage import Stage
from qwlora.recipe import Recipe
from qwlora.system.memory import memory_limit_bytes, return_freed_memory, rss_bytes
from qwlora.system.progress import Track, untracked


@dataclass(frozen=True)
class Estimates:
    """Estimates of stages, and what there is.

    Args:
        memory_limit: bytes that the process may use; None if it is not known.
        disk_free: bytes free where the job is written; None if it is not known.
    """

    stages: tuple[Forecast, ...]
    memory_limit: int | None
    disk_free: int | None

    @property
    def disk(self) -> float:
        """Of all stages."""
        return sum(stage.disk for stage in self.stages)

    @property
    def largest(self) -> Forecast:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def problems(self) -> list[str]:
        """What does not fit, and what would make it fit."""
        problems = []
        if self.memory_limit is not None:
            for stage in self.stages:
                if stage.peak > self.memory_limit:
                    most = max(stage.memory, key=lambda part: stage.memory[part])
                    remedy = " or ".join(stage.settings) or "a smaller model"
                    problems.append(
                        f"{stage.stage} needs {size(int(stage.peak))}, and this machine has "
                        f"{size(self.memory_limit)}. Most of it is {most} "
                        f"({size(int(stage.memory[most]))}). Less memory: {remedy}"
                    )
        if self.disk_free is not None and self.disk > self.disk_free:
            problems.append(
                f"the job needs {size(int(self.disk))} of disk, and {size(self.disk_free)} are "
                "free. Choose another --out, or free space"
            )
        return problems

    def to_json(self) -> dict[str, Any]:
        """For `qwlora plan --json`."""
        return {
            "stages": [stage.to_json() for stage in self.stages],
            "peak": self.largest.peak,
            "disk": self.disk,
            "memory_limit": self.memory_limit,
            "disk_free": self.disk_free,
            "problems": self.problems,
        }


def plan_job(recipe: Recipe, out: Path, track: Track = untracked) -> Estimates:
    """Estimate all stages of a recipe. Reads configurations and headers, no weights and no text.

    Raises:
        SourceError: the model's configuration cannot be read.
        GridError: the base's grid does not fit the model.
        TrainingError: an adapter does not fit the model.
        CaptureError: the model does not run without data, as most mixtures of experts.
    """
    recipe = resolve_compute(recipe)
    plan = make_plan(recipe, UnreadTexts(recipe), Digests(trust_mtime=True))
    return estimate(recipe, plan, out, track)


def estimate(
    recipe: Recipe,
    stages: Sequence[Stage],
    out: Path,
    track: Track = untracked,
    holds_float_model: bool = False,
) -> Estimates:
    """Estimate `stages` of a recipe; see `plan_job`.

    Args:
        holds_float_model: whether this process has loaded the float model already.
    """
    keeps = holds_float_model or any(stage.name == "evaluate/float" for stage in stages)
    forecaster = Forecaster(recipe, keeps_float_model=keeps)
    forecasts = [
        forecaster.stage(stage) for stage in track(list(stages), "estimating", len(stages))
    ]
    # Resident memory of this process with what its stages import, after the runs without data.
    importlib.import_module("qwlora.pipeline.plan.preflight")  # the Trainer and everything below
    for target in recipe.export.targets:
        TARGETS[target].missing()  # imports its packages
    gc.collect()
    return_freed_memory()
    process = rss_bytes()
    if holds_float_model:
        process -= FLOAT * forecaster.models.values
    stages_found = tuple(
        replace(each, memory={"process": float(process), **each.memory}) for each in forecasts
    )
    folder, free = user_path(str(out)).absolute(), None
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    return Estimates(stages_found, memory_limit_bytes(), free)


def summary_line(estimates: Estimates) -> str:
    """The estimate in one line."""
    largest = estimates.largest
    return (
        f"estimate: peak memory {size(int(largest.peak))} in {largest.stage}, disk "
        f"{size(int(estimates.disk))}"
    )
