"""What did it take, and how big is it? Stages in order with their share of the time; sizes."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from qwlora.report.drawing import Drawing, Scale, figure, shortened
from qwlora.report.number_format import count, fixed, percent, seconds, size
from qwlora.report.report_table import Table
from qwlora.report.results_view import FILES, NOT_MEASURED, Job, finite, runtime, tagged
from qwlora.report.section import Section, View
from qwlora.report.sections.key_figures import FLOAT_BYTES, float_bytes

MOST_BARS = 40


@dataclass(frozen=True)
class Bar:
    """A stage. Without seconds it is waiting, running or failed."""

    name: str
    seconds: float | None
    state: str  # done, running, failed, waiting
    path: tuple[str, ...] = ()


@dataclass(frozen=True)
class SizeBar:
    """Bytes of something, and how many of them stay float; None if that is not known."""

    name: str
    bytes: float
    floats: float | None
    path: tuple[str, ...] = ()


def view(job: Job, adapter: str | None) -> View | None:
    """What the template draws."""
    bars = _bars(job)
    if not bars:
        return None
    sizes = _sizes(job)
    total = job.seconds_so_far
    longest = max(bars, key=lambda bar: bar.seconds or 0.0)
    waits = any(bar.state in ("waiting", "running") for bar in bars)
    return {
        "question": {"failed": "Where did it stop?", "running": "Where is the job?"}.get(
            job.state, "What did it take, and how big is it?"
        ),
        "summary": f"{seconds(total)} in all; "
        f"the longest stage was {_spoken(longest.name).lower()}, "
        f"{percent((longest.seconds or 0) / total) if total else '0%'} of it.",
        "waits": waits,
        "time": figure(lambda width: _draw(bars[:MOST_BARS], total, width)),
        "left_out": max(0, len(bars) - MOST_BARS),
        "table": _table(job, bars),
        "sizes": figure(lambda width: _draw_sizes(sizes, width)) if sizes else "",
        "answer": _answer(job),
    }


def _bars(job: Job) -> list[Bar]:
    done = job.finished_stages
    if not done:  # a job of an older version recorded only sums
        return [
            Bar(verb, found, "done", ("stages", verb, "seconds"))
            for verb in job.section("stages")
            if (found := job.number("stages", verb, "seconds")) is not None
        ]
    plan, current = job.planned_stages or list(done), job.get("run", "stage")
    stopped = (
        "failed" if job.state == "failed" else "running" if job.state == "running" else "waiting"
    )
    bars = []
    for name in [*(n for n in done if n not in plan), *plan]:
        if name in done and name != current:
            verb = name.partition("/")[0]
            path = ("stages", verb, "parts", name, "seconds")
            bars.append(Bar(name, finite(done[name].get("seconds")) or 0.0, "done", path))
        else:
            bars.append(Bar(name, None, stopped if name == current else "waiting"))
    return bars


def _spoken(stage: str) -> str:
    """`evaluate/adapted/first` as `Evaluate adapted first`, and `calibrate/_base` as `Calibrate
    base`."""
    verb, *parts = stage.replace("/on/", " on text of ").split("/")
    # no adapter's name begins with an underscore
    said = (part[1:].replace("_", " ") if part.startswith("_") else part for part in parts)
    return " ".join([verb[:1].upper() + verb[1:], *said])


def _draw(bars: list[Bar], total: float, width: int) -> Drawing:
    narrow = width < 500
    left, right, step = (0, 0, 40) if narrow else (220, 118, 26)
    scale = Scale(0, total or 1, left, width - right)
    words = "; ".join(
        f"{_spoken(bar.name)} {seconds(bar.seconds) if bar.seconds is not None else bar.state}"
        for bar in bars
    )
    drawing = Drawing(width, 4 + step * len(bars), "Time by stage", f"{words}.")
    longest = max(bars, key=lambda bar: bar.seconds or 0.0)
    before = 0.0
    for number, bar in enumerate(bars):
        y = 5 + step * number + (16 if narrow else 0)
        name = shortened(_spoken(bar.name), (width - 110) if narrow else left - 8)
        drawing.text(0, y - 4 if narrow else y + 11, name, "lb")
        drawing.rect(left, y, width - right - left, 12, "track", "", 2)
        label = seconds(bar.seconds) if bar.seconds is not None else bar.state
        drawing.text(
            width,
            y - 4 if narrow else y + 11,
            label,
            "nm2" if bar.seconds is not None else "mut",
            "end",
        )
        start = scale(before)
        if bar.seconds is not None:
            share = percent(bar.seconds / total) if total else "0%"
            title = f"{_spoken(bar.name)}: {seconds(bar.seconds)}, {share} of the job"
            length = max(scale(before + bar.seconds) - start, 2)
            kind = "k-gain" if bar is longest else "k-neu"
            drawing.rect(min(start, width - right - 2), y, length, 12, f"mark {kind}", title, 2)
            before += bar.seconds
        elif bar.state == "failed":
            drawing.rect(
                min(start, width - right - 10),
                y,
                10,
                12,
                "mark k-loss",
                f"{_spoken(bar.name)} failed",
                2,
            )
        else:
            title = f"{_spoken(bar.name)}: {bar.state}"
            drawing.rect(left, y, width - right - left, 12, "hatch", title, 2)
    return drawing


def _table(job: Job, bars: list[Bar]) -> Table:
    done = job.finished_stages
    rows: list[list[str | Markup | None]] = []
    for bar in bars:
        memory = finite(done.get(bar.name, {}).get("peak_rss_bytes"))
        path = (*bar.path[:-1], "peak_rss_bytes")
        if bar.seconds is None:
            rows.append([_spoken(bar.name), bar.state, None])
        else:
            rows.append(
                [
                    _spoken(bar.name),
                    tagged(seconds(bar.seconds), bar.seconds, bar.path),
                    None if memory is None else tagged(size(memory), memory, path),
                ]
            )
    return Table(
        "Time and peak memory of each stage", ("Stage", "Time", "Peak memory"), rows, sortable=True
    )


def _sizes(job: Job) -> list[SizeBar]:
    packed, values = job.number("base", "bytes"), job.number("base", "float_weights")
    whole = float_bytes(job)
    if packed is None:
        return []
    floats = FLOAT_BYTES * values if values is not None else None
    bars = [SizeBar("Float model, in float32", whole, whole)] if whole is not None else []
    if floats is not None:
        bars.append(SizeBar("Packed base", packed + floats, floats))
    else:
        bars.append(SizeBar("Packed layers", packed, None, ("base", "bytes")))
    for name in job.adapters:
        path = ("sizes", f"adapters/{name}")
        if (found := job.number(*path)) is not None:
            bars.append(SizeBar(f"Adapter {name}", found, None, path))
    for target in job.targets:
        place = ("export", target, "base", "bytes")
        if (base := job.number(*place)) is not None:
            inside = min(floats, base) if floats is not None else None
            bars.append(SizeBar(f"Base for {runtime(target)}", base, inside, place))
        for name in job.adapters:
            place = ("export", target, name, "bytes")
            if (found := job.number(*place)) is not None:
                title = FILES.get(target, runtime(target))
                title = title if len(job.adapters) == 1 else f"{title}, {name}"
                whole = floats is not None and base is None  # the base's float values are inside
                bars.append(
                    SizeBar(title, found, min(floats or 0, found) if whole else None, place)
                )
    return bars


def _draw_sizes(bars: list[SizeBar], width: int) -> Drawing:
    narrow = width < 500
    left, right, step = (0, 0, 44) if narrow else (220, 118, 32)
    scale = Scale(0, max(bar.bytes for bar in bars), left, width - right)
    words = "; ".join(f"{bar.name} {size(bar.bytes)}" for bar in bars)
    drawing = Drawing(width, 4 + step * len(bars), "Size", f"{words}.")
    for number, bar in enumerate(bars):
        y = 5 + step * number + (18 if narrow else 0)
        drawing.text(0, y - 4 if narrow else y + 13, shortened(bar.name, left or 240), "lb")
        drawing.text(width, y - 4 if narrow else y + 13, size(bar.bytes), "nm2", "end")
        drawing.rect(left, y, width - right - left, 16, "track", "", 2)
        floats = bar.floats or 0.0
        new = bar.bytes - floats
        if new > 0:
            title = f"{bar.name}: {size(new)} packed or new"
            drawing.rect(left, y, max(scale(new) - left, 1.5), 16, "mark k-gain", title, 2)
        if floats > 0:
            start = scale(new)
            title = f"{bar.name}: {size(floats)} stay float"
            drawing.rect(start, y, max(scale(bar.bytes) - start, 1.5), 16, "mark k-neu2", title, 2)
    return drawing


def _answer(job: Job) -> Markup:
    bits, packed = job.number("base", "bits_per_weight"), job.number("base", "bytes")
    weights, floats = job.number("base", "weights"), job.number("base", "float_weights")
    if bits is None or packed is None or weights is None or floats is None:
        return Markup("Sizes: {}.").format(NOT_MEASURED)
    whole = 8 * (packed + FLOAT_BYTES * floats) / (weights + floats)
    share = FLOAT_BYTES * floats / (packed + FLOAT_BYTES * floats)
    return Markup(
        "<b>{} bits per packed weight, {} over the whole model.</b> {} values stay float "
        "(embeddings, norms, biases); in float32 they are {} of the base."
    ).format(
        tagged(fixed(bits), bits, ("base", "bits_per_weight")),
        fixed(whole, 1),
        f"{fixed(floats / 1e6, 1)} million" if floats >= 1e6 else count(floats),
        percent(share),
    )


SECTION = Section(
    "cost", "Time and size", "What did it take, and how big is it?", "time_and_size.html", view
)
