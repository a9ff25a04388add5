"""Step 4: write the files for a runtime; the stages are listed in `plan/plan.py`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from qwlora.export.canonical_adapter import read_canonical
from qwlora.export.proof.folder import WITHOUT_CACHE, record_digest, write_record
from qwlora.export.registry import TARGETS
from qwlora.export.target import BASE, ExportedBase, ExportedGraph, Target
from qwlora.formats.model_source import fetch
from qwlora.pipeline.plan.plan import ADAPTER, Stage
from qwlora.pipeline.running.loaded_models import JobContext
from qwlora.simulation.simulation import Simulation
from qwlora.system.atomic import total_bytes


def run(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Write the files."""
    name, adapter = stage.name.split("/")[1], stage.adapter
    target, bundle = TARGETS[name], context.path / "export" / name
    if target.has_cases:
        return {"export": {name: _write_cases(context, target, name, scratch)}}
    record, reason = {"base_fingerprint": context.base_fingerprint}, None
    exported = _exported(context, target, name, adapter)
    with context.step(f"writing files for {adapter or BASE}"):
        if adapter is None:
            reason = target.backend.write_base(exported, scratch)
        else:
            target.backend.write_adapter(exported, bundle / BASE, scratch)
    written: dict[str, Any] = {"bytes": total_bytes(scratch.glob(target.model_files))}
    if target.is_simulated:
        holds_base = adapter is None or not target.has_base
        if holds_base and not target.cached_graphs:  # a program gives it text of any length
            context.tokenizer.save_pretrained(scratch)
        if adapter is not None:
            shutil.copytree(context.path / "simulation" / adapter / ADAPTER, scratch / ADAPTER)
            record["adapter"] = adapter
            if target.has_base:
                record["base"] = record_digest(bundle / BASE)
    if reason is not None:
        written[WITHOUT_CACHE] = record[WITHOUT_CACHE] = reason
    write_record(scratch, record)
    return {"export": {name: {adapter or BASE: written}}}


def _exported(context: JobContext, target: Target, name: str, adapter: str | None) -> Any:
    """The base or an adapter, as the target's writers take it."""
    if target.is_simulated:
        if adapter is None:
            return _graph(context, name, context.zero_adapter(), {})
        metadata = {"qwlora.adapter": adapter}
        return _graph(context, name, context.simulation(adapter), metadata, adapter)
    if adapter is None:
        location = fetch(context.recipe.model.source)
        gguf_file = location.path if location.gguf_file else None
        return ExportedBase(context.base(), context.tokenizer, gguf_file)

    return read_canonical(context.path / "adapters" / adapter)


def _graph(
    context: JobContext,
    target: str,
    simulation: Simulation,
    metadata: dict[str, str],
    adapter: str | None = None,
) -> ExportedGraph:
    recipe = context.recipe
    sizes = recipe.export.graphs_of(target)
    return ExportedGraph(
        simulation,
        {"qwlora.base_fingerprint": context.base_fingerprint, **metadata},
        context.sample(adapter or recipe.adapters[0].name),
        recipe.export.encodings_version,
        {} if sizes is None else {"prefill": sizes.prefill, "decode": sizes.decode},
        0 if sizes is None else sizes.context,
        recipe.simulation.base_activations,
    )


def _write_cases(
    context: JobContext, target: Target, name: str, scratch: Path
) -> dict[str, dict[str, int]]:
    """Write all use cases; returns the size of what belongs to each, and of all other files."""
    cases = {
        case: _graph(context, name, simulation, {"qwlora.use_case": case})
        for case, simulation in context.use_cases.items()
    }
    base = cases.pop(BASE)
    target.backend.write_cases(base, cases, scratch)
    record = {"base_fingerprint": context.base_fingerprint, "use_cases": list(cases)}
    write_record(scratch, record)
    sizes = {case: total_bytes(target.backend.own_files(scratch, case)) for case in cases}
    sizes = {BASE: total_bytes(scratch.rglob("*")) - sum(sizes.values()), **sizes}
    return {case: {"bytes": size} for case, size in sizes.items()}
