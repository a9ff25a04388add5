"""Is there a better trade of size for quality? Only with measured reference points."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from qwlora.report.drawing import Drawing, Scale, figure, ticks
from qwlora.report.job import Job, finite
from qwlora.report.section import Section, View
from qwlora.report.written_numbers import fixed, perplexity, significant

NAMES = {"float_adapter": "adapter on floats", "nf4": "QLoRA NF4", "rtn": "round to nearest"}


@dataclass(frozen=True)
class Point:
    """One way to make a base, with an adapter trained on it."""

    name: str
    bits: float
    perplexity: float
    is_own: bool = False


def view(job: Job, adapter: str | None) -> View | None:
    """What the template draws."""
    name = adapter or job.adapters[0]
    references = [
        Point(NAMES.get(key, key), bits, value)
        for key, found in job.section("reference").items()
        if isinstance(found, dict)
        and (bits := finite(found.get("bits_per_weight"))) is not None
        and (value := finite(found.get("perplexity"))) is not None
    ]
    own, bits = job.perplexity("adapted", name), job.number("base", "bits_per_weight")
    if not references or own is None or bits is None:
        return None
    here = Point("this job", bits, own, True)
    better = [p for p in references if p.bits <= here.bits and p.perplexity < here.perplexity]
    if better:
        best = min(better, key=lambda p: p.perplexity)
        answer = Markup("<b>Yes: {} reaches {} at {} bits.</b> This job has {} at {} bits.").format(
            best.name, perplexity(best.perplexity), fixed(best.bits), perplexity(own), fixed(bits)
        )
    else:
        answer = Markup("<b>Not among those measured.</b> This job has {} at {} bits.").format(
            perplexity(own), fixed(bits)
        )
    return {"figure": figure(lambda width: _draw([*references, here], width)), "answer": answer}


def _draw(points: list[Point], width: int) -> Drawing:
    left, right, bottom = 44, 16, 240
    bits, values = [p.bits for p in points], [p.perplexity for p in points]
    x = Scale(min(bits) * 0.95, max(bits) * 1.05, left, width - right)
    y = Scale(min(values) * 0.97, max(values) * 1.03, bottom, 20, logarithmic=True)
    words = "; ".join(f"{p.name}: {p.perplexity:.3f} at {p.bits:.2f} bits" for p in points)
    drawing = Drawing(width, 280, "Perplexity by size of the base", f"{words}.")
    for tick in ticks(y.low, y.high, 5):
        drawing.line(left, y(tick), width - right, y(tick))
        drawing.text(left - 6, y(tick) + 4, significant(tick), "ax", "end")
    for tick in ticks(x.low, x.high, 5):
        drawing.text(x(tick), bottom + 18, f"{tick:g}", "ax", "middle")
    drawing.text(width - right, bottom + 36, "bits per packed weight", "ax", "end")
    for p in points:
        at, kind = (x(p.bits), y(p.perplexity)), "m-data" if p.is_own else "m-rtn"
        drawing.circle(*at, 5, f"mark {kind}", f"{p.name}: {fixed(p.perplexity, 3)}")
        if p.is_own:
            drawing.circle(*at, 10, "here")
        end = at[0] > width - 120
        drawing.text(
            at[0] + (-14 if end else 14), at[1] + 4, p.name, "ax", "end" if end else "start"
        )
    return drawing


SECTION = Section(
    "size-quality",
    "Size and quality",
    "Is there a better trade of size for quality?",
    "size_quality.html",
    view,
    of_job=False,
    of_adapter=True,
)
