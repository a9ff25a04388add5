"""The stages that write files for runtimes and run them: `export/TARGET/NAME` and
`verify/TARGET/NAME`. `verify/TARGET` is the zero adapter."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwlora.adapter.adapter_files import read_config
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
from qwlora.system.progress import one_step
from qwlora.targets.canonical_adapter import read_canonical
from qwlora.targets.npu.kv_cache_graphs import has_graphs, most_tokens
from qwlora.targets.onnx.onnx import ZeroAdapter
from qwlora.targets.proof.checks import Limits, Parity, only_finite, verdict
from qwlora.targets.proof.compare import compare_layers
from qwlora.targets.proof.folder import (
    MODEL_CLASS,
    RECORD,
    TEXT,
    WITHOUT_CACHE,
    current_proofs,
    is_of_base,
    record_digest,
    write_proof,
    write_record,
)
from qwlora.targets.proof.measure import compare_cache, measure, proven, switching
from qwlora.targets.proof.readme import facts, write_readme
from qwlora.targets.proof.reference import (
    BASE_SEQUENCES,
    Reference,
    first_sequences,
    least_noise,
    make_reference,
    reference_of_trained,
    simulated_logits,
)
from qwlora.targets.refusals import comes_from
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedBase, ExportedGraph, Target, members

INVOCATION = "alora_invocation_tokens"  # in an adapter's configuration, and in a proof
_SHIPPED = ("perplexity", "top1_agreement")  # figures of the text in a proof


def export(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Step 4: write the files."""
    name, adapter = stage.name.split("/")[1], stage.adapter
    target, bundle = TARGETS[name], context.path / "export" / name
    if target.has_cases:
        return {"export": {name: _write_cases(context, target, name, scratch)}}
    record, facts_of_base = {"target": name, "base_fingerprint": context.base_fingerprint}, {}
    exported = _exported(context, target, name, adapter)
    with context.step(f"writing files for {adapter or BASE}"):
        if adapter is not None:
            target.backend.write_adapter(exported, bundle / BASE, scratch)
        elif (reason := target.backend.write_base(exported, scratch)) is not None:
            facts_of_base[WITHOUT_CACHE] = reason
    written = {"bytes": total_bytes(scratch.glob(target.model_files))}
    if isinstance(exported, ExportedBase):
        facts_of_base[MODEL_CLASS] = type(exported.model).__name__
    if target.is_simulated and adapter is not None and target.has_base:
        record["base"] = record_digest(bundle / BASE)
    elif target.is_simulated:
        if not target.cached_graphs:  # tools that compile these read no tokenizer
            context.tokenizer.save_pretrained(scratch)
        if adapter is not None:  # its factors are not in a file of their own
            shutil.copytree(context.path / "simulation" / adapter / ADAPTER, scratch / ADAPTER)
    write_record(scratch, record | facts_of_base)
    return {"export": {name: {NAME if adapter else BASE: written | facts_of_base}}}


def _exported(context: JobContext, target: Target, name: str, adapter: str | None) -> Any:
    """The base or an adapter, as the target's writers take it."""
    if target.is_simulated:
        if adapter is None:
            return _graph(context, name, context.zero_adapter(), {})
        metadata = {"qwlora.adapter": adapter}
        return _graph(context, name, context.simulation(adapter), metadata, adapter)
    if adapter is None:
        source = context.recipe.model.source
        gguf_file = fetch(source).path if comes_from(target, source_path(source)) else None
        bits = context.recipe.export.embedding_bits_of(name)
        return ExportedBase(context.base(), context.tokenizer, gguf_file, bits)
    return read_canonical(context.path / "adapters" / adapter, target.holds_invocation)


def _graph(
    context: JobContext,
    target: str,
    simulation: Simulation,
    metadata: dict[str, str],
    adapter: str | None = None,
) -> ExportedGraph:
    recipe = context.recipe
    sizes = recipe.export.graphs_of(target)
    sample = context.sample(adapter or recipe.adapters[0].name)
    if TARGETS[target].has_golden and recipe.export.proof != "held_out":
        sample = one_row(context.generated_ids[0])
    return ExportedGraph(
        simulation,
        metadata={"qwlora.base_fingerprint": context.base_fingerprint, **metadata},
        sample=sample,
        encodings_version=recipe.export.encodings_version,
        graphs=() if sizes is None else cache_sizes(sizes.tokens, sizes.context),
        opset=recipe.export.opset,
        updatable=recipe.simulation.base_activations,
        layout=recipe.export.layout_of(target),
        tokenizer=context.tokenizer,
        embedding_bits=recipe.export.embedding_bits_of(target),
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
    record = {"target": name, "base_fingerprint": context.base_fingerprint}
    write_record(scratch, record | {"use_cases": list(cases)})
    sizes = {case: total_bytes(target.backend.own_files(scratch, case)) for case in cases}
    sizes = {BASE: total_bytes(scratch.rglob("*")) - sum(sizes.values()), **sizes}
    return {case: {"bytes": size} for case, size in sizes.items()}


def verify(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Step 5: run the exported files on held-out text and compare them with the simulation, or with
    the trained model where activations are floats, within the recipe's limits."""
    _, name, *cases = stage.name.split("/")
    proof = _Verification(context, name, cases[0] if cases else BASE)
    figures = proof.run(scratch)
    if cases and proof.target.has_base:
        others = current_proofs(proof.bundle, without=proof.adapter)
        write_readme(proof.bundle, {**others, proof.adapter: proof.record})
    results = {"parity": {name: {NAME if cases else BASE: figures}}}
    if problems := figures.get("problems"):
        files = f"export/{name}/{proof.adapter}"
        what = f"{files}: the exported files do not compute what was {proof.of}"
        raise VerificationError(what, problems, results)
    return results


class _Verification:
    """One target with one adapter or use case, or the zero adapter.

    Attributes:
        of: what the files are compared with.
        record: of the proof; empty without one.
    """

    def __init__(self, context: JobContext, name: str, adapter: str):
        self.context, self.name, self.adapter = context, name, adapter
        self.target, self.bundle = TARGETS[name], context.path / "export" / name
        self.parts = self.target.parts(self.bundle, adapter)
        self.of = "simulated" if self.target.is_simulated else "trained"
        self.record: dict[str, Any] = {}

    def run(self, scratch: Path) -> dict[str, Any]:
        """Run the files, and write the proof into `scratch`; returns figures for results.json."""
        asked = self.context.recipe.verify
        limits = Limits(**asked.model_dump(exclude={"sequences", "layer_tokens"}))
        text, texts, ships = self._text(), list[Sequences](), self.context.recipe.export.proof
        has_proof = self.target.has_proof and self.adapter != BASE
        if has_proof and ships == "generated":  # before other models are in memory
            ids, starts = self.context.generated_ids, torch.tensor(self._invocation())
            # the invocation comes first, so that the adapter acts on the text
            ids = torch.cat([starts.long().expand(len(ids), -1), ids], 1)
            ids = ids[:, : text.input_ids.shape[1]].contiguous()
            texts.append(Sequences(ids, ids.clone()))
        model, simulation, (reference, *generated) = self._references(text, *texts)
        missing, results = None, dict[str, Any]()
        if has_proof:
            self.record = {
                "target": self.name,
                TEXT: ships,
                "adapter": self.adapter,
                **facts(model, self.context.recipe.model.source),
                "base_fingerprint": self.context.base_fingerprint,
                "of": {part: record_digest(folder) for part, folder in self.parts.items()},
                "limits": {"perplexity_difference": limits.perplexity_difference},
            }
            base = manifest.read(self.parts[BASE] / RECORD) if BASE in self.parts else {}
            self.record |= {key: base[key] for key in (WITHOUT_CACHE, MODEL_CLASS) if key in base}
            if tokens := self._invocation():
                self.record[INVOCATION] = tokens
            if missing := self.target.missing():
                self.record["not_run"] = results["not_run"] = missing
        if not missing:
            parity = self._run(simulation, reference, limits)
            for shipped in generated:  # the text that others will run has to pass here, too
                again, _ = measure(self.target, self.bundle, self.adapter, shipped, limits)
                failed = [row for row in again.checks if not row.passed]
                rows = (replace(row, what=f"on the text in proof/, {row.what}") for row in failed)
                parity = parity.extended({}, *rows)
            if self.record:
                self.record |= proven(self.target, parity, reference, limits)
            results = self._figures(parity) | verdict(parity.checks)
            if "not_run" in parity.figures and results["passed"]:
                del results["passed"]
        if self.record:
            shipped = generated[0] if generated else first_sequences(reference, BASE_SEQUENCES)
            write_proof(scratch, None if ships == "none" else shipped, self.record)
        return results

    def _invocation(self) -> list[int]:
        """The tokens that start an activated LoRA; empty for other adapters."""
        if not self.target.holds_invocation or self.adapter == BASE:
            return []
        trained = self.context.path / "adapters" / self.adapter
        return read_config(trained).get(INVOCATION) or []

    def _run(
        self, simulation: Reference | None, reference: dict[str, Tensor], limits: Limits
    ) -> Parity:
        """Whole sequences and tokens one by one; where the runtime allows it also layers, and
        whether other adapters leave a trace."""
        track, recipe = self.context.track, self.context.recipe
        parity, runtime = measure(self.target, self.bundle, self.adapter, reference, limits, track)
        ids = reference["ids"][:1, : recipe.verify.layer_tokens]
        adapter = None if self.adapter == BASE else self.bundle / self.adapter
        names = [a.name for a in recipe.adapters if a.name != self.adapter]
        others = [self.bundle / name for name in names if is_of_base(self.bundle, name)]
        if runtime.switches:
            runtime.use(adapter)
        if runtime.has_layers and simulation is not None:
            with one_step(track, "comparing layers"):
                layers = compare_layers(runtime, simulation, {"input_ids": ids}, limits)
            parity = parity.extended(layers.figures, *layers.checks)
        if runtime.has_cache:
            cache = compare_cache(runtime, reference, adapter, others, limits)
            parity = parity.extended({"cache": cache.figures}, *cache.checks)
        if runtime.switches and (others or self.target.is_simulated):
            parity = parity.extended({}, *switching(runtime, adapter, others, ids))
        return parity

    def _references(
        self, *texts: Sequences
    ) -> tuple[Any, Reference | None, list[dict[str, Tensor]]]:
        """The model that the files were made of, its simulation if there is one, and the reference
        outputs for each text."""
        context, target = self.context, self.target
        if not target.is_simulated:
            model = context.adapted(self.adapter)
            rounding = target.backend.rounding(model)
            return model, None, [reference_of_trained(model, text, rounding) for text in texts]
        if target.has_cases:
            simulation: Any = context.use_cases[self.adapter]
        elif self.adapter == BASE:
            simulation = ZeroAdapter(context.zero_adapter())
        else:
            simulation = context.simulation(self.adapter)
        states = {"adapter": simulated_logits(simulation)}
        if target.has_base and self.adapter != BASE:
            # released as soon as another simulation is captured
            states["base"] = simulated_logits(context.zero_adapter())
        logits, perturbed = (
            {state: both[number] for state, both in states.items()} for number in (0, 1)
        )
        least = least_noise(context.schemes, target.cached_graphs)
        references = [make_reference(logits, text, perturbed, None, least) for text in texts]
        model = None if self.adapter == BASE else simulation.origin.model
        return model, simulation, references

    def _text(self) -> Sequences:
        """Held-out text of the adapter, or of the first one of a use case, as far as the context of
        graphs with a key-value cache goes."""
        recipe = self.context.recipe
        names = {adapter.name for adapter in recipe.adapters}
        owner = next((n for n in members(self.adapter) if n in names), recipe.adapters[0].name)
        text = self.context.text(owner).held_out.first(recipe.verify.sequences)
        for folder in (place for part in self.parts.values() for place in (part, part / BASE)):
            if has_graphs(folder):
                few, most = text.first(BASE_SEQUENCES), most_tokens(folder)
                return few if few.input_ids.shape[1] <= most else few.cut(most)
        return text

    def _figures(self, parity: Parity) -> dict[str, Any]:
        """Figures for results.json: those of the adapter at the top."""
        found = only_finite(parity.figures)
        exact, shipped = found["exact"], found.get("shipped", {}).get("adapter", {})
        others = {"exact", "shipped", "load_seconds", "peak_memory_bytes", "bytes"}
        figures = {key: value for key, value in found.items() if key not in others}
        figures |= {"of": self.of, **exact["adapter"]}
        figures |= {f"shipped_{k}": shipped[k] for k in _SHIPPED if k in shipped}
        if "off_is_equal" in exact:
            figures["off_is_equal"] = exact["off_is_equal"]
        if self.record:
            figures["proof"] = self.record["figures"]
        return figures
