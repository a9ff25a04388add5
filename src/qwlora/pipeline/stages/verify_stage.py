"""Stages `verify/TARGET/NAME`, step 5: run exported files and compare them with the simulation, or
with the trained model for a weights target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.export.registry import TARGETS
from qwlora.export.target import GraphTarget, WeightsTarget
from qwlora.pipeline.stage import PlanBuilder, Stage
from qwlora.pipeline.stages.export_stage import BASE, RECORD

if TYPE_CHECKING:
    from qwlora.export.verify import LanguageModelParity, Limits
    from qwlora.export.verify_weights import WeightsParity
    from qwlora.pipeline.context import JobContext


NAME = "verify"


def add(plan: PlanBuilder, target: str, name: str) -> None:
    """Add the stage of one target and adapter."""
    inputs: list[Any] = [plan.recipe.verify.model_dump(), plan.text(name)]
    needs = [f"export/{target}/{name}"]
    if isinstance(kind := TARGETS[target], WeightsTarget):
        needs.insert(0, f"export/{target}")
        inputs.append(kind.missing())  # it is verified once its runtime is installed
    plan.add(f"{NAME}/{target}/{name}", inputs, tuple(needs), name)


def run(context: JobContext, stage: Stage, scratch: Path, work: Path) -> dict[str, Any]:
    """Run the exported files on held-out text and compare the result with the recipe's limits."""
    from qwlora.errors import VerificationError
    from qwlora.export.verify import Limits

    _, name, *_ = stage.name.split("/")
    target, adapter, section = TARGETS[name], str(stage.adapter), context.recipe.verify
    parity: LanguageModelParity | WeightsParity
    of = "simulated"
    if isinstance(target, GraphTarget):
        parity = _verify_graph(context, target, name, adapter)
    else:
        assert isinstance(target, WeightsTarget)
        if missing := target.missing():
            return {"parity": {name: {adapter: {"not_run": missing}}}}
        parity, of = _verify_weights(context, target, name, adapter), "trained"
    limits = Limits(
        perplexity_difference=section.perplexity_difference,
        layer_steps=section.layer_steps,
        layer_mean_steps=section.layer_mean_steps,
    )
    problems = list(parity.broken_limits(limits))
    measured = {
        **parity.to_json(),
        "passed": not problems,
        "problems": problems,
        "limits": _limits_of(parity, limits),
    }
    results = {"parity": {name: {adapter: measured}}}
    if problems:
        what = f"export/{name}/{adapter}: the exported files do not compute what was {of}"
        raise VerificationError(what, problems, results)
    return results


def _limits_of(parity: LanguageModelParity | WeightsParity, limits: Limits) -> dict[str, float]:
    """What was required, for results.json."""
    from qwlora.export.verify_weights import AGREEMENT, LOGIT_DIFFERENCE, WeightsParity

    if isinstance(parity, WeightsParity):
        return {
            "perplexity_difference": limits.perplexity_difference,
            "logit_difference": LOGIT_DIFFERENCE * parity.largest_logit,
            "top1_agreement": AGREEMENT,
        }
    return {
        "perplexity_difference": limits.perplexity_difference,
        "layer_steps": limits.layer_steps,
        "layer_mean_steps": limits.layer_mean_steps,
    }


def _verify_graph(
    context: JobContext, target: GraphTarget, name: str, adapter: str
) -> LanguageModelParity:
    from qwlora.export.verify import verify_language_model
    from qwlora.formats import manifest

    section, folder = context.recipe.verify, context.path / "export" / name / adapter
    manifest.check(folder, RECORD, f"export {str(folder)!r}", "export it again")
    held_out = context.text(adapter).data.held_out
    return verify_language_model(
        target.open(folder),
        context.simulation(adapter),
        held_out.first(section.sequences),
        held_out.input_ids.shape[1] if target.fixed_shapes else section.layer_tokens,
        context.track,
    )


def _verify_weights(
    context: JobContext, target: WeightsTarget, name: str, adapter: str
) -> WeightsParity:
    from qwlora.export.verify_weights import verify_weights
    from qwlora.formats import manifest

    base, own = (context.path / "export" / name / folder for folder in (BASE, adapter))
    for folder in (base, own):
        manifest.check(folder, RECORD, f"export {str(folder)!r}", "export it again")
    return verify_weights(
        target.open(base),
        context.adapted(adapter),
        own,
        context.text(adapter).data.held_out.first(context.recipe.verify.sequences),
        context.track,
    )
