"""Stages of step 4: write the files for a runtime.

export/TARGET/NAME    the simulation of an adapter as a model, or, of a bundle, the adapter
export/TARGET         of a bundle: the base, in the folder export/TARGET/base; of a use case
                      target: everything
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.export.proof.folder import (
    BASE,
    WITHOUT_CACHE,
    record_digest,
    without_cache,
    write_record,
)
from qwlora.export.registry import TARGETS
from qwlora.export.target import (
    BundleTarget,
    ExportedBase,
    ExportedGraph,
    ExportedUseCases,
    GraphTarget,
    SwitchableTarget,
    UseCasesTarget,
    WeightsTarget,
)
from qwlora.formats.model_source import fetch
from qwlora.pipeline.job.job_paths import ADAPTER
from qwlora.pipeline.plan.stage import PlanBuilder, Stage
from qwlora.pipeline.stages.calibrate_stage import CASES, ZERO

if TYPE_CHECKING:
    from qwlora.pipeline.running.loaded_models import JobContext


NAME = "export"
SWITCHABLE_FORMAT = 3  # before it, there was no tokenizer
GRAPHS_FORMAT = 1  # before it, 4-bit weights had no scales by block


def add_base(plan: PlanBuilder, target: str) -> None:
    """Add the stage that writes the base, if the target has one."""
    kind, stage = TARGETS[target], f"{NAME}/{target}"
    if isinstance(kind, SwitchableTarget):
        inputs = [SWITCHABLE_FORMAT, *_version(plan)]
        plan.add(stage, inputs, (ZERO,), None, f"{stage}/{BASE}")
    elif isinstance(kind, WeightsTarget):
        plan.add(stage, [], ("quantize",), None, f"{stage}/{BASE}")


def add(plan: PlanBuilder, target: str, name: str) -> None:
    """Add the stage of one target and adapter."""
    stage, kind = f"{NAME}/{target}/{name}", TARGETS[target]
    needs = [f"train/{name}" if isinstance(kind, WeightsTarget) else f"calibrate/{name}"]
    if isinstance(kind, BundleTarget):
        needs.insert(0, f"{NAME}/{target}")
    inputs = [*_version(plan), *_graphs(plan, target)]
    plan.add(stage, inputs, tuple(needs), name, stage)


def _version(plan: PlanBuilder) -> list[str]:
    """The version of encodings files, unless it is the default."""
    version = plan.recipe.export.encodings_version
    return [] if version == type(plan.recipe.export)().encodings_version else [version]


def _graphs(plan: PlanBuilder, target: str) -> list[Any]:
    """The sizes of graphs with a cache, if the target writes some."""
    graphs = plan.recipe.export.graphs_of(target)
    return [] if graphs is None else [graphs.model_dump()]


def add_use_cases(plan: PlanBuilder, target: str) -> None:
    """Add the stage of a use case target."""
    stage, section, kind = f"{NAME}/{target}", plan.recipe.export, TARGETS[target]
    assert isinstance(kind, UseCasesTarget)
    inputs: list[Any] = [section.encodings_version, *_graphs(plan, target)]
    if kind.compiled:  # they are compiled once the compiler is installed
        inputs = [*_graphs(plan, target), kind.missing(), GRAPHS_FORMAT]
    plan.add(stage, inputs, (CASES,), None, stage)


def run(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Write the files."""
    _, name, *_ = stage.name.split("/")
    target = TARGETS[name]
    if isinstance(target, UseCasesTarget):
        return {"export": {name: _write_use_cases(context, target, name, scratch)}}
    if isinstance(target, GraphTarget):
        size = _write_graph(context, target, name, str(stage.adapter), scratch)
    else:
        if isinstance(target, SwitchableTarget):
            _write_switchable(context, target, name, stage.adapter, scratch)
        else:
            _write_weights(context, name, stage.adapter, scratch)
        size = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())
    written: dict[str, Any] = {"bytes": size}
    if stage.adapter is None and (reason := without_cache(scratch)) is not None:
        written[WITHOUT_CACHE] = reason
    return {"export": {name: {stage.adapter or BASE: written}}}


def _write_graph(
    context: JobContext, target: GraphTarget, name: str, adapter: str, scratch: Path
) -> int:
    """Write a simulation, with its calibrated adapter; returns the size of the model."""
    exported = _with_graphs(_exported(context, adapter), context, name)
    with context.step(f"writing files for {adapter}"):
        target.write(exported, scratch)
    size = sum(path.stat().st_size for path in scratch.glob(target.model_files))
    if not target.cached_graphs:  # a program gives it text of any length
        context.tokenizer.save_pretrained(scratch)
    _add_adapter(context, adapter, scratch)
    return size


def _write_switchable(
    context: JobContext, target: SwitchableTarget, name: str, adapter: str | None, scratch: Path
) -> None:
    """Write the zero adapter's simulation, or what an adapter changes in it."""
    exported = _exported(context, adapter)
    with context.step(f"writing files for {adapter or BASE}"):
        if adapter is None:
            updatable = context.recipe.simulation.base_activations
            reason = target.write_base(exported, updatable, scratch)
            context.tokenizer.save_pretrained(scratch)
            record = {"base_fingerprint": context.base_fingerprint}
            if reason is not None:
                record[WITHOUT_CACHE] = reason
            write_record(scratch, record)
        else:
            base = context.path / NAME / name / BASE
            target.write_adapter(exported, base, scratch)
            _add_adapter(context, adapter, scratch, {"base": record_digest(base)})


def _exported(context: JobContext, adapter: str | None) -> ExportedGraph:
    """The simulation of an adapter, or of the zero adapter, as targets take it."""
    from qwlora.pipeline.stages.zero_adapter import zero_adapter_simulation

    metadata = {"qwlora.base_fingerprint": context.base_fingerprint}
    if adapter is None:
        simulation = zero_adapter_simulation(context)
    else:
        simulation = context.simulation(adapter)
        metadata["qwlora.adapter"] = adapter
    sample = context.sample(adapter or context.recipe.adapters[0].name)
    return ExportedGraph(simulation, metadata, sample, context.recipe.export.encodings_version)


def _with_graphs(exported: ExportedGraph, context: JobContext, target: str) -> ExportedGraph:
    """The same with the sizes of graphs with a cache, if the target writes some."""
    graphs = context.recipe.export.graphs_of(target)
    if graphs is None:
        return exported
    sizes = {"prefill": graphs.prefill, "decode": graphs.decode}
    return replace(exported, graphs=sizes, context=graphs.context)


def _add_adapter(
    context: JobContext, adapter: str, scratch: Path, of: Mapping[str, str] | None = None
) -> None:
    """Add the adapter as it was calibrated, and the record of the files.

    Args:
        of: digest of the base's record, in a bundle.
    """
    shutil.copytree(context.path / "simulation" / adapter / ADAPTER, scratch / ADAPTER)
    record = {"base_fingerprint": context.base_fingerprint, "adapter": adapter, **(of or {})}
    write_record(scratch, record)


def _write_use_cases(
    context: JobContext, target: UseCasesTarget, name: str, scratch: Path
) -> dict[str, dict[str, int]]:
    """Write all use cases; returns the size of what belongs to each, and of all other files."""
    from qwlora.pipeline.stages.use_cases import use_case_simulations

    simulations = use_case_simulations(context)
    sample = context.sample(context.recipe.adapters[0].name)
    section = context.recipe.export
    made = {}
    for case, simulation in simulations.items():
        metadata = {"qwlora.base_fingerprint": context.base_fingerprint, "qwlora.use_case": case}
        exported = ExportedGraph(simulation, metadata, sample, section.encodings_version)
        made[case] = _with_graphs(exported, context, name)
    base = made.pop(BASE)
    exported_cases = ExportedUseCases(base, made, context.recipe.simulation.base_activations)
    target.write(exported_cases, scratch)
    record = {"base_fingerprint": context.base_fingerprint, "use_cases": list(made)}
    write_record(scratch, record)
    sizes = {
        case: {"bytes": sum(file.stat().st_size for file in target.own_files(scratch, case))}
        for case in made
    }
    whole = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())
    return {BASE: {"bytes": whole - sum(size["bytes"] for size in sizes.values())}, **sizes}


def _write_weights(context: JobContext, name: str, adapter: str | None, scratch: Path) -> None:
    """Write the base, or an adapter as it was trained, and which base they are of."""
    from qwlora.export.canonical_adapter import read_canonical

    target = TARGETS[name]
    assert isinstance(target, WeightsTarget)
    if adapter is None:
        location = fetch(context.recipe.model.source)
        gguf_file = location.path if location.gguf_file else None
        target.write_base(ExportedBase(context.base(), context.tokenizer, gguf_file), scratch)
    else:
        canonical = read_canonical(context.path / "adapters" / adapter)
        target.write_adapter(canonical, context.path / NAME / name / BASE, scratch)
    record = {"base_fingerprint": context.base_fingerprint}
    write_record(scratch, record)
