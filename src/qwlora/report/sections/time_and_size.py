"""What did it take, and how big is it? Stages in order with their share of the time; sizes."""

from __future__ import annotations

from qwlora.errors import size
from qwlora.report import number_format as form
from qwlora.report.drawing import Row, chart, figure
from qwlora.report.number_format import finite, fixed, percent, seconds
from qwlora.report.results_view import FILES, FLOAT_BYTES, Job, capitalized, runtime
from qwlora.report.sections import View, section

MOST_BARS = 40
QUESTIONS = {"failed": "Where did it stop?", "running": "Where is the job?"}


@section("cost", "Time and size", "What did it take, and how big is it?", position=60, of_job=True)
def view(job: Job, adapter: str) -> View | None:
    """What the template draws."""
    done, plan, total = job.finished_stages, job.planned_stages, job.seconds_so_far
    if not done:
        return None
    current = job.get("run", "stage")
    times = {
        name: finite(part.get("seconds")) or 0.0 for name, part in done.items() if name != current
    }
    stages = [*(name for name in done if name not in plan), *plan]
    longest = max(stages, key=lambda name: times.get(name, 0.0))
    share = percent(times.get(longest, 0.0) / total) if total else "0%"
    time, begin = list[Row](), 0.0
    for name in stages:
        verb, *parts = name.replace("/on/", " on text of ").split("/")
        # No adapter's name begins with an underscore: `calibrate/_base` is of the base.
        said = (part[1:].replace("_", " ") if part.startswith("_") else part for part in parts)
        title = " ".join([capitalized(verb), *said])
        if name in times:
            end, value = begin + times[name], seconds(times[name])
            if (memory := finite(done[name].get("peak_rss_bytes"))) is not None:
                value += f", {size(memory)}"
            if (memory := finite(done[name].get("peak_device_bytes"))) is not None:
                value += f" + {size(memory)} of {done[name].get('device')}"
            of_job = percent(times[name] / total) if total else "0%"
            tooltip = f"{title}: {seconds(times[name])}, {of_job} of the job"
            color = "k-gain" if name == longest else "k-neu"
            time.append(Row(title, value, [(begin, end, color, tooltip)]))
            begin = end
        elif name == current and job.state == "failed":
            failed = (begin, begin + 0.02 * total, "k-loss", f"{title} failed")
            time.append(Row(title, "failed", [failed]))
        else:
            state = "running" if name == current and job.state == "running" else "waiting"
            time.append(Row(title, state, hatched=f"{title}: {state}"))
    sizes = _sizes(job)
    largest = max((stop for row in sizes for _, stop, _, _ in row.parts), default=0.0)
    of_longest = time[stages.index(longest)].name.lower()
    return {
        "question": QUESTIONS.get(job.state),
        "summary": f"{seconds(total)} in all; the longest stage was {of_longest}, {share} of it.",
        "waits": any(row.hatched for row in time),
        "time": figure(lambda w: chart("Time by stage", time[:MOST_BARS], w, (0, total))),
        "left_out": max(0, len(stages) - MOST_BARS),
        "sizes": figure(lambda w: chart("Size", sizes, w, (0, largest))) if sizes else "",
        "model": _whole_model(job),
    }


def _sizes(job: Job) -> list[Row]:
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
            # A runtime may store floats in 16 bits.
            rows.append(_size_bar(f"Base for {runtime(target)}", base, min(floats, base - packed)))
        for name in job.adapters:
            if (exported := job.number("export", target, name, "bytes")) is not None:
                title = FILES.get(target, runtime(target))
                title = title if len(job.adapters) == 1 else f"{title}, {name}"
                # Without a base of its own, the file holds the base's float values.
                rows.append(_size_bar(title, exported, floats if base is None else 0.0))
    return rows


def _size_bar(name: str, number: float, floats: float = 0.0) -> Row:
    new = number - min(floats, number)
    parts = []
    if new > 0:
        parts.append((0.0, new, "k-gain", f"{name}: {size(new)} packed or new"))
    if new < number:
        parts.append((new, number, "k-neu2", f"{name}: {size(number - new)} stay float"))
    return Row(name, size(number), parts)


def _whole_model(job: Job) -> View | None:
    path = ("base", "bits_per_weight")
    packed, weights = job.number("base", "bytes"), job.number("base", "weights")
    floats, bits = job.number("base", "float_weights"), job.shown(fixed, *path)
    if bits is None or packed is None or weights is None or floats is None:
        return None
    stored = packed + FLOAT_BYTES * floats
    return {
        "bits": bits,
        "all_bits": fixed(8 * stored / (weights + floats), 1),
        "floats": f"{fixed(floats / 1e6, 1)} million" if floats >= 1e6 else form.count(floats),
        "share": percent(FLOAT_BYTES * floats / stored),
    }
