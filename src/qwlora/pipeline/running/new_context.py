"""Make a job's context. The libraries that it imports are imported only now, and kept quiet."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from qwlora.pipeline.job.job_texts import JobTexts
from qwlora.recipe import Recipe
from qwlora.system.compute_precision import SlowComputeWarning
from qwlora.system.progress import Track


def new_context(recipe: Recipe, texts: JobTexts, out: Path, track: Track) -> Any:
    """A `JobContext`. Imports torch and transformers."""
    quiet_libraries()
    from qwlora.pipeline.running.loaded_models import JobContext

    return JobContext(recipe, texts, out, track)


def quiet_libraries() -> None:
    """Silence progress bars, notices and deprecation warnings of other libraries."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=SlowComputeWarning)  # preflight reports it
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
