"""The stages of a job, one file each: what a stage's key covers, what it needs, what it runs.

    add(plan, ...)                           adds the stage to a plan; free of torch
    run(context, stage, scratch, work)       writes the artifact into `scratch` and returns the
                                             stage's part of results.json; imports torch

`work` is a folder for what an interrupted run resumes from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.pipeline.stages import (
    calibrate_base_stage,
    calibrate_stage,
    evaluate_stage,
    export_stage,
    quantize_stage,
    train_stage,
    verify_stage,
)

if TYPE_CHECKING:
    from qwlora.pipeline.context import JobContext
    from qwlora.pipeline.stage import Stage

    Run = Callable[[JobContext, Stage, Path, Path], dict[str, Any]]

RUN: dict[str, Run] = {
    module.NAME: module.run
    for module in (
        quantize_stage,
        calibrate_base_stage,
        train_stage,
        calibrate_stage,
        export_stage,
        verify_stage,
        evaluate_stage,
    )
}
VERBS = tuple(RUN)
