"""What did it take, and how big is it? Stages in order with their share of the time; sizes."""

from __future__ import annotations

from markupsafe import Markup

from qwlora.report.drawing import Bar, bars, figure
from qwlora.report.number_format import (
    NOT_MEASURED,
    count,
    finite,
    fixed,
    percent,
    seconds,
    size,
    tagged,
)
from qwlora.report.report_section import Cell, Table, View, section
from qwlora.report.results_view import FILES, FLOAT_BYTES, Job, capitalized, runtime

MOST_BARS = 40
QUESTIONS = {"failed": "Where did it stop?", "running": "Where is the job?"}


@section("cost", "Time and size", "What did it take, and how big is it?", position=80, of_job=True)
def view(job: Job, adapter: str) -> View | None:
    """What the template draws."""
    done, plan, total = job.finished_stages, job.planned_stages, job.seconds_so_far
    if not done:
        return None
    current = job.get("run", "stage")
    times = {name: finite(part.get("seconds")) or 0.0 for name, part in done.items()}
    times = {name: time for name, time in times.items() if name != current}
    stages = [*(name for name in done if name not in plan), *plan]
    longest = max(stages, key=lambda name: times.get(name, 0.0))
    states = {
        name: job.state if name == current and job.state in QUESTIONS else "waiting"
        for name in stages
        if name not in times
    }
    rows, begin, waits = list[Bar](), 0.0, any(s != "failed" for s in states.values())
    for name in stages[:MOST_BARS]:
        spoken = _spoken(name)
        if name in times:
            end = begin + times[name]
            color = "k-gain" if name == longest else "k-neu"
            share = percent(times[name] / total) if total else "0%"
            title = f"{spoken}: {seconds(times[name])}, {share} of the job"
            rows.append(Bar(spoken, seconds(times[name]), [(begin, end, color, title)]))
            begin = end
        else:
            part = [(begin, begin + 0.02 * total, "k-loss", f"{spoken} failed")]
            is_failed = states[name] == "failed"
            hatched = "" if is_failed else f"{spoken}: {states[name]}"
            rows.append(Bar(spoken, states[name], part if is_failed else (), hatched))
    sizes = _sizes(job)
    largest = max((stop for row in sizes for _, stop, _, _ in row.parts), default=0.0)
    share = percent(times.get(longest, 0.0) / total) if total else "0%"
    return {
        "question": QUESTIONS.get(job.state, "What did it take, and how big is it?"),
        "summary": f"{seconds(total)} in all; "
        f"the longest stage was {_spoken(longest).lower()}, {share} of it.",
        "waits": waits,
        "time": figure(lambda width: bars("Time by stage", rows, total, width)),
        "left_out": max(0, len(stages) - MOST_BARS),
        "table": Table(
            "Time and peak memory of each stage",
            [_table_row(job, name, states.get(name)) for name in stages],
            sortable=True,
        ),
        "sizes": figure(lambda width: bars("Size", sizes, largest, width)) if sizes else "",
        "answer": _answer(job),
    }


def _spoken(stage: str) -> str:
    """`evaluate/adapted/first` as `Evaluate adapted first`, and `calibrate/_base` as `Calibrate
    base`."""
    verb, *parts = stage.replace("/on/", " on text of ").split("/")
    # no adapter's name begins with an underscore
    said = (part[1:].replace("_", " ") if part.startswith("_") else part for part in parts)
    return " ".join([capitalized(verb), *said])


def _table_row(job: Job, stage: str, state: str | None) -> dict[str, Cell]:
    path = ("stages", stage.partition("/")[0], "parts", stage)
    return {
        "Stage": _spoken(stage),
        "Time": state or job.shown(seconds, *path, "seconds") or seconds(0),
        "Peak memory": None if state else job.shown(size, *path, "peak_rss_bytes"),
    }


def _sizes(job: Job) -> list[Bar]:
    packed, values = job.number("base", "bytes"), job.number("base", "float_weights")
    if packed is None:
        return []
    floats = 0.0 if values is None else FLOAT_BYTES * values
    whole = job.float_bytes
    rows = [] if whole is None else [_size_bar("Float model, in float32", whole, whole)]
    name = "Packed layers" if values is None else "Packed base"
    rows.append(_size_bar(name, packed + floats, floats))
    adapters = {name: job.number("sizes", f"adapters/{name}") for name in job.adapters}
    rows += [_size_bar(f"Adapter {name}", a) for name, a in adapters.items() if a is not None]
    for target in job.targets:
        if (base := job.number("export", target, "base", "bytes")) is not None:
            rows.append(_size_bar(f"Base for {runtime(target)}", base, floats))
        for name in job.adapters:
            if (exported := job.number("export", target, name, "bytes")) is not None:
                title = FILES.get(target, runtime(target))
                title = title if len(job.adapters) == 1 else f"{title}, {name}"
                # without a base of its own, the file holds the base's float values
                rows.append(_size_bar(title, exported, floats if base is None else 0.0))
    return rows


def _size_bar(name: str, number: float, floats: float = 0.0) -> Bar:
    """A bar of bytes, those that stay float last."""
    new = number - min(floats, number)
    parts = []
    if new > 0:
        parts.append((0.0, new, "k-gain", f"{name}: {size(new)} packed or new"))
    if new < number:
        parts.append((new, number, "k-neu2", f"{name}: {size(number - new)} stay float"))
    return Bar(name, size(number), parts)


def _answer(job: Job) -> Markup:
    bits, packed = job.number("base", "bits_per_weight"), job.number("base", "bytes")
    weights, floats = job.number("base", "weights"), job.number("base", "float_weights")
    if bits is None or packed is None or weights is None or floats is None:
        return Markup("Sizes: {}.").format(NOT_MEASURED)
    stored = packed + FLOAT_BYTES * floats
    return Markup(
        "<b>{} bits per packed weight, {} over the whole model.</b> {} values stay float "
        "(embeddings, norms, biases); in float32 they are {} of the base."
    ).format(
        tagged(fixed(bits), bits, ("base", "bits_per_weight")),
        fixed(8 * stored / (weights + floats), 1),
        f"{fixed(floats / 1e6, 1)} million" if floats >= 1e6 else count(floats),
        percent(FLOAT_BYTES * floats / stored),
    )
