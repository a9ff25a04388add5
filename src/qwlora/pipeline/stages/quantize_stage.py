"""Stage `quantize`, step 1: freeze the base to packed integers."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from qwlora.formats.base_folder import save_base
from qwlora.formats.model_card import public_name
from qwlora.formats.open_checkpoint import load_precomputed
from qwlora.grid.second_moments import MomentStore
from qwlora.pipeline.plan.plan import MOMENTS, SOLVER_SCALES, Stage, needs_moments
from qwlora.pipeline.plan.target_table import model_files, second_rounding
from qwlora.pipeline.running.loaded_models import JobContext
from qwlora.quantize.quantize_blocks import observe_moments
from qwlora.quantize.quantize_model import (
    BaseSize,
    QuantizeReport,
    base_size,
    quantize_,
    quantize_checkpoint,
)
from qwlora.quantize.solvers import SOLVERS
from qwlora.quantize.tune_scales import HELD_OUT_SEQUENCES, TuningSettings, tune_
from qwlora.system.atomic import link


def run(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Quantize the base, and tune it if the recipe asks for it."""
    measured: dict[str, Any] = {}
    if context.recipe.base.tuning.steps:
        solved = work / "solved"
        shutil.rmtree(solved, ignore_errors=True)
        solved.mkdir(parents=True)
        _, report = _quantize(context, solved, work)
        identity, size, measured["tuning"] = _tune(context, solved, scratch, work)
    else:
        identity, report = _quantize(context, scratch, work)
        size = report.size
    if (work / MOMENTS).is_dir():
        # Linked, not moved: if the run is killed now, the next one still finds them in `work`.
        shutil.copytree(work / MOMENTS, scratch / MOMENTS, copy_function=link)
    if note := second_rounding(context.recipe):
        measured["second_rounding"] = note
    return {
        "base": {
            **asdict(size),
            "bits_per_weight": size.bits_per_weight,
            "fingerprint": identity,
            "layers": {name: asdict(layer) for name, layer in report.layers.items()},
            **measured,
        }
    }


def _quantize(context: JobContext, scratch: Path, work: Path) -> tuple[str, QuantizeReport]:
    """Quantize and write the base.

    Uses the float model if it is in memory, otherwise its files, one block at a time if their
    format allows it.
    """
    base, source = context.recipe.base, public_name(context.recipe.model.source)
    tokenizer, scheme, track = context.tokenizer, base.weights.scheme(), context.track
    calibration = context.base_calibration_ids(base.calibration_sequences)
    moments = MomentStore.resumed(work / MOMENTS) if needs_moments(context.recipe) else None
    if base.solver == "keep":
        model = load_precomputed(model_files(context.recipe.model), track)
        if moments is not None:
            observe_moments(model, calibration, moments, track=track)
        report = QuantizeReport(base_size(model))
        return save_base(model, scratch, tokenizer, source=source), report
    arguments: dict[str, Any] = {
        "rules": base.layer_rules(),
        "calibration": calibration,
        "moments": moments,
        "work": work,
        "settings": {
            solver.name: solver.settings_of(getattr(base, solver.name).model_dump())
            for solver in SOLVERS.values()
            if solver.settings
        },
        "track": track,
    }
    if context.lazy is not None and not context.holds_float_model:
        checkpoint = context.lazy.checkpoint
        return quantize_checkpoint(
            checkpoint, tokenizer, scratch, source, scheme, base.solver, **arguments
        )
    model = context.take_float_model()
    report = quantize_(model, scheme, base.solver, **arguments)
    return save_base(model, scratch, tokenizer, source=source), report


def _tune(
    context: JobContext, solved: Path, scratch: Path, work: Path
) -> tuple[str, BaseSize, dict[str, Any]]:
    """Tune scales and norms of the base in `solved` and write it to `scratch`.

    Also writes the scales before tuning: adapter initialization corrects the solver's error.
    """
    section, model = context.recipe.base.tuning, context.load_base(solved)
    settings = TuningSettings(**section.model_dump(), seed=context.recipe.seed)
    sequences = context.base_calibration_ids(section.steps + HELD_OUT_SEQUENCES)
    report = tune_(
        model, context.float_model(), sequences, settings, work=work, track=context.track
    )
    source = public_name(context.recipe.model.source)
    identity = save_base(model, scratch, context.tokenizer, source=source)
    if report.solver_scales:
        (scratch / SOLVER_SCALES).parent.mkdir()
        save_file(report.solver_scales, scratch / SOLVER_SCALES)
    measured = asdict(replace(report, solver_scales={}))  # these are in a file, not in the results
    del measured["solver_scales"]
    return identity, base_size(model), measured
