"""What `qwlora simulate` shows of a simulation: its placement log, its perplexity cost (--costs),
and mixed precision under a limit (--suggest). Nothing is written.

All functions take a job from `open_job` and the name of one of its adapters. They raise
DirectoryError (`JobModels.is_calibrated`), and CalibrationError if a rule has no effect.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from qwlora.analysis.quantization_costs import cumulative_costs, layer_sqnr, sensitivities, suggest
from qwlora.analysis.token_scores import logits_of, score_tokens
from qwlora.data.sequences import Sequences, one_row
from qwlora.errors import CalibrationError
from qwlora.pipeline.commands.open_job import JobModels
from qwlora.pipeline.stages.job_context import JobContext
from qwlora.simulation.placement import Placement
from qwlora.simulation.simulation import Simulation

LISTED = 10
# All activations of these first tokens of a sequence are in memory at once.
SENSITIVITY_TOKENS = 128
# A search measures these evaluation sequences dozens of times.
SEARCHED_SEQUENCES = 4
NARROW_BITS, WIDE_BITS = 8, 16


def explain_placement(job: JobModels, name: str) -> Placement:
    """The adapter's placement log: which values are quantized, and why."""
    context, is_known = job.new_context(), job.is_calibrated(name)
    simulation = context.simulation(name) if is_known else context.new_simulation(name)
    return simulation.explain()


def measure_costs(job: JobModels, name: str) -> dict[str, Any]:
    """Measure the perplexity cost of each part of the simulation.

    Returns:
        `perplexity` with the parts enabled one after another; `sensitivity`: the most expensive
        activations, in nats per token; `layer_sqnr_db`: the layers that differ most from the float
        graph.
    """
    context, is_known = job.new_context(), job.is_calibrated(name)
    simulation = context.simulation(name) if is_known else _calibrated(context, name)
    evaluation = context.text(name).evaluation
    base = score_tokens(logits_of(context.base().eval()), evaluation, "perplexity")
    perplexities = {"base": base.perplexity} | cumulative_costs(
        simulation, lambda: _simulated(simulation, evaluation), context.track
    )
    batches = _sensitivity_batches(context, name)
    tokens = sum(batch["input_ids"].numel() - 1 for batch in batches)
    ranking = sensitivities(simulation, batches, track=context.track)[:LISTED]
    sqnr = layer_sqnr(simulation, batches[:1], context.track)
    return {
        "adapter": name,
        "perplexity": perplexities,
        "sensitivity": [{**asdict(s), "cost": s.cost / tokens} for s in ranking],
        "layer_sqnr_db": dict(sorted(sqnr.items(), key=lambda item: item[1])[:LISTED]),
        **({} if is_known else _unshared(context)),
    }


def suggest_bitwidths(job: JobModels, name: str, share: float) -> dict[str, Any]:
    """Find the fewest activations at 16 bits, the others at 8, that keep perplexity under a limit:
    (1 + share) * perplexity with float activations. `job` has activations of `NARROW_BITS` bits.

    Returns:
        `measured`, `limit` and `float_activations` are perplexities on the `sequences` evaluation
        sequences of the search; `fresh` has those on the others, if there are any. The recipe's
        rules decide `kept` activations, which are not searched; `rules` starts with these rules.

    Raises:
        CalibrationError: the limit is exceeded even with 16 bits for all; or the adapter was
            trained through quantized activations (workflow qwa-lora).
    """
    context = job.new_context()
    if context.recipe.workflow == "qwa-lora":
        raise CalibrationError(
            f"adapter {name!r} was trained with quantized activations (workflow: qwa-lora), so "
            "other grids need new training. Set workflow: qw-lora to find simulation.rules, add "
            "them to the recipe, set qwa-lora again, and train"
        )
    simulation = _calibrated(context, name)
    searched, others = context.text(name).evaluation.spread(SEARCHED_SEQUENCES)
    with simulation.only():
        reference = _simulated(simulation, searched)
    limit = (1 + share) * reference
    result = suggest(
        simulation,
        _sensitivity_batches(context, name),
        lambda: _simulated(simulation, searched),
        limit,
        NARROW_BITS,
        WIDE_BITS,
        track=context.track,
    )
    # The search fits its choice to the sequences that it measures, so others judge it.
    fresh: dict[str, float] | None = None
    if len(others):
        fresh = {"sequences": len(others), "measured": _simulated(simulation, others)}
        with simulation.only():
            fresh["float_activations"] = _simulated(simulation, others)
    rules = context.recipe.simulation.rules
    figures = ("narrow", "kept", "measured", "all_narrow", "all_wide")
    return {
        "adapter": name,
        **{figure: getattr(result, figure) for figure in figures},
        "limit": limit,
        "float_activations": reference,
        "sequences": len(searched),
        "fresh": fresh,
        "wide": list(result.wide),
        "rules": [
            *(rule.model_dump(exclude_defaults=True, mode="json") for rule in rules),
            *({"match": rule.match, "bitwidth": rule.bitwidth} for rule in result.rules),
        ],
        **_unshared(context),
    }


def _unshared(context: JobContext) -> dict[str, str]:
    # A simulation that is calibrated here shares nothing, whatever the recipe says.
    shares = context.recipe.simulation.base_activations
    return {} if shares == "all" else {"unshared": shares}


def _calibrated(context: JobContext, name: str) -> Simulation:
    simulation = context.new_simulation(name)
    context.calibrate(simulation, name)
    return simulation


def _sensitivity_batches(context: JobContext, name: str) -> list[dict[str, Any]]:
    return [one_row(ids) for ids in context.text(name).calibration_ids[:, :SENSITIVITY_TOKENS]]


def _simulated(simulation: Simulation, evaluation: Sequences) -> float:
    return score_tokens(simulation.logits, evaluation, "perplexity, simulated").perplexity
