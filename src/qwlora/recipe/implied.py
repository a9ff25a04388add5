"""What a recipe implies that no single key says. Imports no torch."""

from __future__ import annotations

import math
import os
from pathlib import Path

from qwlora.errors import DirectoryError
from qwlora.quantize.solvers import SOLVERS
from qwlora.recipe import Adapter, Recipe
from qwlora.recipe.grid_sections import JOB, MODEL
from qwlora.system.machine import auto_compute, device_type, exact_type
from qwlora.system.output_path import shown

REFERENCE = "reference"  # the float model with an adapter trained on it, as others are `adapted`
# Sequences of one part. Tuning may ask for hundreds, and each takes 2.6 to 3.9 s of one core
# (docs/log/solvers.md).
_MOST_SAMPLED = 128


def resolve_compute(recipe: Recipe) -> Recipe:
    """Replace `compute: auto` with the precision it means on this machine."""
    # Only stages that run see it: the plan keeps `auto`, so a job is current on other machines.
    base, device = recipe.base, device_type(recipe.device)
    if base.tuning.steps and base.tuning.compute == "auto":
        compute = {"compute": auto_compute(exact_type(device))}
        base = base.model_copy(update={"tuning": base.tuning.model_copy(update=compute)})
    adapters = list(recipe.adapters)
    for i, adapter in enumerate(adapters):
        if adapter.compute == "auto":
            # A captured graph computes in float32 only.
            is_fixed = recipe.workflow == "qwa-lora" or not adapter.steps
            compute = {"compute": "float32" if is_fixed else auto_compute(device)}
            adapters[i] = adapter.model_copy(update=compute)
    return recipe.model_copy(update={"base": base, "adapters": adapters})


def is_foreign(recipe: Recipe, adapter: Adapter) -> bool:
    """Whether an adapter continues an imported adapter, not another adapter of the job."""
    return adapter.continue_from is not None and recipe.predecessor(adapter) is None


def is_calibrated(recipe: Recipe) -> bool:
    """Whether quantizing the base, before it is tuned, needs calibration text."""
    named = {recipe.base.solver, *(rule.solver for rule in recipe.base.rules)}
    solvers = [solver for name, solver in SOLVERS.items() if name in named]
    return recipe.base.has_budget or any(solver.needs_calibration for solver in solvers)


def reads_base_text(recipe: Recipe) -> bool:
    """Whether quantizing or tuning the base needs calibration text."""
    return is_calibrated(recipe) or recipe.base.tuning.steps > 0


def sampled_sequences(recipe: Recipe) -> dict[int, int]:
    """Number of sequences that the float model generates, by index in `base.calibration`."""
    base, adapters = recipe.base, recipe.adapters
    recovers = any(recovers_on_base_text(recipe, adapter) for adapter in adapters)
    if not recovers and not reads_base_text(recipe):
        return {}
    wanted = max(base.calibration_sequences, base.tuning.steps)
    share = wanted / sum(part.weight for part in base.calibration)
    return {
        number: min(_MOST_SAMPLED, math.ceil(share * part.weight))
        for number, part in enumerate(base.calibration)
        if part.text == MODEL
    }


def recovers_on_base_text(recipe: Recipe, adapter: Adapter) -> bool:
    """Whether an adapter for recovery is trained on the text that the base is calibrated on."""
    # If the base is calibrated on the job's text and others, the adapter learns from the job's text
    # alone: recovery on the mixture costs 2.2 points on the job's text (docs/log/tuning.md).
    is_general = adapter.objective == "recovery" and adapter.data is None
    return is_general and all(part.text != JOB for part in recipe.base.calibration)


def is_compared(kind: str, other: str) -> bool:
    """Whether a model is compared with the float model on its own text, or on `other`."""
    return kind not in ("float", REFERENCE) and (not other or kind == "base")


def reference_stage(recipe: Recipe, adapter: Adapter) -> str | None:
    """The stage that trains an adapter on the float model, if the recipe asks for it."""
    # An adapter for recovery has none: its goal is the float model as it is.
    is_trained = recipe.reference is not None and adapter.objective == "text"
    return f"train/{adapter.name}/float" if is_trained else None


def compared_with(recipe: Recipe, kind: str, adapter: Adapter | None) -> str | None:
    """The stage that trains what a model is compared with, unless that is the float model."""
    if adapter is None or kind not in ("adapted", "simulated"):
        return None
    return reference_stage(recipe, adapter)


def without_recovery(recipe: Recipe, adapter: Adapter) -> Adapter:
    """The adapter that `adapter` starts from on the float model."""
    # Recovery adapters are skipped: there is nothing to recover on the float model.
    while (first := recipe.predecessor(adapter)) is not None and first.objective == "recovery":
        adapter = first
    return adapter


def check_outside_data(path: Path, recipe: Recipe) -> None:
    """Check that the next run does not read the files of the job in `path` as text."""
    target = os.path.realpath(path)
    parts = [data for part in recipe.base.calibration for data in recipe.calibration_texts(part)]
    for data in (recipe.data, *recipe.texts().values(), *parts):
        folder = os.path.realpath(os.path.expanduser(data.source or ""))
        if data.source and os.path.isdir(folder) and os.path.commonpath([folder, target]) == folder:
            raise DirectoryError(
                f"{shown(path)} is inside the data folder {data.source!r}, so a run would read its "
                "own files as data. Choose an --out outside of it."
            )
