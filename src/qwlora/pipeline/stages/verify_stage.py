"""Stages `verify/TARGET/NAME`, step 5: run exported files and compare them with the simulation, or
with the trained model for a weights target. `verify/TARGET` is the base of a switchable target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.export.proof.folder import (
    BASE,
    RECORD,
    WITHOUT_CACHE,
    current_proofs,
    is_of_base,
    proven_folders,
    record_digest,
    without_cache,
    write_proof,
)
from qwlora.export.registry import TARGETS
from qwlora.export.target import (
    PROOF,
    BundleTarget,
    GraphTarget,
    SwitchableTarget,
    UseCasesTarget,
    WeightsTarget,
)
from qwlora.formats import manifest
from qwlora.pipeline.plan.stage import PlanBuilder, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from qwlora.data.sequences import Sequences
    from qwlora.export.proof.checks import Limits, Parity
    from qwlora.export.proof.reference import Reference
    from qwlora.export.runtime import WeightsRuntime
    from qwlora.pipeline.running.loaded_models import JobContext


NAME = "verify"
# Graphs for NPUs round cosines, sines and masks on top of what a simulation rounds: this share of
# the largest logit counts as noise, about 30 dB.
GRAPHS_NOISE = 0.002
_SHIPPED = ("perplexity", "top1_agreement")


def add_base(plan: PlanBuilder, target: str) -> None:
    """Add the stage of the base of a switchable target."""
    inputs = [plan.recipe.verify.model_dump(), plan.text(plan.recipe.adapters[0].name)]
    plan.add(f"{NAME}/{target}", inputs, (f"export/{target}",))


def add(plan: PlanBuilder, target: str, name: str) -> None:
    """Add the stage of one target and adapter."""
    inputs: list[Any] = [plan.recipe.verify.model_dump(), plan.text(name)]
    needs = [f"export/{target}/{name}"]
    artifact = None
    kind = TARGETS[target]
    if isinstance(kind, BundleTarget):
        needs.insert(0, f"export/{target}")
        inputs.append(kind.missing())  # it is verified once its runtime is installed
    if kind.has_proof:
        artifact = f"export/{target}/{PROOF}/{name}"
    plan.add(f"{NAME}/{target}/{name}", inputs, tuple(needs), name, artifact)


def add_use_cases(plan: PlanBuilder, target: str) -> None:
    """Add a stage for every use case of a target."""
    kind = TARGETS[target]
    assert isinstance(kind, UseCasesTarget)
    texts = [plan.texts.key(text) for text in plan.recipe.texts().values()]
    for case in plan.recipe.use_cases():
        inputs: list[Any] = [plan.recipe.verify.model_dump(), texts]
        if kind.compiled:
            inputs.append(kind.missing())  # the emulator
        artifact = f"export/{target}/{PROOF}/{case}" if kind.has_proof else None
        plan.add(f"{NAME}/{target}/{case}", inputs, (f"export/{target}",), None, artifact)


def run(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Run the exported files on held-out text and compare the result with the recipe's limits."""
    from qwlora.errors import VerificationError
    from qwlora.export.proof.checks import Limits

    _, name, *cases = stage.name.split("/")
    target, section = TARGETS[name], context.recipe.verify
    adapter = stage.adapter or (cases[0] if cases else BASE)
    limits = Limits(
        perplexity_difference=section.perplexity_difference,
        layer_steps=section.layer_steps,
        layer_mean_steps=section.layer_mean_steps,
    )
    has_readme = stage.adapter is not None and isinstance(target, BundleTarget)
    if has_readme:
        _write_readme(context, name, adapter, None)  # says nothing of it before there is a verdict
    proof = _Verification(context, name, adapter, limits).run(scratch)
    if has_readme:
        _write_readme(context, name, adapter, proof.record)
    results = {"parity": {name: {adapter: proof.results}}}
    if problems := proof.results.get("problems"):
        what = f"export/{name}/{adapter}: the exported files do not compute what was {proof.of}"
        raise VerificationError(what, problems, results)
    return results


class _Verification:
    """One target with one adapter or use case, or the base of a switchable target.

    Attributes:
        of: what the files are compared with.
        record: of the proof; empty without one.
        results: for results.json.
    """

    def __init__(self, context: JobContext, name: str, adapter: str, limits: Limits):
        self.context, self.name, self.adapter, self.limits = context, name, adapter, limits
        self.target, self.bundle = TARGETS[name], context.path / "export" / name
        self.of = "trained" if isinstance(self.target, WeightsTarget) else "simulated"
        self.record: dict[str, Any] = {}
        self.results: dict[str, Any] = {}

    def run(self, scratch: Path) -> _Verification:
        """Run the files, and write the proof into `scratch`."""
        from qwlora.export.proof.checks import verdict
        from qwlora.export.proof.folder import run_files
        from qwlora.export.proof.measure import proven

        self._check_digests()
        model, simulation, reference = self._reference()
        if self.target.has_proof and self.adapter != BASE:
            self._begin_record(model)
            if missing := self.target.missing():
                self.record["not_run"] = self.results["not_run"] = missing
                self._write_proof(reference, scratch)
                return self
        if isinstance(self.target, SwitchableTarget):
            parity = self._run_switchable(simulation, reference)
        elif isinstance(self.target, WeightsTarget):
            track = self.context.track
            parity = run_files(self.target, self.bundle, self.adapter, reference, track)
            if self._others():
                runtime = self.target.open(self.bundle / BASE)
                parity = self._with_switching(parity, runtime, reference)
        else:
            parity = self._run_graph(simulation, reference)
        if self.record:
            self.record |= proven(self.target, parity, reference, self.limits)
            self._write_proof(reference, scratch)
        self.results = self._figures(parity) | verdict(parity.checks(self.limits))
        if "not_run" in parity.figures and self.results["passed"]:
            del self.results["passed"]
        return self

    def _check_digests(self) -> None:
        folders = proven_folders(self.target, self.bundle, self.adapter)
        if self.adapter == BASE:
            folders = {BASE: self.bundle / BASE}
        for folder in folders.values():
            manifest.check(folder, RECORD, f"export {str(folder)!r}", "export it again")

    def _reference(self) -> tuple[Any, Reference | None, dict[str, Tensor]]:
        """The model that the files were made of, its simulation if there is one, and what it says
        about held-out text."""
        from qwlora.export.onnx.adapters_as_inputs import ZeroAdapter
        from qwlora.export.proof.reference import logits_of, make_reference, simulated_logits
        from qwlora.pipeline.stages.use_cases import use_case_simulations
        from qwlora.pipeline.stages.zero_adapter import zero_adapter_simulation

        context, target = self.context, self.target
        if isinstance(target, WeightsTarget):
            model = context.adapted(self.adapter)
            rounding = target.rounding(model)
            rounded = None if rounding is None else logits_of(model, rounding)
            return model, None, make_reference(logits_of(model), self._text(), rounded=rounded)
        if isinstance(target, UseCasesTarget):
            simulation: Any = use_case_simulations(context)[self.adapter]
        elif self.adapter == BASE:
            simulation = ZeroAdapter(zero_adapter_simulation(context))
        else:
            simulation = context.simulation(self.adapter)
        states = {"adapter": simulated_logits(simulation)}
        if isinstance(target, SwitchableTarget) and self.adapter != BASE:
            # released as soon as another simulation is captured
            states["base"] = simulated_logits(zero_adapter_simulation(context))
        section = context.recipe.simulation
        bitwidth = min(section.activation_bitwidth, section.adapter_activation_bitwidth or 16)
        reference = make_reference(
            {state: logits for state, (logits, _) in states.items()},
            self._text(),
            {state: perturbed for state, (_, perturbed) in states.items()},
            least_noise=max(2**-bitwidth, GRAPHS_NOISE if self._graphs() else 0.0),
        )
        model = None if self.adapter == BASE else simulation.origin.model
        return model, simulation, reference

    def _text(self) -> Sequences:
        """Held-out text of the adapter, or of the first one of a use case, as far as the context of
        the graphs goes."""
        from qwlora.export.npu.kv_cache_graphs import most_tokens
        from qwlora.export.npu.use_cases import members
        from qwlora.export.proof.reference import BASE_SEQUENCES

        recipe = self.context.recipe
        names = {adapter.name for adapter in recipe.adapters}
        owner = next((n for n in members(self.adapter) if n in names), recipe.adapters[0].name)
        held_out = self.context.text(owner).data.held_out.first(recipe.verify.sequences)
        if (graphs := self._graphs()) is None:
            return held_out
        most = most_tokens(graphs)
        few = held_out.first(BASE_SEQUENCES)
        return few if few.input_ids.shape[1] <= most else few.cut(most)

    def _graphs(self) -> Path | None:
        """The folder of graphs with a key-value cache; None if there are none."""
        from qwlora.export.npu.kv_cache_graphs import has_graphs

        folders = (*proven_folders(self.target, self.bundle, self.adapter).values(), self.bundle)
        places = [place for folder in folders for place in (folder, folder / BASE)]
        return next((place for place in places if has_graphs(place)), None)

    def _run_graph(self, simulation: Any, reference: dict[str, Tensor]) -> Parity:
        """Files that hold base and adapter together, and their layers if a runtime gives these."""
        from qwlora.export.proof.folder import run_files

        target, track = self.target, self.context.track
        if isinstance(target, UseCasesTarget):
            if (parity := target.verify(self.bundle, self.adapter, reference, track)) is not None:
                return parity
            return run_files(target, self.bundle, self.adapter, reference, track)
        assert isinstance(target, GraphTarget)
        parity = run_files(target, self.bundle, self.adapter, reference, track)
        whole = target.whole(self.bundle / self.adapter)
        return parity if whole is None else self._with_layers(parity, whole, simulation, reference)

    def _run_switchable(self, simulation: Any, reference: dict[str, Tensor]) -> Parity:
        """One adapter, or the base, in the session of all: whole sequences, layers, and tokens one
        by one if there is a cache."""
        from qwlora.export.proof.folder import run_files
        from qwlora.export.proof.measure import compare_cache, measure_logits

        target, track = self.target, self.context.track
        assert isinstance(target, SwitchableTarget)
        runtime = target.open(self.bundle / BASE)
        adapter = None if self.adapter == BASE else self.bundle / self.adapter
        runtime.use(adapter)
        if adapter is None:
            parity = measure_logits(runtime.logits, reference, track)
        else:
            parity = run_files(target, self.bundle, self.adapter, reference, track)
        parity = self._with_layers(parity, runtime, simulation, reference)
        if runtime.has_cache:
            logits, bits = compare_cache(runtime, reference, adapter, self._others())
            parity = parity.extended({"cache": logits.to_json()}, logits, bits)
        return self._with_switching(parity, runtime, reference)

    def _with_layers(
        self, parity: Parity, runtime: Any, simulation: Any, reference: dict[str, Tensor]
    ) -> Parity:
        from dataclasses import asdict

        from qwlora.export.proof.compare import verify_layers

        ids = reference["ids"][:1, : self.context.recipe.verify.layer_tokens]
        layers = verify_layers(runtime, simulation, ids, self.context.track)
        return parity.extended(asdict(layers), layers)

    def _with_switching(
        self, parity: Parity, runtime: WeightsRuntime, reference: dict[str, Tensor]
    ) -> Parity:
        """Whether other adapters leave no trace."""
        from qwlora.export.proof.measure import switching

        adapter = None if self.adapter == BASE else self.bundle / self.adapter
        ids = reference["ids"][:1, : self.context.recipe.verify.layer_tokens]
        return parity.extended({}, *switching(runtime, adapter, self._others(), ids))

    def _others(self) -> list[Path]:
        """The folders of the other adapters that are there."""
        names = [a.name for a in self.context.recipe.adapters if a.name != self.adapter]
        return [self.bundle / name for name in names if is_of_base(self.bundle, name)]

    def _begin_record(self, model: Any) -> None:
        """What a proof says of the files."""
        from qwlora.export.proof.readme import facts

        of = proven_folders(self.target, self.bundle, self.adapter)
        self.record = {
            "target": self.name,
            "adapter": self.adapter,
            **facts(model, self.context.recipe.model.source),
            "base_fingerprint": self.context.base_fingerprint,
            "of": {part: record_digest(folder) for part, folder in of.items()},
            "limits": {"perplexity_difference": self.limits.perplexity_difference},
        }
        if BASE in of and (reason := without_cache(of[BASE])) is not None:
            self.record[WITHOUT_CACHE] = reason

    def _write_proof(self, reference: dict[str, Tensor], scratch: Path) -> None:
        from qwlora.export.proof.reference import BASE_SEQUENCES, first_sequences

        write_proof(scratch, first_sequences(reference, BASE_SEQUENCES), self.record)

    def _figures(self, parity: Parity) -> dict[str, Any]:
        """Figures for results.json: those of the adapter at the top."""
        from qwlora.export.proof.checks import only_finite

        figures = only_finite(parity.figures)
        exact, shipped = figures.pop("exact"), figures.pop("shipped", {}).get("adapter", {})
        for key in ("load_seconds", "peak_memory_bytes", "bytes"):
            figures.pop(key, None)
        main = exact["adapter"]
        figures |= {"of": self.of, **main}
        figures |= {f"shipped_{k}": shipped[k] for k in _SHIPPED if k in shipped}
        if "off_is_equal" in exact:
            figures["off_is_equal"] = exact["off_is_equal"]
        if self.record:
            figures["proof"] = self.record["figures"]
        return figures


def _write_readme(
    context: JobContext, name: str, adapter: str, proof: Mapping[str, Any] | None
) -> None:
    """Write the README of a bundle.

    Args:
        proof: of the adapter; None: it is left out.
    """
    from qwlora.export.proof.readme import write_readme

    bundle = context.path / "export" / name
    own = {} if proof is None else {adapter: proof}
    write_readme(bundle, {**current_proofs(bundle, without=adapter), **own})
