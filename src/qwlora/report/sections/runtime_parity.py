"""Does each runtime compute what was trained? Agreement against the noise floor, and each limit."""

from __future__ import annotations

from typing import NamedTuple

from markupsafe import Markup

from qwlora.report.drawing import Bar, Drawing, Scale, bars, figure, is_narrow, shortened, ticks
from qwlora.report.number_format import count, precise_percent
from qwlora.report.results_view import Job, capitalized, code, runtime
from qwlora.report.sections import View, section
from qwlora.report.verdict import Outcome, outcome_of, proof_evidence

MOST_SHOWN = 3.0  # times a limit; longer bars end there


class Agreement(NamedTuple):
    """One runtime; without `share` it was not checked, for the reason `why`."""

    name: str
    why: str
    share: float | None
    floor: float | None
    tokens: float | None


QUESTION = "Does each runtime compute what was trained?"


@section("parity", "Runtimes", QUESTION, position=60, of_adapter=True)
def view(job: Job, adapter: str) -> View | None:
    """What the template draws."""
    rows = []
    for target in job.targets:
        keys = ("top1_agreement", "floor_top1_agreement", "tokens")
        figures = [job.number("parity", target, adapter, key) for key in keys]
        why = str(job.get("parity", target, adapter, "not_run") or "not checked")
        if (reason := job.stale.get((target, adapter))) is not None:
            figures, why = [None] * len(keys), f"files changed after the check: {reason}"
        rows.append(Agreement(runtime(target), why, *figures))
    is_measured = any(row.share is not None for row in rows)
    if not rows or (not is_measured and job.state != "finished"):
        return None
    of_outcome: dict[Outcome, list[str]] = {outcome: [] for outcome in Outcome}
    of_kind: dict[str, list[str]] = {"simulated": [], "adapted": []}
    for target in job.targets:
        of_outcome[outcome_of(proof_evidence(job, target, adapter))].append(target)
        of_kind[job.compared_with(target, adapter)].append(runtime(target))
    failed, missing = of_outcome[Outcome.FAILED], of_outcome[Outcome.MISSING]
    problems = job.get("parity", failed[0], adapter, "problems") if failed else []
    return {
        "figure": figure(lambda width: _draw(rows, width)) if is_measured else "",
        "names": [row.name for row in rows],
        "failed": [runtime(target) for target in failed],
        "problems": "; ".join(str(problem) for problem in problems or []),
        "missing": [runtime(target) for target in missing],
        "why": rows[job.targets.index(missing[0])].why if missing else "",
        "verify": job.verb_command("verify"),
        "graphs": of_kind["simulated"],
        "weights": of_kind["adapted"],
        "limits": [limits for target in job.targets if (limits := _limits(job, target, adapter))],
    }


def _draw(rows: list[Agreement], width: int) -> Drawing:
    narrow = is_narrow(width)
    left, right, step = (0, 62, 46) if narrow else (152, 118, 32)
    floors = [row.floor for row in rows if row.floor is not None]
    least = min([*floors, *(row.share for row in rows if row.share is not None)])
    low = least - max(0.4 * (1 - least), 0.002)
    scale, height = Scale(low, 1.0, left, width - right), 50 + step * len(rows)
    words = "; ".join(
        f"{row.name} {row.why}"
        if row.share is None
        else f"{row.name} {precise_percent(row.share)}"
        + (f", noise floor {precise_percent(row.floor)}" if row.floor is not None else "")
        for row in rows
    )
    drawing = Drawing(width, height, "Agreement by runtime", f"{words}.")
    if floors:
        floor, bottom = scale(max(floors)), height - 28
        title = "Below the noise floor: a real difference"
        drawing.rect(left, 22, floor - left, bottom - 22, "below", title)
        drawing.line(floor, 16, floor, bottom, "limit")
        words = f"noise floor {precise_percent(max(floors))}"
        is_right = floor - left > 130
        drawing.text(floor - 5 * is_right, 12, words, "ax", "end" if is_right else "start")
    for tick in ticks(low, 1.0, 3 if narrow else 5):
        anchor = "start" if scale(tick) < 16 else "middle"
        drawing.text(scale(tick), height - 8, f"{100 * tick:g}%", "ax", anchor)
    for number, row in enumerate(rows):
        y = 41 + step * number
        drawing.text(0, y - 8 if narrow else y + 5, shortened(row.name, 146), "lb")
        if row.share is None:
            drawing.rect(left, y - 4, width - right - left, 8, "hatch", row.why, 4)
            drawing.text(width, y + 5, "not measured", "mut", "end")
            continue
        y += 6 if narrow else 0
        drawing.line(left, y, width - right, y)
        color = "d-loss" if row.floor is not None and row.share < row.floor else "d-gain"
        shown = precise_percent(row.share)
        title = f"{row.name}: {shown} of {count(row.tokens or 0)} tokens"
        drawing.circle(scale(row.share), y, 6, f"mark {color}", title)
        drawing.text(width, y + 5, shown, "nm2", "end")
    return drawing


def _limits(job: Job, target: str, adapter: str) -> dict[str, Markup | str] | None:
    """Title, figure and caption: how much of each limit a runtime used."""
    rows = []
    for row in job.proof_rows(target, adapter):
        if row.is_measured and row.shown_limit:
            share, name = row.share_of_limit, capitalized(row.what)
            color = "k-loss" if share > 1 else "k-gain"
            part = (0.0, min(share, MOST_SHOWN), color, f"{name}: {row.shown_value}")
            rows.append(Bar(name, row.shown_value, [part], "", (1.0, row.shown_limit)))
    if not rows or (target, adapter) in job.stale:
        return None
    most = max(1.25, *(stop for row in rows for _, stop, _, _ in row.parts))
    place, caption = ("parity", target, adapter), ""
    if worst := job.get(*place, "worst_layer"):
        caption = Markup(
            "Worst layer: {}. Each of {} layers was fed the simulation's own input."
        ).format(code(str(worst)), count(job.number(*place, "layers") or 0))
    return {
        "title": f"{runtime(target)}, share of each limit used",
        "figure": figure(lambda width: bars("Share of each limit used", rows, most, width)),
        "caption": caption,
    }
