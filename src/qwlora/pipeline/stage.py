"""A stage of a job, and where stages write; `plan.py` makes them.

What a stage depends on is its `inputs`, by the names of the recipe, and the records that it needs.
Neither has a path, the name of an adapter, a version of a package or anything of this machine. Only
files of use cases have names of adapters in them, so there these are inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwlora.errors import SourceError
from qwlora.pipeline.sources import unread
from qwlora.pipeline.store import STAGES

ZERO, CASES = "calibrate/_base", "calibrate/_use_cases"  # no adapter can have these names

# What stages write, in a job's directory.
MOMENTS = "moments"  # second moments of the base's layers, in base/
RULES = "rules.yaml"  # what a budget of bits chose, in base/
SOLVER_SCALES = "tuning/solver_scales.safetensors"  # scales before tuning, in base/
BASE_SIMULATION = "base_simulation"  # encodings of the base without an adapter; workflow qwa-lora
SHARED = "simulation/_shared"  # encodings that adapters share
ADAPTER = "adapter"  # in simulation/NAME/: the adapter as it was calibrated
ZERO_ADAPTER = "simulation/_base"  # of bundles of simulations
USE_CASES = "simulation/_use_cases"  # of export.use_cases
FLOAT_ADAPTERS = ".qwlora/reference"  # trained on the float model; hidden, as of no base here
SAMPLE = "quantize/sample"
SAMPLED = ".qwlora/sampled"  # what the float model wrote: token ids by part of base.calibration
SAMPLED_IDS = "ids.safetensors"  # in it


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: `verb` or `verb/...`; unique.
        kind: the same without names of adapters.
        inputs: what the result depends on, besides `needs`: JSON values, or `Unread`.
        needs: names of the stages whose records it reads, by a name without that of an adapter.
        adapter: name of the adapter that the stage works on, if any.
        case: name of the use case that it checks, if any.
        text: name of the other adapter on whose text it measures, if any.
        artifact: the folder that the stage writes, relative to the job's directory.
        labels: where `inputs` are in the recipe, for messages.
        missing: says why the stage's runtime cannot run here, or None.
    """

    name: str
    kind: str
    inputs: Mapping[str, Any]
    needs: Mapping[str, str] = field(default_factory=dict)
    adapter: str | None = None
    case: str | None = None
    text: str | None = None
    artifact: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    missing: Callable[[], str | None] = lambda: None

    @property
    def verb(self) -> str:
        """The command that runs the stage."""
        return self.name.partition("/")[0]

    def check_read(self) -> None:
        """Raise the error of an input that cannot be read."""
        for input_ in unread(self.inputs):
            raise input_.error or SourceError(f"{self.name}: a file that the recipe names is gone")

    @property
    def place(self) -> str:
        """Its record's place in the store."""
        return self.artifact or f"{STAGES}/{self.name}.json"
