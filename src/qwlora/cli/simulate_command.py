"""`qwlora simulate DIR`: show what step 3 does to an adapter of a job. Writes nothing.

--explain          every value of the graph: its grid, and the rule that decided
--costs            perplexity cost of each part of the simulation; the most expensive activations
--suggest SHARE    which activations need 16 bits, so that perplexity with the others at 8 bits
                   is at most (1 + SHARE) times that with float activations
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwlora.cli.progress_bars import ProgressDisplay
from qwlora.cli.shared_arguments import AdapterName, AsJson, Changes, Job
from qwlora.cli.terminal import group_similar, print_result, table
from qwlora.system import strict_json

if TYPE_CHECKING:
    from qwlora.graph.quantized_graph import GraphValue
    from qwlora.simulation.placement import Placement


def simulate(
    job: Job,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="List every value with its grid and the rule that decided; similar ones share a "
            "line.",
        ),
    ] = False,
    adapter: AdapterName = None,
    changes: Changes = None,
    costs: Annotated[
        bool,
        typer.Option(
            "--costs",
            help="Measure how much perplexity each part of the simulation costs, and list the most "
            "expensive activations.",
        ),
    ] = False,
    suggest: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Find the activations that need 16 bits, the rest having 8, for perplexity to "
            "rise by at most this share over float activations (0.05 is 5 %), measured on a few "
            "held-out sequences.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which values the simulation quantizes, and why.

    Prints counts by default. --explain lists every value; --costs and --suggest measure perplexity.
    """
    if explain + costs + (suggest is not None) > 1:
        raise typer.BadParameter(
            "--explain, --costs and --suggest exclude each other; give one at a time"
        )
    if suggest is not None and not 0 <= suggest <= 1:
        remedy = f"for {suggest:g} % use {suggest / 100:g}" if suggest > 1 else "0.05 is 5 %"
        raise typer.BadParameter(f"--suggest must be between 0 and 1, not {suggest:g}; {remedy}")
    asked = tuple(changes or ())
    from qwlora.pipeline.commands.simulate_job import (
        explain_placement,
        measure_costs,
        suggest_bitwidths,
    )

    with ProgressDisplay(as_json or not (costs or suggest is not None)) as display:
        if costs:
            record = measure_costs(job, adapter, asked, display.track)
            lines = _cost_lines(record)
        elif suggest is not None:
            record = suggest_bitwidths(job, adapter, asked, suggest, display.track)
            lines = _suggestion_lines(record)
        else:
            name, log = explain_placement(job, adapter, asked)
            record, lines = {"adapter": name, **log.to_json()}, _lines(name, log, explain)
    print_result(record, lines, as_json)


def _cost_lines(account: dict[str, Any]) -> Iterator[str]:
    parts = account["perplexity"].items()
    activations = [
        (s["name"], str(s["bitwidth"]), f"{s['cost']:.3g}", f"{s['sqnr_db']:.1f}")
        for s in account["sensitivity"]
    ]
    layers = [(name, f"{db:.1f}") for name, db in account["layer_sqnr_db"].items()]
    yield f"adapter {account['adapter']}"
    yield from _unshared(account)
    yield from table(
        [("perplexity", ""), *((what.replace("_", " "), f"{value:.4f}") for what, value in parts)]
    )
    yield ""
    heads = ("most expensive activations", "bits", "cost, nats/token", "SQNR, dB")
    yield from table([heads, *activations])
    yield ""
    yield from table([("layers furthest from float", "SQNR, dB"), *layers])


def _suggestion_lines(record: dict[str, Any]) -> Iterator[str]:
    wide, searched = len(record["wide"]), len(record["wide"]) + record["narrow"]
    kept = f"; {record['kept']} more keep the grid that a rule of the recipe gives them"
    yield (
        f"adapter {record['adapter']}: {wide} of {searched} activations at 16 bits, the others at 8"
        f"{kept if record['kept'] else ''}"
    )
    plain = record["float_activations"]
    yield (
        f"perplexity on the {record['sequences']} held-out sequences used for the search: "
        f"{_compared(record['measured'], plain)}"
    )
    yield (
        f"limit on these sequences: {_compared(record['limit'], plain)}; all {searched} at 16 "
        f"bits: {record['all_wide']:.4f}, all at 8 bits: {record['all_narrow']:.4f}"
    )
    if (fresh := record["fresh"]) is None:
        yield (
            "the search used all evaluation sequences; raise data.evaluation_sequences to measure "
            "the result on other text"
        )
    else:
        compared = _compared(fresh["measured"], fresh["float_activations"])
        yield f"perplexity on {fresh['sequences']} sequences not used for the search: {compared}"
    yield from _unshared(record)
    yield "\nsimulation:\n  activation_bitwidth: 8"
    yield "  rules:" if record["rules"] else "  rules: []"
    yield from (f"    - {strict_json.dumps(rule)}" for rule in record["rules"])


def _unshared(record: dict[str, Any]) -> Iterator[str]:
    if "unshared" in record:
        yield (
            "measured with separate encodings for this adapter; the recipe shares some among "
            f"adapters (base_activations: {record['unshared']}), which costs more"
        )


def _compared(perplexity: float, plain: float) -> str:
    change = f"{perplexity / plain - 1:+.1%}"
    return f"{perplexity:.4f} ({change} from {plain:.4f} with float activations)"


def _lines(name: str, log: Placement, everything: bool) -> Iterator[str]:
    counts = Counter(value.decision.value for value in log.values)
    counted = ", ".join(f"{counts[d]} {d}" for d in ("quantize", "share", "float"))
    yield f"adapter {name}, policy {log.policy}: {counted}"
    rows: list[tuple[str, ...]]
    if everything:
        rows = [("value", "count", "class", "decision", "grid", "reason")]
        for pattern, values in group_similar(
            log.values, _name, lambda v: (v.module_class, v.decision, v.reason, _grid(v))
        ):
            v, count = values[0], str(len(values))
            decided = (v.module_class, v.decision.value, _grid(v), v.reason)
            rows.append((pattern, count, *decided))
    else:
        reasons = Counter((v.kind.value, v.decision.value, v.grid, v.reason) for v in log.values)
        rows = [("tensor", "count", "decision", "grid", "reason")]
        rows += [(kind, str(count), *decided) for (kind, *decided), count in reasons.items()]
    yield from table(rows)
    if log.unknown:
        operators = ", ".join(f"{name} ({count})" for name, count in sorted(log.unknown.items()))
        yield (
            f"operators unknown to the policy: {operators}. See --explain for the reasons; where a "
            "decision is wrong, add a rule to simulation.rules"
        )


def _name(value: GraphValue) -> str:
    """The value's name without the number that distinguishes values of the same operator."""
    return f"{value.module or 'output'}.{value.operator}" if value.is_computed else value.name


def _grid(value: GraphValue) -> str:
    """The grid, and the observer unless it is min-max."""
    return value.grid if value.observer in ("", "min-max") else f"{value.grid}, {value.observer}"
