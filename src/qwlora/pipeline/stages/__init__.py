"""The stages of a job: one module for each command adds them to a plan, and says what each reads,
needs, writes and costs. They import no torch. `RUN` has what they run, which does;
`job_context.py` has the models that stages share.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.system.progress import Track
from qwlora.system.quiet import quiet_libraries

if TYPE_CHECKING:
    from qwlora.pipeline.sources import Sources
    from qwlora.pipeline.stages.job_context import JobContext
    from qwlora.recipe import Recipe


def _later(name: str) -> Callable[..., dict[str, Any]]:
    """A function of this package that needs torch, imported when it is called."""

    def run(*arguments: Any) -> dict[str, Any]:
        module, _, function = name.partition(":")
        results: dict[str, Any] = getattr(import_module(f"{__name__}.{module}"), function)(
            *arguments
        )
        return results

    return run


# By command: a function of context, stage, scratch and work. It writes the artifact to `scratch`
# and returns the stage's part of results.json. Unfinished work is in the folder `work`.
RUN = {
    "quantize": _later("model_stages:quantize"),
    "calibrate-base": _later("model_stages:calibrate_base"),
    "train": _later("model_stages:train"),
    "calibrate": _later("model_stages:calibrate"),
    "export": _later("file_stages:export"),
    "verify": _later("file_stages:verify"),
    "evaluate": _later("model_stages:evaluate"),
}


def new_context(recipe: Recipe, sources: Sources, out: Path, track: Track) -> JobContext:
    """Make a job's context. Imports torch and transformers, and keeps them quiet."""
    quiet_libraries()
    from qwlora.pipeline.stages.job_context import JobContext

    return JobContext(recipe, sources, out, track)
