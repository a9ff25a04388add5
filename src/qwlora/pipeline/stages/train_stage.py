"""Stages `train/NAME`, step 2: train one adapter on the frozen base.

After training, the base's fingerprint is checked to be unchanged.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qwlora.adapter.adapter_deltas import adapter_updates
from qwlora.adapter.adapter_folder import save_adapter
from qwlora.adapter.attach import check_trainable
from qwlora.adapter.initialize import initialize_
from qwlora.adapter.train import Display, TrainingReport, train_adapter
from qwlora.data.sequences import check_isolation
from qwlora.errors import FingerprintError, SourceError
from qwlora.grid.second_moments import MomentStore
from qwlora.nn import weight_out_in
from qwlora.nn.fingerprint import fingerprint
from qwlora.pipeline.plan.plan import BASE_SIMULATION, MOMENTS, SOLVER_SCALES, Stage
from qwlora.pipeline.running.distributed import is_first_process
from qwlora.pipeline.running.loaded_models import JobContext
from qwlora.recipe import Adapter
from qwlora.simulation.saved_simulation import load_activations
from qwlora.simulation.training_graph import TrainingGraph
from qwlora.system.memory import peak_rss_bytes, reset_peak_rss


def run(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Train one adapter, and check that the base stays as it is."""
    adapter, identity = context.adapter(str(stage.adapter)), context.base_fingerprint
    context.check_rules()
    reset_peak_rss()
    model = context.untrained(adapter)
    initialized: dict[str, Any] = {}
    if adapter.init != "zero":
        initialized = {"init": _initialize(context, model, adapter)}
        reset_peak_rss()
    report = _train(context, model, adapter, work)
    if (after := fingerprint(model)) != identity:
        raise FingerprintError(
            f"training adapter {adapter.name} changed the base: its fingerprint was "
            f"{identity} and is now {after}. The adapter was not saved; report this as a bug"
        )
    updates: dict[str, Any] = {}
    if is_first_process():
        updates = adapter_updates(model)
        for config in model.peft_config.values():  # of an adapter that was trained elsewhere
            config.base_model_name_or_path = None
        save_adapter(model, scratch, identity)
    recipe = context.recipe
    settings = adapter.model_dump(mode="json", exclude_defaults=True, exclude={"name", "data"})
    data = recipe.data_of(adapter).model_dump(mode="json", exclude_defaults=True)
    settings |= {"data": data, "seed": recipe.seed, "workflow": recipe.workflow}
    measured: dict[str, Any] = {
        "steps": report.steps,
        "compute": adapter.compute,
        "settings": settings,
        "step_seconds": report.step_seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "base_bytes": report.base_bytes,
        "trainable_parameters": report.trainable_parameters,
        "resumed_from_step": report.resumed_from_step,
        "losses": list(report.losses),
        "layers": updates,
        **initialized,
    }
    if adapter.evaluation_steps:
        measured["evaluations"] = [list(e) for e in report.evaluations]
        measured["best_step"] = report.best_step
    return {"train": {adapter.name: measured}, "data": context.text(adapter.name).describe()}


def _train(context: JobContext, model: PeftModel, adapter: Adapter, work: Path) -> TrainingReport:
    """Train the adapter of `model`, if it has steps."""
    if not adapter.steps:
        return TrainingReport(0, 0.0, 0, check_trainable(model), ())
    text = context.text(adapter.name)
    if text.data.train.position_ids is not None:
        check_isolation(model)
    teacher = context.take_float_model() if adapter.objective == "recovery" else None
    graph = None
    if context.recipe.workflow == "qwa-lora":  # train through calibrated base activations
        activations = load_activations(context.path / BASE_SIMULATION)
        graph = TrainingGraph(context.simulate(model.eval()), activations)
    return train_adapter(
        model,
        text.data.train,
        adapter.training_settings(context.recipe.seed, whole_loss=graph is not None),
        work,
        text.evaluation if adapter.evaluation_steps else None,
        teacher,
        graph,
        Display(
            context.track,
            context.path / "logs" / adapter.name,
            lambda progress: context.on_training(lambda: {"adapter": adapter.name, **progress()}),
        ),
    )


def _initialize(context: JobContext, model: PeftModel, adapter: Adapter) -> dict[str, Any]:
    """Initialize the adapter to correct the quantization error; returns each layer's error before
    and after."""
    floats, base = context.take_float_model(), context.path / "base"

    def weight(path: str) -> Tensor:
        return weight_out_in(floats.get_submodule(path)).detach()

    reports = initialize_(
        model,
        adapter.init,
        weight,
        MomentStore(base / MOMENTS) if adapter.init == "qera" else None,
        share=adapter.init_share,
        track=context.track,
        solver_scales=solver_scales(base),
    )
    layers = {path: asdict(report) for path, report in reports.items()}
    return {"method": adapter.init, "layers": layers}


def solver_scales(base: Path) -> dict[str, Tensor]:
    """Scales of the base in a folder before tuning, by layer; empty if it was not tuned."""
    path = base / SOLVER_SCALES
    try:
        return load_file(path) if path.exists() else {}
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"base {str(base)!r}: {path.name} cannot be read ({error}); delete it and quantize "
            "again"
        ) from error
