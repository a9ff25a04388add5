"""Does each runtime compute what was trained? Figures of each runtime, and all checks of several
adapters. The checks of a single adapter are under the verdict.
"""

from __future__ import annotations

from qwlora.errors import size
from qwlora.report.number_format import fixed, precise_percent, significant, three_decimals
from qwlora.report.results_view import Job, runtime
from qwlora.report.sections import Cell, Table, View, section
from qwlora.report.verdict import Outcome, outcome_of, proof_evidence
from qwlora.system.parameter_names import BASE
from qwlora.targets.registry import TARGETS

QUESTION = "Does each runtime compute what was trained?"


@section("parity", "Runtimes", QUESTION, position=90, of_adapter=True)
def view(job: Job, adapter: str) -> View | None:
    """What the template draws."""
    reasons, rows = dict[str, str](), list[dict[str, Cell]]()
    of_outcome: dict[Outcome, list[str]] = {outcome: [] for outcome in Outcome}
    of_kind: dict[str, list[str]] = {"simulated": [], "adapted": []}
    checks = []
    for target in job.targets:
        name, evidence = runtime(target), proof_evidence(job, target, adapter)
        # The base has its own files, or is in the files of each adapter.
        owner = BASE if BASE in job.section("export", target) else adapter
        base: Cell = job.shown(size, "export", target, owner, "bytes")
        bits: Cell = job.shown(fixed, "export", target, owner, "bits_per_weight")
        for settings, how in (("", TARGETS[target].exact), ("shipped_", TARGETS[target].shipped)):
            cells = parity_cells(job, target, adapter, settings)
            if cells["Perplexity"] or not settings:
                label = ", ".join(filter(None, (name, how)))
                rows.append({"Runtime": label, **cells, "Base": base, "Bits per weight": bits})
        of_outcome[outcome_of(evidence)].append(target)
        arithmetic = job.arithmetic([target], [adapter])
        of_kind[job.compared_with(target, adapter)].append(name + arithmetic)
        reasons[target] = str(job.get("parity", target, adapter, "not_run") or "not checked")
        if (reason := job.stale.get((target, adapter))) is not None:
            reasons[target] = f"files changed after the check: {reason}"
        if len(job.adapters) > 1:
            of_check: list[dict[str, Cell]] = [
                {"Check": e.what, "Value": e.value, "Limit": e.limit, "Outcome": e.outcome.word}
                for e in evidence
            ]
            checks.append(Table(f"Checks in {name}", of_check, words=("Limit", "Outcome")))
    is_measured = any(row["Same token"] for row in rows)
    if not rows or (not is_measured and job.state != "finished"):
        return None
    failed, missing = of_outcome[Outcome.FAILED], of_outcome[Outcome.MISSING]
    problems = job.get("parity", failed[0], adapter, "problems") if failed else []
    return {
        "tables": [Table("Exported files against the exported models", rows), *checks],
        "names": [runtime(target) for target in job.targets],
        "failed": [runtime(target) for target in failed],
        "problems": "; ".join(str(problem) for problem in problems or []),
        "missing": [runtime(target) for target in missing],
        "why": reasons[missing[0]] if missing else "",
        "verify": job.verb_command("verify"),
        "graphs": of_kind["simulated"],
        "weights": of_kind["adapted"],
    }


def parity_cells(job: Job, target: str, adapter: str, settings: str = "") -> dict[str, Cell]:
    """Differences of an adapter's exported files from the expected results, see `Job.drift`; empty
    if the files changed. Shipped settings are not checked."""
    place, drift = ("parity", target, adapter), job.drift(target, adapter, settings)
    is_passed = job.get(*place, "passed")
    check = None if is_passed is None else "passed" if is_passed else "failed"
    cells: dict[str, Cell] = {
        "Perplexity": job.shown(three_decimals, *place, f"{settings}perplexity"),
        "Expected": job.shown(three_decimals, *place, "reference_perplexity"),
        "Off by": None if drift is None else precise_percent(abs(drift)),
        "Log-probability off by": job.shown(
            significant, *place, f"{settings}max_log_prob_difference"
        ),
        "Same token": job.shown(precise_percent, *place, f"{settings}top1_agreement"),
        "Noise floor": job.shown(precise_percent, *place, "floor_top1_agreement"),
        "Worst layer, steps": job.shown(fixed, *place, "worst_layer_steps"),
        "Check": "reported" if settings else check,
    }
    return dict.fromkeys(cells) if (target, adapter) in job.stale else cells
