"""`qwlora simulate DIR [--explain]`: what step 3 places where, and why, for an adapter of a job. Calibrates nothing, writes nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwlora.cli_table import alike, table

if TYPE_CHECKING:
    from qwlora.simulation.explain import Explained, Explanation

Job = Annotated[Path, typer.Argument(metavar="DIR", help="A job's directory, with its base and adapters.", show_default=False)]
Explain = Annotated[bool, typer.Option("--explain", help="List every value with its grid and the rule that decided, alike ones in one line.")]
Name = Annotated[str | None, typer.Option("--adapter", help="Which adapter; the recipe's first unless given.", show_default=False)]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="See what a change of the recipe would place, like simulation.policy=matmul-inputs.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print every value as JSON, and nothing else.")]


def simulate(job: Job, explain: Explain = False, adapter: Name = None, changes: Changes = None, as_json: AsJson = False) -> None:
    """Show what the simulation quantizes: counts, or with --explain every value and why."""
    from qwlora.pipeline.explain import explain_job

    name, found = explain_job(job, adapter, tuple(changes or ()))
    print(json.dumps({"adapter": name, **found.to_json()}, indent=1) if as_json else "\n".join(_lines(name, found, explain)))


def _lines(name: str, found: Explanation, everything: bool) -> Iterator[str]:
    counts = Counter(value.decision.value for value in found.values)
    yield f"adapter {name}, policy {found.policy}: {', '.join(f'{counts[d]} {d}' for d in ('quantize', 'share', 'float'))}"
    if everything:
        rows = [("value", "count", "class", "decision", "grid", "reason")]
        for pattern, values in alike(found.values, _name, lambda v: (v.module_class, v.decision, v.reason, _grid(v))):
            first = values[0]
            rows.append((pattern, str(len(values)), first.module_class, first.decision.value, _grid(first), first.reason))
        yield from table(rows)
    else:
        by_reason = Counter((value.kind, value.decision.value, value.grid, value.reason) for value in found.values)
        yield from table([("tensor", "count", "decision", "grid", "reason"), *((k, str(n), d, g, r) for (k, d, g, r), n in by_reason.items())])
    if found.unknown:
        listed = ", ".join(f"{operator} ({count})" for operator, count in sorted(found.unknown.items()))
        yield f"operators that no rule knows: {listed}; see the reason of each, and give a rule if it is wrong"


def _name(value: Explained) -> str:
    """Where a value is, without the number that tells equal ones apart."""
    return value.name if value.operator in ("weight", "input") else f"{value.module or 'output'}.{value.operator}"


def _grid(value: Explained) -> str:
    """The grid; with an observer that is not the usual one."""
    return value.grid if value.observer in ("", "min-max") else f"{value.grid}, {value.observer}"
