"""The stages of a job, one module for each command. A module has

    add...     adds stages to a plan: what they read, need and write
    cost       memory and disk that a stage needs
    run        runs a stage. It writes the artifact to `scratch` and returns the stage's part of
               results.json. Unfinished work, from which it resumes, is in the folder `work`.

They import no torch until a stage runs. What they run is in `model_stages.py` and `file_stages.py`;
`job_context.py` has the models that they share.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from qwlora.pipeline.stages import calibrate, evaluate, export, quantize, train, verify
from qwlora.system.machine import SlowComputeWarning
from qwlora.system.progress import Track

if TYPE_CHECKING:
    from qwlora.pipeline.sources import Sources
    from qwlora.pipeline.stages.job_context import JobContext
    from qwlora.recipe import Recipe

MODULES: dict[str, ModuleType] = {
    "quantize": quantize,
    "calibrate-base": calibrate,
    "train": train,
    "calibrate": calibrate,
    "export": export,
    "verify": verify,
    "evaluate": evaluate,
}


def new_context(recipe: Recipe, sources: Sources, out: Path, track: Track) -> JobContext:
    """Make a job's context. Imports torch and transformers, and keeps them quiet."""
    quiet_libraries()
    from qwlora.pipeline.stages.job_context import JobContext

    return JobContext(recipe, sources, out, track)


def quiet_libraries() -> None:
    """Silence progress bars, notices and deprecation warnings of other libraries."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    for category in (FutureWarning, DeprecationWarning, SlowComputeWarning):
        warnings.filterwarnings("ignore", category=category)  # preflight reports the last one
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    of_torch = ("torch.onnx", "torch.onnx._internal.exporter._registration", "torch.utils._pytree")
    for name in (*of_torch, "accelerate", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
