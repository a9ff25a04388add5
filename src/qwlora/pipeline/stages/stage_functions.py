"""What the stages of a job run; `plan/plan.py` says what they depend on.

    function(context, stage, scratch, work)

writes the artifact to `scratch` and returns the stage's part of results.json. Torch is imported
only then. A stage keeps unfinished work in the folder `work`, and resumes from it after an
interruption.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qwlora.pipeline.stages import file_stages, model_stages

RUN: dict[str, Callable[..., dict[str, Any]]] = {
    "quantize": model_stages.quantize,
    "calibrate-base": model_stages.calibrate_base,
    "train": model_stages.train,
    "calibrate": model_stages.calibrate,
    "export": file_stages.export,
    "verify": file_stages.verify,
    "evaluate": model_stages.evaluate,
}
