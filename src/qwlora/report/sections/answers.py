"""How well does it answer? Answers to held-out prompts, and lm-eval's scores of tasks, by model."""

from __future__ import annotations

from typing import NamedTuple

from markupsafe import Markup

from qwlora.report.number_format import finite, precise_percent, significant, tagged
from qwlora.report.results_view import KINDS, Job, runtime
from qwlora.report.sections import Cell, Table, View, section

LOWER_IS_BETTER = ("perplexity", "byte_perplexity", "word_perplexity", "bits_per_byte")
HEADS = {**KINDS, "float": "Float"}


class Score(NamedTuple):
    """The score of a task, and its place in the results."""

    value: float
    stderr: float | None
    metric: str
    shots: str
    path: tuple[str, ...]

    def shown(self, reference: Score | None) -> Markup:
        # lm-eval's accuracies are shares; perplexities are not.
        written = precise_percent if 0 <= self.value <= 1 else significant
        value = tagged(written(self.value), self.value, (*self.path, "value"))
        if self.stderr is None:
            return value
        cell = value + Markup(' <span class="u">± {}</span>').format(written(self.stderr))
        if reference is None:
            return cell
        stderr = (self.stderr**2 + (reference.stderr or 0.0) ** 2) ** 0.5
        is_apart = abs(self.value - reference.value) > 2 * stderr
        return Markup("<b>{}</b>").format(cell) if is_apart else cell


@section("answers", "Answers", "How well does it answer?", position=30, of_adapter=True)
def view(job: Job, adapter: str) -> View | None:
    """None without answers and tasks: the section would be empty."""
    scores = {
        stage: of_stage
        for stage in dict.fromkeys([*HEADS, *job.section("tasks")])
        if (of_stage := _scores(job, stage, adapter))
    }
    tasks = dict.fromkeys(task for of_stage in scores.values() for task in of_stage)
    rows: list[dict[str, Cell]] = []
    for task in tasks:
        first = next(of_stage[task] for of_stage in scores.values() if task in of_stage)
        arrow = "↓" if first.metric in LOWER_IS_BETTER else "↑"
        reference = scores.get("float", {}).get(task)
        row: dict[str, Cell] = {"Task": task, "Shots": first.shots}
        row["Measure"] = f"{first.metric} {arrow}"
        for stage, of_stage in scores.items():
            # Two targets may have one runtime, such as onnx and onnx_each.
            head = HEADS.get(stage, runtime(stage))
            head = stage if head in row else head
            row[head] = of_stage[task].shown(reference) if task in of_stage else None
        rows.append(row)
    prompts = answers_of(job, adapter)
    if not rows and not prompts:
        return None
    caption = (
        "Value ± standard error; bold differs from float by more than 2 standard errors. "
        "The arrow points to the better direction."
    )
    table = Table(caption, rows, words=("Measure",), sortable=True)
    return {"prompts": prompts, "table": table if rows else None}


def answers_of(job: Job, adapter: str) -> dict[str, dict[str, str]]:
    """Answers by held-out prompt, and by the title of the model."""
    answers: dict[str, dict[str, str]] = {}
    for kind, title in KINDS.items():
        for pair in job.get(*job.path(kind, adapter, "answers")) or ():
            answers.setdefault(str(pair.get("prompt")), {})[title] = str(pair.get("answer"))
    return answers


def _scores(job: Job, stage: str, adapter: str) -> dict[str, Score]:
    # The name of an adapter is between its stage and its tasks; a task may have the same name.
    path: tuple[str, ...] = ("tasks", stage)
    of_adapter = job.section(*path, adapter)
    if of_adapter and "value" not in of_adapter:
        path = (*path, adapter)
    scores = {}
    for task, score in job.section(*path).items():
        if isinstance(score, dict) and (value := finite(score.get("value"))) is not None:
            metric, shots = (str(score.get(key, "")) for key in ("metric", "shots"))
            stderr = finite(score.get("stderr"))
            scores[task] = Score(value, stderr, metric, shots, (*path, task))
    return scores
