"""What each stage does: read from the session, write into a scratch folder, say what was measured.

The returned mapping is the stage's part of `results.json`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from qwlora.adapter.adapter_folder import FILE, save_adapter
from qwlora.adapter.attach import (
    attach,
    attach_existing,
    check_trainable,
    without_dropout_,
)
from qwlora.adapter.initialize import initialize_adapter_
from qwlora.adapter.rank_budget import RankBudget, rank_by_layer, with_ranks
from qwlora.adapter.train import TrainingReport, TrainingSettings, train_adapter
from qwlora.analysis.perplexity import Logits, logits_of, perplexity
from qwlora.data.document_isolation import check_isolation
from qwlora.data.prepared_data import describe
from qwlora.errors import FingerprintError
from qwlora.export.onnx_bundle import export_onnx
from qwlora.export.verify_language_model import Limits, check_parity, verify_onnx
from qwlora.formats import manifest
from qwlora.formats.assemble_model import load_precomputed
from qwlora.formats.base_folder import save_base
from qwlora.grid.second_moments import Moments
from qwlora.nn import weight_out_in
from qwlora.nn.fingerprint import fingerprint
from qwlora.pipeline.context import ADAPTER, MOMENTS, SCALES, SOLVER_SCALES, Session, solver_scales
from qwlora.pipeline.distributed import is_first_process
from qwlora.pipeline.plan import SHARED, Stage, needs_moments
from qwlora.pipeline.preflight import rules_of
from qwlora.pipeline.unused_rules import shape_of
from qwlora.quantize.gptq import GptqSettings
from qwlora.quantize.quantize_blocks import observe_moments
from qwlora.quantize.quantize_checkpoint import quantize_checkpoint
from qwlora.quantize.quantize_model import BaseSize, QuantizeReport, base_size, quantize_
from qwlora.quantize.tune_scales import SEQUENCES_ASIDE, TuningSettings, tune_scales_
from qwlora.recipe import Adapter
from qwlora.simulation.adapter_simulations import simulate_adapters
from qwlora.simulation.shared_encodings import share
from qwlora.simulation.simulation import simulate
from qwlora.simulation.simulation_folder import save_simulation
from qwlora.simulation.stored_encodings import load_encodings, save_encodings
from qwlora.system.memory import peak_rss_bytes, reset_peak_rss

Results = dict[str, Any]
StageFunction = Callable[[Session, Stage, Path, Path], Results]


def quantize(session: Session, stage: Stage, scratch: Path, work: Path) -> Results:
    """Step 1: the packed base."""
    measured: Results = {}
    if session.recipe.base.tuning.steps:
        solved = work / "solved"  # beside the finished parts, and gone with them
        shutil.rmtree(solved, ignore_errors=True)
        solved.mkdir(parents=True)
        _, report = _quantize(session, solved, work)
        identity, size, measured["tuning"] = _tune(session, solved, scratch, work)
    else:
        identity, report = _quantize(session, scratch, work)
        size = report.size
    if (work / MOMENTS).is_dir():
        shutil.copytree(
            work / MOMENTS, scratch / MOMENTS, copy_function=_link
        )  # a kill from here on finds them beside the finished parts
    layers = {name: asdict(layer) for name, layer in report.layers.items()}
    return {
        "base": {
            **asdict(size),
            "bits_per_weight": size.bits_per_weight,
            "fingerprint": identity,
            "layers": layers,
            **measured,
        }
    }


def _link(source: str, target: str) -> None:
    """One file under both names, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _quantize(session: Session, scratch: Path, work: Path) -> tuple[str, QuantizeReport]:
    """Write the base: from the float model if an evaluation left it in memory, else from its files, a block at a time where they can be read so."""
    base, source = session.recipe.base, session.recipe.model.source
    calibration = session.data.calibration_ids[: base.calibration_sequences]
    moments = Moments(work / MOMENTS) if needs_moments(session.recipe) else None
    if base.solver == "keep":
        model = load_precomputed(session.checkpoint(), session.track)
        if moments is not None:
            observe_moments(model, calibration, moments, track=session.track)
        return save_base(model, session.tokenizer, scratch, source), QuantizeReport(
            base_size(model)
        )
    scheme = base.weights.scheme()
    asked: dict[str, Any] = {
        "rules": rules_of(base),
        "calibration": calibration,
        "moments": moments,
        "work": work,
        "gptq": GptqSettings(**base.gptq.model_dump()),
        "track": session.track,
    }
    if session.lazy is not None and not session.holds_float_model:
        streamed = quantize_checkpoint(
            session.lazy.checkpoint,
            session.tokenizer,
            scratch,
            source,
            scheme,
            base.solver,
            **asked,
        )
        return streamed.fingerprint, streamed.report
    model = session.take_float_model()
    report = quantize_(model, scheme, base.solver, **asked)
    return save_base(model, session.tokenizer, scratch, source), report


def _tune(
    session: Session, solved: Path, scratch: Path, work: Path
) -> tuple[str, BaseSize, Results]:
    """Write the base in `solved` once more, its scales and norms tuned; and beside it the scales before, for adapters' starts."""
    section, model = session.recipe.base.tuning, session.load_base(solved)
    settings = TuningSettings(**section.model_dump(), seed=session.recipe.seed)
    sequences = session.data.calibration_ids[: section.steps + SEQUENCES_ASIDE]
    report = tune_scales_(
        model, session.float_model(), sequences, settings, work=work, track=session.track
    )
    identity = save_base(model, session.tokenizer, scratch, session.recipe.model.source)
    if report.solver_scales:
        (scratch / SOLVER_SCALES).parent.mkdir()
        save_file(report.solver_scales, scratch / SOLVER_SCALES)
    return (
        identity,
        base_size(model),
        {f.name: getattr(report, f.name) for f in fields(report) if f.name != "solver_scales"},
    )


def calibrate_base(session: Session, stage: Stage, scratch: Path, work: Path) -> Results:
    """Before step 2, in workflow qwa-lora: encodings of the base's activations, which adapters are trained through."""
    simulation = simulate(session.base(), session.example_inputs, session.schemes)
    session.check_rules(simulation.placement)
    report = simulation.calibrate(
        **session.calibration, allow_unseen=session.recipe.simulation.unseen == "float"
    )
    save_simulation(simulation, scratch)
    return {
        "base_simulation": {
            "encodings": len(simulation.encodings),
            "calibration_tokens": report.tokens,
        }
    }


def train(session: Session, stage: Stage, scratch: Path, work: Path) -> Results:
    """Step 2: one adapter on the frozen base, whose fingerprint is the same afterwards."""
    adapter = session.adapter(str(stage.adapter))
    base_identity, seed = session.base_fingerprint, session.recipe.seed
    session.check_rules()
    reset_peak_rss()
    base = session.base()
    start = (
        str(session.path / "adapters" / first.name)
        if (first := session.recipe.start_of(adapter))
        else adapter.start
    )
    model = (
        attach(base, shape_of(adapter), seed)
        if start is None
        else attach_existing(base, start, adapter.unknown_base, seed)
    )
    if session.recipe.workflow == "qwa-lora" and adapter.steps and start is not None:
        without_dropout_(model)
    initialized: Results = {}
    if adapter.init != "zero":
        model, initialized = _initialize(session, model, adapter)
        reset_peak_rss()
    if adapter.steps:
        if session.data.train.position_ids is not None:
            check_isolation(model)
        held_out = session.evaluation if adapter.evaluation_steps else None
        logs = session.path / "logs" / adapter.name
        teacher = session.take_float_model() if adapter.objective == "recovery" else None
        through = (
            session.training_graph(model, adapter.range_learning_rate is not None)
            if session.recipe.workflow == "qwa-lora"
            else None
        )
        report = train_adapter(
            model,
            session.data.train,
            _settings(adapter, seed, through is not None),
            work,
            session.track,
            held_out,
            logs,
            teacher,
            through,
        )
    else:
        through = None
        report = TrainingReport(0, 0.0, 0, check_trainable(model), ())
    if (after := fingerprint(model)) != base_identity:
        raise FingerprintError(
            f"training adapter {adapter.name} changed the base: its fingerprint was {base_identity} and is {after}"
        )
    if is_first_process():
        save_adapter(model, scratch, base_identity)
        if through is not None and (scales := through.scales()):
            save_file(scales, scratch / SCALES)
            manifest.add(scratch, FILE, [SCALES])
    measured: Results = {
        "steps": report.steps,
        "compute": adapter.compute,
        "step_seconds": report.step_seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "base_bytes": report.base_bytes,
        "trainable_parameters": report.trainable_parameters,
        "resumed_from_step": report.resumed_from_step,
        "losses": list(report.losses),
    }
    if adapter.evaluation_steps:
        measured |= {
            "evaluations": [list(e) for e in report.evaluations],
            "best_step": report.best_step,
        }
    if initialized:
        measured["init"] = initialized
    return {"train": {adapter.name: measured}, "data": describe(session.documents, session.data)}


def _initialize(session: Session, model: PeftModel, adapter: Adapter) -> tuple[PeftModel, Results]:
    """Start the adapter from what quantization lost, its ranks by layer if the recipe has a budget for them; returns the errors before and after, by layer."""
    floats = session.take_float_model()

    def weight(path: str) -> Tensor:
        return weight_out_in(floats.get_submodule(path)).detach()

    moments, found = (
        Moments(session.path / "base" / MOMENTS) if adapter.init == "qera" else None,
        {},
    )
    scales = solver_scales(session.path / "base")
    if adapter.rank_budget is not None:
        budget = RankBudget(adapter.rank_budget, adapter.rank_cap or 4 * adapter.rank)
        ranks = rank_by_layer(
            model, budget, weight, moments, track=session.track, solver_scales=scales
        )
        model = attach(model.unload(), with_ranks(shape_of(adapter), ranks), session.recipe.seed)
        found["ranks"] = ranks
    reports = initialize_adapter_(
        model,
        adapter.init,
        weight,
        moments,
        share=adapter.correcting_share,
        track=session.track,
        solver_scales=scales,
    )
    return model, {
        "method": adapter.init,
        **found,
        "layers": {path: asdict(report) for path, report in reports.items()},
    }


def _settings(adapter: Adapter, seed: int, uses_graph: bool) -> TrainingSettings:
    given = {
        f.name: getattr(adapter, f.name)
        for f in fields(TrainingSettings)
        if f.name not in ("seed", "report_to", "loss")
    }
    loss = adapter.loss or ("whole" if uses_graph else "chunked")
    return TrainingSettings(**given, seed=seed, report_to=tuple(adapter.report_to), loss=loss)


def calibrate(session: Session, stage: Stage, scratch: Path, work: Path) -> Results:
    """Step 3: encodings of activations and adapter."""
    if stage.adapter is None:
        return _calibrate_together(session, scratch)
    name, section = stage.adapter, session.recipe.simulation
    simulation = session.new_simulation(name)
    report = simulation.calibrate(**session.calibration, allow_unseen=section.unseen == "float")
    measured: Results = {
        "encodings": len(simulation.encodings),
        "calibration_tokens": report.tokens,
        "constants": list(report.constants),
        "unseen": list(report.unseen),
        "stopped_early": report.stopped_early,
        "equalize": {"method": section.equalize, "layers": session.equalization},
    }
    if section.base_activations != "all":
        measured["perplexity_with_own_encodings"] = perplexity(
            simulation.logits, session.evaluation, "perplexity, own encodings", session.track
        )
        share(simulation, load_encodings(session.path / SHARED), section.base_activations)
    save_simulation(simulation, scratch)
    save_adapter(simulation.origin.model, scratch / ADAPTER, session.base_fingerprint)
    return {"simulation": {name: measured}}


def _calibrate_together(session: Session, scratch: Path) -> Results:
    """Encodings that all adapters share, from what they and the base alone see."""
    section = session.recipe.simulation
    model = session.equalized(*(adapter.name for adapter in session.recipe.adapters))
    simulations = simulate_adapters(
        model, session.example_inputs, session.schemes, section.base_activations
    )
    session.check_rules(*(simulation.placement for simulation in simulations.values()))
    simulations.observe(**session.calibration)
    simulations.freeze(allow_unseen=section.unseen == "float")
    save_encodings(simulations.shared, scratch)
    return {
        "sharing": {
            "base_activations": section.base_activations,
            "encodings": len(simulations.shared),
            "captures": simulations.captures,
        }
    }


def export(session: Session, stage: Stage, scratch: Path, work: Path) -> Results:
    """Files for a runtime, and beside them the adapter, in the factors that they hold."""
    name = str(stage.adapter)
    metadata = {"qwlora.base_fingerprint": session.base_fingerprint, "qwlora.adapter": name}
    export_onnx(session.simulation(name).graph(), scratch, metadata)
    shutil.copytree(session.path / "simulation" / name / ADAPTER, scratch / ADAPTER)
    return {
        "export": {
            "onnx": {name: {"bytes": sum(p.stat().st_size for p in scratch.glob("model.onnx*"))}}
        }
    }


def verify(session: Session, stage: Stage, scratch: Path, work: Path) -> Results:
    """Run the exported file on held-out text and hold it to the recipe's limits."""
    name, section = str(stage.adapter), session.recipe.verify
    folder = session.path / "export" / "onnx" / name
    parity = verify_onnx(
        folder,
        session.simulation(name),
        session.data.held_out.first(section.sequences),
        section.layer_tokens,
        session.track,
    )
    limits = Limits(
        perplexity_difference=section.perplexity_difference,
        layer_steps=section.layer_steps,
        layer_mean_steps=section.layer_mean_steps,
    )
    check_parity(parity, limits, f"export/onnx/{name}")
    return {"parity": {"onnx": {name: parity.to_json()}}}


def evaluate(session: Session, stage: Stage, scratch: Path, work: Path) -> Results:
    """Perplexity of one state of the model on the held-out text."""
    _, kind, *_ = stage.name.split("/")
    name = stage.adapter
    if kind == "simulated":
        logits: Logits = session.simulation(str(name)).logits
    else:
        logits = logits_of(
            session.float_model()
            if kind == "float"
            else session.base()
            if kind == "base"
            else session.adapted(str(name))
        )
    value = perplexity(logits, session.evaluation, f"perplexity, {kind}", session.track)
    return {
        "perplexity": {kind: value if name is None else {name: value}},
        "data": describe(session.documents, session.data),
    }


STAGES: dict[str, StageFunction] = {
    "quantize": quantize,
    "calibrate-base": calibrate_base,
    "train": train,
    "calibrate": calibrate,
    "export": export,
    "verify": verify,
    "evaluate": evaluate,
}
