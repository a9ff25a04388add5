"""The stages of a job: one module for each command adds them to a plan, and says what each reads,
needs and writes (export.py also for `verify`). `model_stages.py` and `file_stages.py` have what
they run, `job_context.py` the models that stages share.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.system.progress import Track
from qwlora.system.quiet import quiet_libraries

if TYPE_CHECKING:
    from qwlora.pipeline.sources import Sources
    from qwlora.pipeline.stage import Stage
    from qwlora.pipeline.stages.job_context import JobContext
    from qwlora.recipe import Recipe


def run_stage(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Run the function of the stage's verb. It writes the artifact to `scratch` and returns its
    part of results.json. Unfinished work is in the folder `work`."""
    # Plans import this package, and must not import torch: it takes seconds, at every command.
    module = "file_stages" if stage.verb in ("export", "verify") else "model_stages"
    run = getattr(import_module(f"{__name__}.{module}"), stage.verb)
    results: dict[str, Any] = run(context, stage, scratch, work)
    return results


def new_context(recipe: Recipe, sources: Sources, out: Path, track: Track) -> JobContext:
    """Make a job's context. Imports torch and transformers."""
    # This comes first: tqdm 4.70 reads TQDM_DISABLE when it is imported.
    quiet_libraries()
    from qwlora.pipeline.stages.job_context import JobContext

    return JobContext(recipe, sources, out, track)
