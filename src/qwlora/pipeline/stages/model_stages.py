"""The stages that make models and measure them: `quantize`, `train`, `calibrate` and `evaluate`."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qwlora.adapter.adapter_deltas import adapter_updates
from qwlora.adapter.adapter_files import CONFIG, FILE, WEIGHTS
from qwlora.adapter.adapter_folder import save_adapter
from qwlora.adapter.attach import check_trainable
from qwlora.adapter.initialize import initialize_
from qwlora.adapter.train import TrainingReport, train_adapter
from qwlora.analysis.generate_text import Sampling, generate_text, sample_sequences
from qwlora.analysis.quantization_costs import encodings_summary
from qwlora.analysis.token_scores import COMPARED, Logits, logits_of, score_tokens
from qwlora.data.prepared_data import PreparedText
from qwlora.data.sequences import IGNORED, Sequences, check_isolation
from qwlora.errors import FingerprintError, QwloraWarning, SourceError, foreign_as
from qwlora.formats.base_folder import save_base
from qwlora.formats.model_card import public_name
from qwlora.formats.open_checkpoint import load_precomputed
from qwlora.graph.capture import takes_cache
from qwlora.grid.scheme import short_name
from qwlora.grid.second_moments import LayerMoments
from qwlora.nn.fingerprint import fingerprint
from qwlora.nn.packed_layer import unpack_linears_
from qwlora.pipeline.stage import (
    ACTIVATIONS,
    ADAPTER,
    CASES,
    RULES,
    SAMPLE,
    SAMPLED_IDS,
    SHARED,
    SOLVER_SCALES,
    ZERO,
    Stage,
)
from qwlora.pipeline.stages.job_context import JobContext
from qwlora.pipeline.store import NAME, TEXT_NAME
from qwlora.quantize.bit_budget import BitBudget
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
from qwlora.recipe import Adapter, implied
from qwlora.recipe.implied import REFERENCE
from qwlora.recipe.model_files import model_files, second_rounding
from qwlora.recipe.recipe_text import rules_text
from qwlora.simulation.adapter_simulations import apply_shared_encodings, simulate_adapters
from qwlora.simulation.saved_simulation import load_encodings, save_encodings
from qwlora.simulation.simulation import Simulation
from qwlora.simulation.training_graph import TrainingGraph
from qwlora.system.atomic import write_text
from qwlora.system.machine import peak_rss_bytes, process_count, reset_peak_rss
from qwlora.system.parameter_names import BASE
from qwlora.system.processes import is_first_process
from qwlora.targets.canonical_adapter import peft_names, share_unaffected
from qwlora.targets.target import NONE, members

# Of an adapter's text, for init qera; four times as many end alike (docs/log/initialization.md).
INIT_TOKENS = 4096
ANSWERING, ANSWER, PROMPTS = ("float", "base", "adapted"), Sampling(max_new_tokens=48), 3


def _sample(context: JobContext, scratch: Path) -> dict[str, Any]:
    recipe, sampled = context.recipe, dict[str, Tensor]()
    # If it is in memory already, the next stage quantizes it there. Else it is released, and the
    # next stage reads the files block by block.
    is_held = context.holds_float_model
    model = context.float_model() if is_held else context.take_float_model()
    for number, count in implied.sampled_sequences(recipe).items():
        temperature = recipe.base.calibration[number].temperature
        settings = (count, recipe.data.sequence_tokens, temperature, recipe.seed + number)
        ids = sample_sequences(model, context.tokenizer, *settings, track=context.track)
        sampled[str(number)] = ids
    save_file(sampled, scratch / SAMPLED_IDS)
    return {"sampled": {"sequences": sum(map(len, sampled.values()))}}


def quantize(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Step 1: quantize the base, and tune it if the recipe asks for it."""
    if stage.name == SAMPLE:
        return _sample(context, scratch) if is_first_process() else {}
    if stage.name == ACTIVATIONS:
        return _calibrate_base(context, scratch)
    recipe, measured = context.recipe, dict[str, Any]()
    folder = scratch if is_first_process() else None
    # Tuning reads a finished base, so the solved one is stored first.
    if folder is not None and recipe.base.tuning.steps:
        folder = work / "solved"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    note = second_rounding(recipe)
    if folder is not None or implied.is_calibrated(recipe):
        with warnings.catch_warnings():
            if note:  # which `preflight` has said
                warnings.filterwarnings("ignore", "some weights had been quantized before")
            identity, report = _write_base(context, folder, work)
    if folder is None:
        return {}
    size = report.size
    if recipe.base.tuning.steps:
        identity, size, measured["tuning"] = _tune(context, folder, scratch, work)
    if (rotated := context.rotation) is not None:
        measured["rotation"] = {
            "width": rotated.width,
            "heads": len(rotated.heads),
            "untied": list(rotated.untied),
            "difference": rotated.difference,
        }
    if report.budget_rules:
        rules = [rule.model_dump(exclude_none=True) for rule in recipe.base.rules]
        rules += [
            {"match": rule.match, "weights": short_name(rule.scheme)}
            for rule in report.budget_rules
            if rule.scheme is not None
        ]
        write_text(scratch / RULES, rules_text(rules))
    if note:
        measured["second_rounding"] = note
    return {
        "base": {
            **asdict(size),
            "bits_per_weight": size.bits_per_weight,
            "fingerprint": identity,
            "device": context.device.type,
            "layers": {name: asdict(layer) for name, layer in report.layers.items()},
            **measured,
        }
    }


def _write_base(
    context: JobContext, scratch: Path | None, work: Path
) -> tuple[str, QuantizeReport]:
    """Quantize and write the base; without `scratch`, only share in it."""
    recipe, base, track = context.recipe, context.recipe.base, context.track
    source, tokenizer = public_name(recipe.model.source), context.tokenizer
    scheme, calibration = base.scheme, None
    if implied.is_calibrated(recipe):
        calibration = context.base_calibration_ids(base.calibration_sequences)
    arguments: dict[str, Any] = {
        "rules": base.layer_rules(),
        "calibration": calibration,
        "work": None if scratch is None else work,
        "settings": {
            solver.name: solver.settings_of(getattr(base, solver.name).model_dump())
            for solver in SOLVERS.values()
            if solver.settings
        },
        "track": track,
    }
    if base.has_budget:
        arguments["budget"] = BitBudget(base.bits, base.bytes, recipe.budget_schemes())
    if base.solver == "keep":
        model: Any = load_precomputed(model_files(recipe.model), track)
        model.to(context.device)
        report = QuantizeReport(base_size(model))
    elif context.lazy is not None and not context.holds_float_model:
        # One block at a time: 3 billion weights, 11.2 GiB as float32, peak at 1.9 GiB
        # (docs/log/formats.md).
        files, arguments["device"] = context.lazy.checkpoint, context.device
        return quantize_checkpoint(
            files, tokenizer, scratch, source, scheme, base.solver, **arguments
        )
    else:
        model = context.take_float_model()
        report = quantize_(model, scheme, base.solver, **arguments)
    return save_base(model, scratch, tokenizer, source=source) if scratch else "", report


def _tune(
    context: JobContext, solved: Path, scratch: Path, work: Path
) -> tuple[str, BaseSize, dict[str, Any]]:
    section, model = context.recipe.base.tuning, context.load_base(solved)
    settings = TuningSettings(**section.model_dump(), seed=context.recipe.seed)
    sequences = context.base_calibration_ids(section.steps + HELD_OUT_SEQUENCES)
    report = tune_(
        model, context.float_model(), sequences, settings, work=work, track=context.track
    )
    source = public_name(context.recipe.model.source)
    identity = save_base(model, scratch, context.tokenizer, source=source)
    # An adapter's start corrects the solver's error, not what tuning moved: at 3 bits it ends at
    # 1.062 of float LoRA instead of 1.073 (docs/log/initialization.md).
    if report.solver_scales:
        (scratch / SOLVER_SCALES).parent.mkdir()
        save_file(report.solver_scales, scratch / SOLVER_SCALES)
    measured = {key: value for key, value in vars(report).items() if key != "solver_scales"}
    return identity, base_size(model), measured


def train(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Step 2: train one adapter on the frozen base, and check that the base stays as it is."""
    adapter = context.adapter(str(stage.adapter))
    if stage.name == implied.reference_stage(context.recipe, adapter):
        return _train_reference(context, adapter, scratch, work)
    identity = context.base_fingerprint
    # A mistyped rule must not be found after hours of training.
    context.check_rules()
    reset_peak_rss()
    model = context.untrained(adapter)
    initialized: dict[str, Any] = {}
    if adapter.init != "zero":
        initialized = _initialize(context, model, adapter)
        reset_peak_rss()
    report = _train_adapter(context, model, adapter, work)
    if (after := fingerprint(model)) != identity:
        raise FingerprintError(
            f"training adapter {adapter.name} changed the base: its fingerprint was "
            f"{identity} and is now {after}. The adapter was not saved; report this as a bug"
        )
    updates: dict[str, Any] = {}
    if is_first_process():
        updates = adapter_updates(model)
        # An imported adapter names the model it was trained on, which is not this base.
        for config in model.peft_config.values():
            config.base_model_name_or_path = None
        save_adapter(model, scratch, identity)
    recipe = context.recipe
    settings = adapter.model_dump(mode="json", exclude_defaults=True, exclude={"name", "data"})
    data = recipe.data_of(adapter).model_dump(mode="json", exclude_defaults=True)
    settings |= {"data": data, "seed": recipe.seed, "workflow": recipe.workflow}
    measured: dict[str, Any] = {
        **_measured(context, adapter, report),
        "settings": settings,
        "layers": updates,
        **initialized,
    }
    if not adapter.evaluation_steps:
        del measured["evaluations"], measured["best_step"]
    return {"train": {NAME: measured}, "data": context.text(adapter.name).describe()}


def _train_reference(
    context: JobContext, adapter: Adapter, scratch: Path, work: Path
) -> dict[str, Any]:
    reset_peak_rss()
    # The float model has no error to correct, so the adapter starts as `init: zero` does. It has no
    # activation grids either, also in workflow qwa-lora.
    model = context.untrained(adapter, reference=True)
    report = _train_adapter(context, model, adapter, work, reference=True)
    if is_first_process():
        save_adapter(model, scratch)
    return {REFERENCE: {"train": {NAME: _measured(context, adapter, report)}}}


def _measured(context: JobContext, adapter: Adapter, report: TrainingReport) -> dict[str, Any]:
    passed = report.steps * adapter.step_sequences
    return {
        **asdict(report),
        "compute": adapter.compute,
        "epochs": passed / len(context.text(adapter.name).train),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _train_adapter(
    context: JobContext, model: PeftModel, adapter: Adapter, work: Path, reference: bool = False
) -> TrainingReport:
    if not adapter.steps:
        return TrainingReport(0, 0.0, 0, check_trainable(model), [])
    text = context.text(adapter.name)
    if text.train.position_ids is not None:
        check_isolation(model)
    teacher = context.take_float_model() if adapter.objective == "recovery" else None
    graph, who, logs = None, adapter.name, context.path / "logs" / adapter.name
    if reference:
        who, logs = f"{who} on the float model", logs / "float"
    elif context.recipe.workflow == "qwa-lora":  # train through calibrated base activations
        graph = TrainingGraph(context.simulate(model.eval()))
    sequences = text.train
    if implied.recovers_on_base_text(context.recipe, adapter):
        count = adapter.steps_on(len(sequences)) * adapter.step_sequences
        rows = [batch[0] for batch in context.base_calibration_ids(count)]
        sequences = Sequences(pad_sequence(rows, True), pad_sequence(rows, True, IGNORED))
    tokens = adapter.step_sequences * sequences.input_ids.shape[1]

    def described(progress: dict[str, Any]) -> dict[str, Any]:
        rate = tokens / (progress["step_seconds"] or math.inf)
        return {"adapter": who, "tokens_per_second": rate, **progress}

    return train_adapter(
        model,
        sequences,
        adapter.training_settings(context.recipe.seed, len(text.train)),
        work,
        text.evaluation if adapter.evaluation_steps else None,
        teacher,
        graph,
        track=context.track,
        logs=logs,
        watch=lambda progress: context.on_training(lambda: described(progress())),
    )


def init_count(rows: Tensor) -> int:
    """How many sequences `init: qera` observes, of the length of `rows` [count, tokens]."""
    return max(-(-INIT_TOKENS // rows.shape[1]), process_count())


def _initialize(context: JobContext, model: PeftModel, adapter: Adapter) -> dict[str, Any]:
    """Correct the quantization error; returns `init` of results.json."""
    weight = context.float_weight()
    assert weight is not None, "the recipe refuses init with base.solver keep"
    moments: Iterable[tuple[str, LayerMoments]] = ()
    if adapter.init == "qera":
        rows: Any = context.text(adapter.name).joined_ids
        count = init_count(rows)
        rows = rows[:count]
        if implied.recovers_on_base_text(context.recipe, adapter):
            rows = context.base_calibration_ids(count)
        # Of another copy of the base: this model's layers are corrected one after another.
        observed = context.load_base(context.path / "base")
        moments = observe_moments(observed, rows, track=context.track)
    reports = initialize_(
        model,
        adapter.init,
        weight,
        moments,
        share=context.recipe.init_share(adapter),
        track=context.track,
        solver_scales=solver_scales(context.path / "base"),
    )
    layers = {path: asdict(report) for path, report in reports.items()}
    return {"init": {"method": adapter.init, "layers": layers}}


def solver_scales(base: Path) -> dict[str, Tensor]:
    """Scales of the base in a folder before tuning, by layer; empty if it was not tuned."""
    path = base / SOLVER_SCALES
    what = f"base {str(base)!r}: {path.name} cannot be read"
    with foreign_as(SourceError, what, "delete it and quantize again"):
        return load_file(path) if path.exists() else {}


def _calibrate_base(context: JobContext, scratch: Path) -> dict[str, Any]:
    simulation = context.simulate(context.base())
    context.check_rules(simulation.placement)
    report = context.calibrate(simulation)
    simulation.save(scratch)
    counts = {"encodings": len(simulation.encodings), "calibration_tokens": report.tokens}
    return {"base_simulation": counts}


def calibrate(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Step 3: calibrate an adapter, shared encodings, the zero adapter or use cases."""
    if stage.adapter is not None:
        return _calibrate_adapter(context, stage.adapter, scratch)
    others = {CASES: _calibrate_use_cases, ZERO: _calibrate_zero_adapter}
    return others.get(stage.name, _calibrate_shared)(context, scratch)


def _calibrate_adapter(context: JobContext, name: str, scratch: Path) -> dict[str, Any]:
    simulation = context.new_simulation(name)
    report = context.calibrate(simulation, name)
    measured: dict[str, Any] = {
        "encodings": len(simulation.encodings),
        "calibration_tokens": report.tokens,
        "constants": list(report.constants),
        "unseen": list(report.unseen),
    }
    if context.recipe.simulation.base_activations != "all":
        # What sharing costs is known only now: the shared encodings replace the adapter's own.
        text, label = context.text(name).evaluation, "perplexity, own encodings"
        scores = score_tokens(simulation.logits, text, label, context.track)
        measured["perplexity_with_own_encodings"] = scores.perplexity
    _apply_shared(context, simulation)
    measured |= encodings_summary(simulation)
    simulation.save(scratch)
    # The adapter as it was calibrated: the one in `adapters` may be trained again meanwhile.
    (scratch / ADAPTER).mkdir()
    for file in (CONFIG, WEIGHTS, FILE):
        shutil.copyfile(context.path / "adapters" / name / file, scratch / ADAPTER / file)
    return {"simulation": {NAME: measured}}


def _apply_shared(context: JobContext, simulation: Simulation) -> None:
    shares = context.recipe.simulation.base_activations
    if shares != "all":
        apply_shared_encodings(simulation, load_encodings(context.path / SHARED), shares)


def _calibrate_shared(context: JobContext, scratch: Path) -> dict[str, Any]:
    names = [adapter.name for adapter in context.recipe.adapters]
    shares = context.recipe.simulation.base_activations
    model = context.adapted(*names)
    with context.step("capturing the graph"):
        example = context.example_inputs(model)
        simulations = simulate_adapters(model, example, context.schemes, shares)
    context.check_rules(*(simulation.placement for simulation in simulations.values()))
    simulations.observe(**context.calibration(*names))
    simulations.freeze(allow_unseen=context.allow_unseen)
    save_encodings(simulations.shared, scratch)
    counts = {"encodings": len(simulations.shared), "captures": simulations.captures}
    return {"sharing": {"base_activations": shares, **counts}}


def _calibrate_zero_adapter(context: JobContext, scratch: Path) -> dict[str, Any]:
    simulation = context.new_zero_adapter()
    context.calibrate(simulation)
    _apply_shared(context, simulation)
    simulation.save(scratch)
    return {"zero_adapter": {"encodings": len(simulation.encodings)}}


def _calibrate_use_cases(context: JobContext, scratch: Path) -> dict[str, Any]:
    recipe, simulations = context.recipe, context.new_use_cases()
    cases = recipe.use_cases()
    texts = {name: members(case) for case, name in peft_names(cases).items() if case != NONE}
    texts[BASE] = [adapter.name for adapter in recipe.adapters]
    batches = {name: context.calibration(*adapters)["batches"] for name, adapters in texts.items()}
    simulations.observe(batches, context.track, recipe.simulation.calibration_tokens)
    simulations.freeze(allow_unseen=context.allow_unseen)
    share_unaffected(simulations)
    for name, simulation in simulations.items():
        simulation.save(scratch / name)
    return {"use_cases": {case: {"adapters": members(case)} for case in cases}}


def evaluate(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Score a model on held-out text, and compare it with the float model on the same tokens."""
    kind, name, other = stage.kind.split("/")[1], stage.adapter, stage.text or ""
    text = context.text(other or name)
    adapter = None if name is None else context.adapter(name)
    of_reference = not other and implied.compared_with(context.recipe, kind, adapter) is not None
    if kind == "imported":
        logits, reference = _imported_logits(context, str(name))
    else:
        model, reference = _model(context, kind, str(name)), None
        logits = model.logits if isinstance(model, Simulation) else logits_of(model)
        if implied.is_compared(kind, other) and context.sources.holds_floats:
            # After a base, since loading one releases the float model, which must not stay in
            # memory through the stages that follow. It runs again for every model: keeping its
            # logits would take gigabytes.
            floats = context.reference(str(name)) if of_reference else context.take_float_model()
            reference = logits_of(floats)
    what = f"perplexity, {kind} on the text of {other}" if other else f"perplexity, {kind}"
    scores = score_tokens(logits, text.evaluation, what, context.track, reference)
    results: dict[str, Any] = {"data": text.describe()}
    measured = scores.to_json()
    # An adapter answers prompts of its own text only: the report shows no others.
    is_shown = kind in ANSWERING and not (name and other)
    if is_shown and (answers := _answers(context, model, text)):
        measured["answers"] = answers
    for key, value in measured.items():
        by_model = {kind: value if name is None else {NAME: value}}
        into = results.setdefault(REFERENCE, {}) if of_reference and key in COMPARED else results
        into[key] = {"on": {TEXT_NAME: by_model}} if other else by_model
    return results


def _model(context: JobContext, kind: str, name: str) -> Any:
    if kind == "simulated":
        return context.simulation(name)
    if kind in ("float", "base"):
        return context.float_model() if kind == "float" else context.base()
    return context.reference(name) if kind == REFERENCE else context.adapted(name)


def _answers(context: JobContext, model: Any, text: PreparedText) -> list[dict[str, str]]:
    """Greedy answers to held-out prompts, for people to read; none if the model cannot generate.
    Linear layers of the model may be floats afterwards."""
    if not (model.can_generate() and takes_cache(model)):
        return []
    answers, tokenizer = list[dict[str, str]](), context.tokenizer
    try:
        unpack_linears_(model)
        for prompt, ids in context.track(islice(text.prompts(tokenizer), PROMPTS), "answers"):
            answer = generate_text(model, tokenizer, ids[None], ANSWER, lambda part: None)
            answers.append({"prompt": prompt, "answer": answer.text})
    # A model's own code may fail; no figure depends on the answers.
    except Exception as error:
        message = f"the report shows no answers of the model: {type(error).__name__}: {error}"
        warnings.warn(message, QwloraWarning, stacklevel=2)
    return answers


def _imported_logits(context: JobContext, name: str) -> tuple[Logits, Logits]:
    imported = context.imported(name)
    logits = logits_of(imported)

    def without_adapter(ids: Tensor) -> Tensor:
        with imported.disable_adapter():
            return logits(ids)

    return logits, without_adapter
