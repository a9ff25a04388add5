"""The plot that compares jobs by size and quality: perplexity by bits per packed weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwlora.report.drawing import Drawing, Scale, shortened, ticks
from qwlora.report.number_format import fixed, perplexity, significant


@dataclass(frozen=True)
class Point:
    """An adapter and its base.

    Args:
        bits: bits per packed weight, encodings included.
        perplexity: on held-out text, of the last stage that was evaluated.
    """

    name: str
    bits: float
    perplexity: float


def not_beaten(points: Sequence[Point]) -> list[Point]:
    """The points for which no other one is at least as good in both, and better in one."""
    return [
        p
        for p in points
        if not any(
            o.bits <= p.bits
            and o.perplexity <= p.perplexity
            and (o.bits, o.perplexity) != (p.bits, p.perplexity)
            for o in points
        )
    ]


def answer(points: Sequence[Point]) -> str:
    """Which points are the best trades, in a sentence."""
    best = sorted(not_beaten(points), key=lambda p: p.bits)
    found = [f"{p.name} ({perplexity(p.perplexity)} at {fixed(p.bits)} bits)" for p in best]
    if len(found) == len(points):
        return "Each is a trade of its own: fewer bits cost quality."
    if len(found) == 1:
        return f"{found[0]} is both smallest and best."
    return f"Best at their size: {', '.join(found[:-1])} and {found[-1]}."


def draw(points: Sequence[Point], width: int) -> Drawing:
    """The plot. Points that another one beats in both are hollow."""
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
    best = not_beaten(points)
    taken: list[tuple[float, float]] = []
    for p in points:
        at = (x(p.bits), y(p.perplexity))
        kind = "m-data" if p in best else "m-rtn"
        drawing.circle(*at, 5, f"mark {kind}", f"{p.name}: {fixed(p.perplexity, 3)}")
        place = at[1] + 4
        while any(abs(at[0] - left_) < 140 and abs(place - top) < 14 for left_, top in taken):
            place += 14
        taken.append((at[0], place))
        end = at[0] > width - 120
        drawing.text(
            at[0] + (-12 if end else 12),
            place,
            shortened(p.name, 110, 12),
            "ax",
            "end" if end else "start",
        )
    return drawing
