"""Does each runtime compute what was trained? Agreement against the noise floor, and each limit."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from qwlora.report.checks import Outcome, outcome_of, proof_checks
from qwlora.report.drawing import Drawing, Scale, figure, shortened, ticks
from qwlora.report.number_format import count, listed, precise_percent
from qwlora.report.results_view import Job, code, runtime
from qwlora.report.section import Section, View

MOST_SHOWN = 3.0  # times a limit; longer bars end there


@dataclass(frozen=True)
class Row:
    """One runtime; without `share` it was not checked, for the reason `why`."""

    name: str
    share: float | None
    floor: float | None = None
    tokens: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Limits:
    """How much of each limit a runtime used."""

    title: str
    figure: Markup
    caption: Markup | str


def view(job: Job, adapter: str | None) -> View | None:
    """What the template draws."""
    name = adapter or job.adapters[0]
    if not job.targets:
        return None
    rows = [_row(job, target, name) for target in job.targets]
    measured = [row for row in rows if row.share is not None]
    if not measured and job.state != "finished":
        return None
    return {
        "figure": figure(lambda width: _draw(rows, width)) if measured else "",
        "answer": _answer(job, name, rows),
        "limits": [limits for target in job.targets if (limits := _limits(job, target, name))],
    }


def _row(job: Job, target: str, adapter: str) -> Row:
    if (reason := job.stale.get((target, adapter))) is not None:
        return Row(runtime(target), None, why=f"files changed after the check: {reason}")
    place = ("parity", target, adapter)
    return Row(
        runtime(target),
        job.number(*place, "top1_agreement"),
        job.number(*place, "floor_top1_agreement"),
        job.number(*place, "tokens"),
        str(job.get(*place, "not_run") or "not checked"),
    )


def _draw(rows: list[Row], width: int) -> Drawing:
    narrow = width < 500
    left, right, step = (0 if narrow else 152), 118 if not narrow else 62, 46 if narrow else 32
    shares = [v for row in rows for v in (row.share, row.floor) if v is not None]
    low = min(shares) - max(0.4 * (1 - min(shares)), 0.002)
    scale = Scale(low, 1.0, left, width - right)
    height = 50 + step * len(rows)
    words = "; ".join(
        f"{row.name} {precise_percent(row.share)}"
        + (f", noise floor {precise_percent(row.floor)}" if row.floor is not None else "")
        if row.share is not None
        else f"{row.name} {row.why}"
        for row in rows
    )
    drawing = Drawing(width, height, "Agreement by runtime", f"{words}.")
    bottom = height - 28
    floors = [row.floor for row in rows if row.floor is not None]
    floor = max(floors, default=None)
    if floor is not None:
        word = "Below the noise floor: a real difference"
        drawing.rect(left, 22, scale(floor) - left, bottom - 22, "below", word)
        drawing.line(scale(floor), 16, scale(floor), bottom, "limit")
        at_left = scale(floor) - left > 130
        drawing.text(
            scale(floor) + (-5 if at_left else 0),
            12,
            f"noise floor {precise_percent(floor)}",
            "ax",
            "end" if at_left else "start",
        )
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
        below = row.floor is not None and row.share < row.floor
        title = f"{row.name}: {precise_percent(row.share)} of {count(row.tokens or 0)} tokens"
        drawing.circle(scale(row.share), y, 6, f"mark {'d-loss' if below else 'd-gain'}", title)
        drawing.text(width, y + 5, precise_percent(row.share), "nm2", "end")
    return drawing


def _answer(job: Job, adapter: str, rows: list[Row]) -> Markup:
    outcomes = {t: outcome_of(list(proof_checks(job, t, adapter))) for t in job.targets}
    if failed := [t for t in job.targets if outcomes[t] is Outcome.FAILED]:
        problems = job.get("parity", failed[0], adapter, "problems") or []
        return Markup("<b>{} does not.</b> {}.").format(
            listed([runtime(t) for t in failed]), "; ".join(str(p) for p in problems)
        )
    if missing := [n for n, t in enumerate(job.targets) if outcomes[t] is Outcome.MISSING]:
        return Markup("<b>Not proven for {}: {}.</b> Check the files with {}.").format(
            listed([rows[n].name for n in missing]),
            rows[missing[0]].why,
            code(job.verb_command("verify")),
        )
    answer = Markup("<b>{} {}.</b>").format(
        listed([row.name for row in rows]), "does" if len(rows) == 1 else "do"
    )
    kinds = {t: job.compared_with(t, adapter) for t in job.targets}
    if graphs := [runtime(t) for t, kind in kinds.items() if kind == "simulated"]:
        answer += Markup(
            " {} with the simulation at least as often as the simulation agrees with itself when "
            "sums are taken in another order."
        ).format("It agrees" if len(rows) == 1 else f"{listed(graphs)} agrees")
    if weights := [runtime(t) for t, kind in kinds.items() if kind == "adapted"]:
        answer += Markup(" {} has the logits of the trained model, up to rounding.").format(
            listed(weights)
        )
    return answer


def _limits(job: Job, target: str, adapter: str) -> Limits | None:
    if (target, adapter) in job.stale:
        return None
    used = [
        (f"{row.what[:1].upper()}{row.what[1:]}", row.shown_value, row.share_of_limit)
        for row in job.proof_rows(target, adapter)
        if row.is_measured and row.shown_limit
    ]
    if not used:
        return None
    place = ("parity", target, adapter)
    worst = job.get(*place, "worst_layer")
    caption = Markup(
        "Worst layer: {}. Each of {} layers was fed the simulation's own input."
    ).format(code(str(worst)), count(job.number(*place, "layers") or 0))
    return Limits(
        f"{runtime(target)}, share of each limit used",
        figure(lambda width: _bullets(used, width)),
        caption if worst else "",
    )


def _bullets(used: list[tuple[str, str, float]], width: int) -> Drawing:
    narrow = width < 500
    left, right, step = (0, 0, 46) if narrow else (300, 170, 30)
    most = min(max(1.25, *(share for _, _, share in used)), MOST_SHOWN)
    scale = Scale(0, most, left, width - right)
    words = "; ".join(f"{name} {shown}" for name, shown, _ in used)
    drawing = Drawing(width, 26 + step * len(used), "Share of each limit used", f"{words}.")
    drawing.text(scale(1), 12, "limit", "ax", "middle")
    for number, (name, shown, share) in enumerate(used):
        y = 24 + step * number + (18 if narrow else 0)
        name = shortened(name, width - 130 if narrow else left - 8)
        drawing.text(0, y - 7 if narrow else y + 11, name, "lb")
        drawing.text(width, y - 7 if narrow else y + 11, shown, "nm2", "end")
        drawing.rect(left, y, width - right - left, 12, "track", "", 2)
        kind = "k-loss" if share > 1 else "k-gain"
        drawing.rect(
            left, y, scale(min(share, most)) - left, 12, f"mark {kind}", f"{name}: {shown}", 2
        )
        drawing.line(scale(1), y - (2 if narrow else 4), scale(1), y + 16, "limit")
    return drawing


SECTION = Section(
    "parity",
    "Runtimes",
    "Does each runtime compute what was trained?",
    "runtime_parity.html",
    view,
    of_job=False,
    of_adapter=True,
)
