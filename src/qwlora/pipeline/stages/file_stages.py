"""The stages that write files for runtimes and run them: `export` and `verify`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwlora.adapter.padded_adapters import one_rank
from qwlora.data.sequences import Sequences, one_row
from qwlora.errors import VerificationError
from qwlora.formats import manifest
from qwlora.formats.model_source import fetch, source_path
from qwlora.pipeline.stage import ADAPTER, Stage
from qwlora.pipeline.stages.job_context import JobContext
from qwlora.pipeline.store import NAME
from qwlora.simulation.kv_cache_graph import cache_sizes
from qwlora.simulation.simulation import Simulation
from qwlora.system.atomic import total_bytes
from qwlora.system.parameter_names import BASE
from qwlora.targets.canonical_adapter import read_canonical
from qwlora.targets.onnx.onnx import ZeroAdapter
from qwlora.targets.proof.canary import Canary, read_canary
from qwlora.targets.proof.checks import Limits
from qwlora.targets.proof.contents import RECORD
from qwlora.targets.proof.folder import (
    ROUNDED,
    TEXT,
    proof_record,
    write_files,
    write_proof,
    write_record,
)
from qwlora.targets.proof.prove import (
    Expected,
    expected_of,
    fitting,
    prove,
    proven,
    results_of,
)
from qwlora.targets.proof.readme import facts
from qwlora.targets.proof.reference import BASE_SEQUENCES, first_sequences
from qwlora.targets.refusals import comes_from
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedBase, ExportedGraph, Target, members


def export(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Step 4: write the files."""
    name, adapter, base = stage.name.split("/")[1], stage.adapter, None
    target = TARGETS[name]
    if target.has_cases:
        return {"export": {name: _write_cases(context, target, name, scratch)}}
    exported = _exported(context, target, name, adapter)
    if adapter is not None and target.has_base:
        base = context.path / "export" / name / BASE
    elif adapter is not None:
        # The graph holds the factors among its weights, so PEFT needs them in their own file.
        shutil.copytree(context.path / "simulation" / adapter / ADAPTER, scratch / ADAPTER)
    with context.step(f"writing files for {adapter or BASE}"):
        about, fingerprint = dict[str, Any](), context.base_fingerprint
        if adapter is None:
            made = exported.simulation.origin if target.is_simulated else exported
            about = facts(made.model, context.recipe.model.source)
        canary = _canary(context, name, adapter, exported)
        written = write_files(name, exported, fingerprint, scratch, base, canary, **about)
    return {"export": {name: {NAME if adapter else BASE: written}}}


def _exported(context: JobContext, target: Target, name: str, adapter: str | None) -> Any:
    if target.is_simulated:
        if adapter is None:
            return _graph(context, name, context.zero_adapter(), {})
        metadata = {"qwlora.adapter": adapter}
        return _graph(context, name, context.simulation(adapter), metadata, adapter)
    bits = context.recipe.export.embedding_bits_of(name)
    if adapter is None:
        source = context.recipe.model.source
        gguf_file = fetch(source).path if comes_from(target, source_path(source)) else None
        return ExportedBase(context.base(), context.tokenizer, gguf_file, bits)
    trained = read_canonical(context.path / "adapters" / adapter)
    if target.has_one_shape:
        return replace(trained, common=one_rank([*map(context.ranks, context.recipe.adapters)]))
    return trained.rounded() if bits == 8 and target.rounds_adapters else trained


def _graph(
    context: JobContext,
    target: str,
    simulation: Simulation,
    metadata: dict[str, str],
    adapter: str | None = None,
) -> ExportedGraph:
    recipe, known = context.recipe, TARGETS[target]
    sizes, layout = recipe.export.graphs_of(target), recipe.export.layout_of(target)
    sample = context.sample(adapter or recipe.adapters[0].name)
    # Golden inputs are shipped, so by default they quote no text of the user.
    if known.has_golden and recipe.export.proof != "held_out":
        sample = one_row(context.generated_ids[0])
    return ExportedGraph(
        simulation,
        metadata={"qwlora.base_fingerprint": context.base_fingerprint, **metadata},
        sample=sample,
        encodings_version=recipe.export.encodings_version,
        graphs=() if sizes is None else cache_sizes(sizes.tokens, sizes.context),
        opset=recipe.export.opset,
        updatable=recipe.simulation.base_activations,
        layout=layout,
        # Without a layout, tools that compile graphs read no tokenizer.
        tokenizer=context.tokenizer if layout or not known.cached_graphs else None,
        embedding_bits=recipe.export.embedding_bits_of(target),
    )


def _canary(context: JobContext, name: str, adapter: str | None, exported: Any) -> Canary | None:
    if not TARGETS[name].has_canary or context.recipe.export.canary == "none":
        return None
    if adapter is None:
        return context.canary(context.canary_contexts, lambda: exported.model)
    # Those of the base that is there: what generated them may be gone.
    base = context.path / "export" / name / BASE
    contexts = tuple(read_canary(base)[1].contexts)
    return context.canary(contexts, lambda: context.adapted(adapter), adapter)


def _write_cases(
    context: JobContext, target: Target, name: str, scratch: Path
) -> dict[str, dict[str, int]]:
    cases = {
        case: _graph(context, name, simulation, {"qwlora.use_case": case})
        for case, simulation in context.use_cases.items()
    }
    base = cases.pop(BASE)
    target.backend.write_cases(base, cases, scratch)
    write_record(scratch, name, context.base_fingerprint, use_cases=list(cases))
    sizes = {case: total_bytes(target.backend.own_files(scratch, case)) for case in cases}
    sizes = {BASE: total_bytes(scratch.rglob("*")) - sum(sizes.values()), **sizes}
    return {case: {"bytes": size} for case, size in sizes.items()}


def verify(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Step 5: run the exported files on held-out text, and compare them with what was trained."""
    _, name, *cases = stage.name.split("/")
    target, adapter = TARGETS[name], cases[0] if cases else BASE
    bundle, has_proof = context.path / "export" / name, target.has_proof and adapter != BASE
    ships = context.recipe.export.proof
    texts = [fitting(_held_out(context, adapter), target.parts(bundle, adapter))]
    if has_proof and ships == "generated":
        # The float model may generate it, which must be gone before other models are loaded.
        ids = context.generated_ids[:, : texts[0].input_ids.shape[1]].contiguous()
        texts.append(Sequences(ids, ids.clone()))
    expected = _expected(context, name, adapter, texts)
    limits = Limits(perplexity_difference=context.recipe.verify.perplexity_difference)
    missing = target.missing() if has_proof else None
    measured: dict[str, Any] = {"not_run": missing}
    if missing is None:
        parity = prove(target, bundle, adapter, expected, limits, context.track)
        measured = proven(target, parity, expected.references[0], limits)
    figures = results_of(target, measured, has_proof)
    if has_proof:
        record = proof_record(name, bundle, adapter, limits) | measured
        record |= {TEXT: ships, "base_fingerprint": context.base_fingerprint}
        shipped = first_sequences(expected.references[-1], BASE_SEQUENCES)
        write_proof(scratch, None if ships == "none" else shipped, record)
    results = {"parity": {name: {NAME if cases else BASE: figures}}}
    if problems := figures.get("problems"):
        files = f"export/{name}/{adapter}"
        what = f"{files}: the exported files do not compute what was {figures['of']}"
        raise VerificationError(what, problems, results)
    return results


def _held_out(context: JobContext, adapter: str) -> Sequences:
    recipe = context.recipe
    names = [adapter.name for adapter in recipe.adapters]
    # The text of a use case is that of the first of its adapters.
    owner = next((name for name in members(adapter) if name in names), names[0])
    return context.text(owner).held_out.first(recipe.verify.sequences)


def _expected(context: JobContext, name: str, adapter: str, texts: list[Sequences]) -> Expected:
    target = TARGETS[name]
    if not target.is_simulated:
        model = context.adapted(adapter)
        record = manifest.read(context.path / "export" / name / BASE / RECORD)
        return expected_of(target, model, texts, rounding=record.get(ROUNDED, ()))
    if target.has_cases:
        simulation: Any = context.use_cases[adapter]
    elif adapter == BASE:
        simulation = ZeroAdapter(context.zero_adapter())
    else:
        simulation = context.simulation(adapter)
    # This is loaded after `simulation`, whose capture releases the zero adapter.
    base = context.zero_adapter() if target.has_base and adapter != BASE else None
    return expected_of(target, simulation, texts, context.schemes, base)
