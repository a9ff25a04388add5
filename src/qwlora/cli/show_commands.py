"""`qwlora inspect`: describe a model's files without loading the model.
`qwlora simulate`: show what step 3 does to an adapter of a job.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwlora.cli.shared_arguments import AsJson, Changes, Device, Job
from qwlora.cli.terminal import ProgressDisplay, group_similar, print_result, table
from qwlora.errors import size
from qwlora.system import strict_json

if TYPE_CHECKING:
    from qwlora.analysis.inspect_model import Inspection, TensorView
    from qwlora.graph.quantized_graph import GraphValue
    from qwlora.simulation.placement import Placement


# The search of --suggest starts with all activations at 8 bits.
NARROW = "simulation.activation_bitwidth=8"


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            help="A model's folder or .gguf file, package:NAME/PATH (a file inside an installed "
            "package), a base, or a job."
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="The float model to compare with. Adds the SQNR of every tensor.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show shapes, grids and fingerprint of a model's files."""
    if (Path(source) / ".qwlora").is_dir():
        source = str(Path(source) / "base")
    from qwlora.analysis.inspect_model import inspect_source

    model = inspect_source(source, against)
    print_result(model.to_json(), _model_lines(model), as_json)


def _model_lines(inspection: Inspection) -> Iterator[str]:
    yield f"{inspection.kind} {inspection.source}"
    if inspection.fingerprint:
        yield f"fingerprint {inspection.fingerprint}"
    measured = any(view.sqnr_db is not None for view in inspection.tensors)
    rows = [("tensor", "count", "shape", "grid", "bits/weight", *(["SQNR dB"] if measured else []))]
    for name, views in group_similar(
        inspection.tensors, lambda view: view.name, lambda view: (view.shape, view.grid, view.bytes)
    ):
        shape, bits = "x".join(map(str, views[0].shape)), f"{views[0].bits_per_weight:.2f}"
        row = (name, str(len(views)), shape, views[0].grid, bits)
        rows.append((*row, _range(views)) if measured else row)
    yield from table(rows)
    for label, total in inspection.totals.items():
        if total["weights"]:
            yield (
                f"{label}: {total['weights']:,} weights, {size(total['bytes'])}, "
                f"{total['bits_per_weight']:.3f} bits per weight"
            )


def _range(views: Sequence[TensorView]) -> str:
    values = sorted(view.sqnr_db for view in views if view.sqnr_db is not None)
    ends = ["exact" if math.isinf(value) and value > 0 else f"{value:.2f}" for value in values]
    return "" if not ends else ends[0] if values[0] == values[-1] else f"{ends[0]} to {ends[-1]}"


def simulate(
    job: Job,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="List every value with its grid and rule."),
    ] = False,
    adapter: Annotated[str | None, typer.Option(help="An adapter. Default: the first.")] = None,
    changes: Changes = None,
    device: Device = None,
    costs: Annotated[
        bool,
        typer.Option(
            "--costs",
            help="Measure how much perplexity each part of the simulation costs.",
        ),
    ] = False,
    suggest: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0.0,
            max=1.0,
            help="Find which activations need 16 bits instead of 8, so that perplexity rises by at "
            "most this share (0.05: 5 %).",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which values the simulation quantizes, and why."""
    if explain + costs + (suggest is not None) > 1:
        raise typer.BadParameter("give only one of --explain, --costs and --suggest")
    from qwlora.pipeline.commands.open_job import open_job

    asked = (*(changes or ()), *([] if suggest is None else [NARROW]))
    with ProgressDisplay(as_json or not (costs or suggest is not None)) as display:
        opened, name = open_job(job, adapter, asked, display.track, device)
        from qwlora.pipeline.commands import simulate_job

        if costs:
            record = simulate_job.measure_costs(opened, name)
            lines = _cost_lines(record)
        elif suggest is not None:
            record = simulate_job.suggest_bitwidths(opened, name, suggest)
            lines = _suggestion_lines(record)
        else:
            log = simulate_job.explain_placement(opened, name)
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
    kept = f"; {record['kept']} more keep the grid from a rule of the recipe"
    yield (
        f"adapter {record['adapter']}: {wide} of {searched} activations at 16 bits, the others at 8"
        f"{kept if record['kept'] else ''}"
    )
    heads = {"measured": "these rules", "limit": "limit", "float_activations": "float activations"}
    heads |= {"all_wide": "all at 16 bits", "all_narrow": "all at 8 bits"}
    rows = [(f"perplexity on the {record['sequences']} held-out sequences of the search", "")]
    rows += [(head, f"{record[key]:.4f}") for key, head in heads.items()]
    if (fresh := record["fresh"]) is not None:
        rows.append((f"perplexity on {fresh['sequences']} other sequences", ""))
        rows += [(head, f"{fresh[key]:.4f}") for key, head in heads.items() if key in fresh]
    yield from table(rows)
    if fresh is None:
        yield (
            "the search used all evaluation sequences; raise data.evaluation_sequences to measure "
            "the result on other text"
        )
    yield from _unshared(record)
    yield "\nsimulation:\n  activation_bitwidth: 8"
    yield "  rules:" if record["rules"] else "  rules: []"
    yield from (f"    - {strict_json.dumps(rule)}" for rule in record["rules"])


def _unshared(record: dict[str, Any]) -> Iterator[str]:
    if "unshared" in record:
        yield (
            "measured with separate encodings for this adapter; the recipe shares some of them "
            f"(base_activations: {record['unshared']}), so its result will be worse"
        )


def _lines(name: str, log: Placement, everything: bool) -> Iterator[str]:
    counts = Counter(value.decision.value for value in log.values)
    counted = ", ".join(f"{counts[d]} {d}" for d in ("quantize", "share", "float"))
    yield f"adapter {name}, policy {log.policy}: {counted}"
    rows: list[tuple[str, ...]]
    if everything:
        rows = [("value", "count", "class", "decision", "grid", "reason")]
        for pattern, values in group_similar(
            log.values,
            # Names of computed values end in a number, which tells values of one operator apart.
            lambda v: f"{v.module or 'output'}.{v.operator}" if v.is_computed else v.name,
            lambda v: (v.module_class, v.decision, v.reason, _grid(v)),
        ):
            v, count = values[0], str(len(values))
            decided = (v.module_class, v.decision.value, _grid(v), v.reason)
            rows.append((pattern, count, *decided))
    else:
        reasons = Counter((v.kind.value, v.decision.value, v.grid, v.reason) for v in log.values)
        rows = [("tensor", "count", "decision", "grid", "reason")]
        rows += [(kind, str(count), *decided) for (kind, *decided), count in reasons.items()]
    yield from table(rows)


def _grid(value: GraphValue) -> str:
    return value.grid if value.observer in ("", "min-max") else f"{value.grid}, {value.observer}"
