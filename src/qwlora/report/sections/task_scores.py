"""How well does it answer? Scores of tasks by stage, as lm-eval reports them."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from qwlora.report.number_format import precise_percent, significant
from qwlora.report.report_table import Table
from qwlora.report.results_view import Job, finite, runtime, tagged
from qwlora.report.section import Section, View

STAGES = {
    "float": "Float",
    "base": "Packed base",
    "adapted": "With adapter",
    "simulated": "Simulated",
}
LOWER_IS_BETTER = ("perplexity", "byte_perplexity", "word_perplexity", "bits_per_byte")


def view(job: Job, adapter: str | None) -> View | None:
    """None without tasks: the section would be empty."""
    name = adapter or job.adapters[0]
    scores = {stage: _scores(job, stage, name) for stage in _stages(job)}
    tasks = list(dict.fromkeys(task for found in scores.values() for task in found))
    if not tasks:
        return None
    stages = [stage for stage, found in scores.items() if found]
    rows: list[list[str | Markup | None]] = []
    for task in tasks:
        first = next(found[task] for found in scores.values() if task in found)[1]
        metric = str(first.get("metric", ""))
        arrow = "↓" if metric in LOWER_IS_BETTER else "↑"
        reference = scores.get("float", {}).get(task)
        cells = [_cell(scores[stage].get(task), reference) for stage in stages]
        rows.append([task, str(first.get("shots", "")), f"{metric} {arrow}", *cells])
    columns = ("Task", "Shots", "Measure", *(STAGES.get(s, runtime(s)) for s in stages))
    return {
        "table": Table(
            "Value ± standard error; bold differs from float by more than 2 standard errors. "
            "The arrow points to the better direction.",
            columns,
            rows,
            left=(2,),
            sortable=True,
        )
    }


def _stages(job: Job) -> list[str]:
    others = [stage for stage in job.section("tasks") if stage not in STAGES]
    return [*STAGES, *others]


def _scores(
    job: Job, stage: str, adapter: str
) -> dict[str, tuple[tuple[str, ...], dict[str, Any]]]:
    """Path and score of each task; a stage of an adapter has its name in between."""
    path: tuple[str, ...] = ("tasks", stage)
    found = job.section(*path)
    if isinstance(own := found.get(adapter), dict) and "value" not in own:
        found, path = own, (*path, adapter)
    return {
        task: ((*path, task), score)
        for task, score in found.items()
        if isinstance(score, dict) and finite(score.get("value")) is not None
    }


def _cell(
    found: tuple[tuple[str, ...], dict[str, Any]] | None,
    reference: tuple[tuple[str, ...], dict[str, Any]] | None,
) -> Markup | None:
    if found is None:
        return None
    path, score = found
    value, stderr = float(score["value"]), finite(score.get("stderr"))
    write = precise_percent if 0 <= value <= 1 else significant
    shown = tagged(write(value), value, (*path, "value"))
    if stderr is None:
        return shown
    cell = shown + Markup(' <span class="u">± {}</span>').format(write(stderr))
    if reference is None or reference[1] is score:
        return cell
    other = finite(reference[1].get("stderr")) or 0.0
    apart = abs(value - float(reference[1]["value"])) > 2 * (stderr**2 + other**2) ** 0.5
    return Markup("<b>{}</b>").format(cell) if apart else cell


SECTION = Section(
    "tasks",
    "Tasks",
    "How well does it answer?",
    "task_scores.html",
    view,
    of_job=False,
    of_adapter=True,
)
