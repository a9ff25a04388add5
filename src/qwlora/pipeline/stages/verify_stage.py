"""Stages `verify/TARGET/NAME`, step 5: run exported files and compare them with the simulation, or
with the trained model for a weights target. `verify/TARGET` is the base of a switchable target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.export.bundle import BASE, RECORD, WITHOUT_CACHE
from qwlora.export.registry import TARGETS
from qwlora.export.target import (
    PROOF,
    BundleTarget,
    GraphTarget,
    SwitchableTarget,
    UseCasesTarget,
    WeightsTarget,
)
from qwlora.pipeline.stage import PlanBuilder, Stage

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

    from qwlora.data.sequences import Sequences
    from qwlora.export.graph_parity import GraphsParity
    from qwlora.export.verify import LanguageModelParity, Limits, Reference
    from qwlora.export.verify_cache import CacheParity
    from qwlora.export.verify_weights import WeightsParity
    from qwlora.pipeline.context import JobContext
    from qwlora.simulation.simulation import Simulation


NAME = "verify"


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
    from qwlora.export.finite_figures import only_finite
    from qwlora.export.proof import logits_of, make_reference
    from qwlora.export.verify import Limits
    from qwlora.export.verify_qnn import QnnParity

    _, name, *cases = stage.name.split("/")
    target, adapter, section = TARGETS[name], stage.adapter or BASE, context.recipe.verify
    parity: LanguageModelParity | GraphsParity | WeightsParity
    of, proof, problems = "simulated", dict[str, Any](), list[str]()
    cached: CacheParity | None = None
    if stage.adapter is not None and isinstance(target, BundleTarget):
        _write_readme(context, name, adapter, None)  # says nothing of it before there is a verdict
    if isinstance(target, UseCasesTarget):
        (adapter,) = cases
        parity = _verify_use_case(context, target, name, adapter)
        if target.has_proof:
            simulation = _use_case_simulation(context, adapter)
            proof = _prove_simulated(context, name, adapter, simulation, scratch)
    elif isinstance(target, SwitchableTarget):
        if stage.adapter is not None:
            proof = _prove(context, name, adapter, *_simulated_reference(context, adapter), scratch)
        parity, cached, problems = _verify_switchable(context, target, name, stage.adapter)
    elif isinstance(target, GraphTarget):
        parity = _verify_graph(context, target, name, adapter)
        if target.has_proof:
            proof = _prove_simulated(context, name, adapter, context.simulation(adapter), scratch)
    else:
        assert isinstance(target, WeightsTarget)
        model, held_out = context.adapted(adapter), _held_out(context, adapter)
        rounding = target.rounding(model)
        rounded = None if rounding is None else logits_of(model, rounding)
        reference = make_reference(logits_of(model), held_out, rounded=rounded)
        proof = _prove(context, name, adapter, model, reference, scratch)
        if "not_run" in proof:
            _write_readme(context, name, adapter, proof)
            return {"parity": {name: {adapter: {"not_run": proof["not_run"]}}}}
        parity, problems = _verify_weights(context, target, name, adapter, model, held_out)
        of = "trained"
    limits = Limits(
        perplexity_difference=section.perplexity_difference,
        layer_steps=section.layer_steps,
        layer_mean_steps=section.layer_mean_steps,
    )
    if cached is not None:
        problems += cached.broken_limits(limits)
    problems = [*parity.broken_limits(limits), *problems, *proof.get("problems", [])]
    if stage.adapter is not None and isinstance(target, BundleTarget):
        _write_readme(context, name, adapter, {**proof, "problems": problems})
    measured = {
        **parity.to_json(),
        **({"cache": _cache_figures(cached, limits)} if cached else {}),
        **({"proof": proof["figures"]} if proof else {}),
        "passed": not problems,
        "problems": problems,
        "limits": only_finite(_limits_of(parity, limits)),
    }
    if isinstance(parity, QnnParity) and parity.not_run is not None:
        del measured["not_run" if problems else "passed"]
    results = {"parity": {name: {adapter: measured}}}
    if problems:
        what = f"export/{name}/{adapter}: the exported files do not compute what was {of}"
        raise VerificationError(what, problems, results)
    return results


def _limits_of(
    parity: LanguageModelParity | GraphsParity | WeightsParity, limits: Limits
) -> dict[str, float]:
    """What was required, for results.json."""
    from qwlora.export.graph_parity import GraphsParity
    from qwlora.export.verify import largest_drift
    from qwlora.export.verify_weights import WeightsParity

    if isinstance(parity, WeightsParity):
        return {
            "perplexity_difference": parity.perplexity_limit(limits),
            "logit_difference": parity.logit_limit,
            "top1_agreement": parity.agreement_limit,
        }
    drift = largest_drift(limits.perplexity_difference, parity.floor_perplexity_difference)
    if isinstance(parity, GraphsParity):
        return {"perplexity_difference": drift, "sqnr": parity.least_sqnr}
    return {
        "perplexity_difference": drift,
        "layer_steps": limits.layer_steps,
        "layer_mean_steps": limits.layer_mean_steps,
    }


def _cache_figures(parity: CacheParity, limits: Limits) -> dict[str, Any]:
    return {**parity.to_json(), "least_sqnr": parity.least_sqnr(limits)}


def _verify_graph(
    context: JobContext, target: GraphTarget, name: str, adapter: str
) -> LanguageModelParity | GraphsParity:
    from qwlora.formats import manifest

    section, folder = context.recipe.verify, context.path / "export" / name / adapter
    manifest.check(folder, RECORD, f"export {str(folder)!r}", "export it again")
    return target.verify(
        folder,
        context.simulation(adapter),
        _held_out(context, adapter),
        section.layer_tokens,
        context.track,
    )


def _verify_switchable(
    context: JobContext, target: SwitchableTarget, name: str, adapter: str | None
) -> tuple[LanguageModelParity, CacheParity | None, list[str]]:
    """Compare one adapter, or the base, in the session of all: whole sequences, and tokens one by
    one if there is a cache; and problems of switching."""
    from qwlora.export.switchable_graph import ZeroAdapter
    from qwlora.export.verify import verify_language_model
    from qwlora.export.verify_cache import verify_cache
    from qwlora.export.verify_weights import switching_problems
    from qwlora.formats import manifest
    from qwlora.pipeline.zero_adapter import zero_adapter_simulation

    section, bundle = context.recipe.verify, context.path / "export" / name
    own = None if adapter is None else bundle / adapter
    for folder in (bundle / BASE, own or bundle / BASE):
        manifest.check(folder, RECORD, f"export {str(folder)!r}", "export it again")
    first = context.recipe.adapters[0].name
    held_out = _held_out(context, adapter or first)
    reference: Reference = (
        ZeroAdapter(zero_adapter_simulation(context))
        if adapter is None
        else context.simulation(adapter)
    )
    runtime = target.open(bundle / BASE)  # after the simulation's capture; released with the stage
    runtime.use(own)
    parity = verify_language_model(
        runtime, reference, held_out, section.layer_tokens, context.track
    )
    others = _others(context, bundle, adapter)
    ids = held_out.input_ids[:1, : section.layer_tokens]
    problems = list(switching_problems(runtime, own, others, ids))
    if not runtime.has_cache:
        return parity, None, problems
    ids, _ = next(held_out.rows())
    return parity, verify_cache(runtime, reference, ids[None], own, others), problems


def _simulated_reference(context: JobContext, adapter: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model of an adapter's simulation, and what the simulation says about held-out text."""
    from qwlora.export.proof import make_reference
    from qwlora.pipeline.zero_adapter import zero_adapter_simulation

    own = context.simulation(adapter)
    base = zero_adapter_simulation(context)  # released as soon as a simulation is captured
    reference = make_reference(
        {"base": base.logits, "adapter": own.logits},
        _held_out(context, adapter),
        {"base": base.perturbed_logits, "adapter": own.perturbed_logits},
        bitwidth=_bitwidth(context),
    )
    return own.origin.model, reference


def _bitwidth(context: JobContext) -> int:
    """Of the coarsest grid of activations."""
    section = context.recipe.simulation
    return min(section.activation_bitwidth, section.adapter_activation_bitwidth or 16)


def _held_out(context: JobContext, adapter: str) -> Sequences:
    return context.text(adapter).data.held_out.first(context.recipe.verify.sequences)


def _verify_use_case(
    context: JobContext, target: UseCasesTarget, name: str, case: str
) -> LanguageModelParity | GraphsParity:
    from qwlora.formats import manifest

    folder = context.path / "export" / name
    manifest.check(folder, RECORD, f"export {str(folder)!r}", "export it again")
    text = _text_of(context, case)
    return target.verify(folder, case, _use_case_simulation(context, case), text, context.track)


def _use_case_simulation(context: JobContext, case: str) -> Simulation:
    from qwlora.pipeline.use_cases import use_case_simulations

    return use_case_simulations(context)[case]


def _text_of(context: JobContext, case: str) -> Sequences:
    """Held-out text of an adapter, or of the first one of a use case."""
    from qwlora.export.use_cases import members

    return _held_out(context, [*members(case), context.recipe.adapters[0].name][0])


def _verify_weights(
    context: JobContext,
    target: WeightsTarget,
    name: str,
    adapter: str,
    model: PeftModel,
    held_out: Sequences,
) -> tuple[WeightsParity, list[str]]:
    """Compare one adapter with the trained model; and problems of switching."""
    from qwlora.export.verify_weights import switching_problems, verify_weights

    bundle = context.path / "export" / name
    runtime, own = target.open(bundle / BASE), bundle / adapter
    rounding = target.rounding(model)
    parity = verify_weights(runtime, model, own, held_out, rounding, context.track)
    others = _others(context, bundle, adapter)
    if not others:
        return parity, []
    ids = held_out.input_ids[:1, : context.recipe.verify.layer_tokens]
    return parity, list(switching_problems(runtime, own, others, ids))


def _others(context: JobContext, bundle: Path, adapter: str | None) -> list[Path]:
    """The folders of the other adapters that are there."""
    from qwlora.export.bundle import is_of_base

    names = [other.name for other in context.recipe.adapters if other.name != adapter]
    return [bundle / other for other in names if is_of_base(bundle, other)]


def _prove(
    context: JobContext,
    name: str,
    adapter: str,
    model: nn.Module,
    reference: Mapping[str, Tensor],
    scratch: Path,
) -> dict[str, Any]:
    """Write the proof of an adapter, with which it can be verified elsewhere."""
    from qwlora.export.bundle import (
        facts,
        proven,
        proven_folders,
        record_digest,
        without_cache,
        write_proof,
    )
    from qwlora.formats import manifest

    target, bundle = TARGETS[name], context.path / "export" / name
    of = proven_folders(target, bundle, adapter)
    for folder in of.values():
        manifest.check(folder, RECORD, f"export {str(folder)!r}", "export it again")
    limits = {"perplexity_difference": context.recipe.verify.perplexity_difference}
    record = {
        "target": name,
        "adapter": adapter,
        **facts(model, context.recipe.model.source),
        "base_fingerprint": context.base_fingerprint,
        "of": {part: record_digest(folder) for part, folder in of.items()},
        "limits": limits,
    }
    if BASE in of and (reason := without_cache(of[BASE])) is not None:
        record[WITHOUT_CACHE] = reason
    if missing := target.missing():
        record["not_run"] = missing
    else:
        record |= proven(target, bundle, adapter, reference, limits)
    write_proof(scratch, reference, record)
    return record


def _write_readme(
    context: JobContext, name: str, adapter: str, proof: Mapping[str, Any] | None
) -> None:
    """Write the README of a bundle.

    Args:
        proof: of the adapter, with every problem that was found; None: it is left out.
    """
    from qwlora.export.bundle import current_proofs, write_readme

    bundle = context.path / "export" / name
    own = {} if proof is None else {adapter: proof}
    write_readme(bundle, {**current_proofs(bundle, without=adapter), **own})


def _prove_simulated(
    context: JobContext, name: str, case: str, simulation: Simulation, scratch: Path
) -> dict[str, Any]:
    """Write the proof of files that hold base and adapter together."""
    from qwlora.export.bundle import proven_folders
    from qwlora.export.cached_graphs import most_tokens
    from qwlora.export.proof import make_reference

    held_out, target = _text_of(context, case), TARGETS[name]
    (folder,) = proven_folders(target, context.path / "export" / name, case).values()
    if target.cached_graphs:
        most = most_tokens(folder)
        held_out = held_out if held_out.input_ids.shape[1] <= most else held_out.cut(most)
    logits, perturbed = simulation.logits, simulation.perturbed_logits
    reference = make_reference(
        {"adapter": logits}, held_out, {"adapter": perturbed}, bitwidth=_bitwidth(context)
    )
    return _prove(context, name, case, simulation.origin.model, reference, scratch)
