"""What the stages of a job run, one module a verb; `plan/plan.py` says what they depend on.

    run(context, stage, scratch, work)

writes the artifact to `scratch` and returns the stage's part of results.json. Torch is imported
only then. A stage keeps unfinished work in the folder `work`, and resumes from it after an
interruption.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qwlora.pipeline.stages import (
    calibrate_stage,
    evaluate_stage,
    export_stage,
    quantize_stage,
    train_stage,
    verify_stage,
)

RUN: dict[str, Callable[..., dict[str, Any]]] = {
    "quantize": quantize_stage.run,
    "calibrate-base": calibrate_stage.run_base,
    "train": train_stage.run,
    "calibrate": calibrate_stage.run,
    "export": export_stage.run,
    "verify": verify_stage.run,
    "evaluate": evaluate_stage.run,
}
