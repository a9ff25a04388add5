"""Inline SVG: drawings, scales, charts, and figures in a wide and a narrow version.

Colors are classes, so that they follow the theme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from qwlora.report.number_format import significant

# A plotting library draws one size and scales it, but text must stay 11 to 13 px on a phone. So
# each figure is drawn for both widths, and the style sheet shows one of them.
WIDTHS = {"wide": 740, "narrow": 358}

Point = tuple[float, float]


class Drawing:
    """One SVG; screen readers read its title, and its numbers in the description."""

    def __init__(self, width: int, height: float, title: str, description: str):
        self.width, self.height = width, height
        self._title, self._description = title, description
        self._parts: list[str] = []
        self._squares: dict[str, list[str]] = {}

    def text(self, x: float, y: float, text: str, kind: str = "ax", anchor: str = "start") -> None:
        """Text whose baseline begins, is centered or ends at (x, y)."""
        position = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self._parts.append(f'<text {position} class="{kind}">{escape(text)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> None:
        ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        self._parts.append(f'<line {ends} class="{kind}"/>')

    def rect(
        self, x: float, y: float, w: float, h: float, kind: str, title: str = "", radius: float = 0
    ) -> None:
        rx = f' rx="{radius:g}"' if radius else ""
        bounds = f'x="{x:.1f}" y="{y:.1f}" width="{max(w, 0):.1f}" height="{h:.1f}"{rx}'
        self._mark("rect", f'{bounds} class="{kind}"', title)

    def square(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        # A heat map has thousands of cells. Those of a color become one path, behind everything
        # else, so that the page stays small.
        square = f"M{x:.1f},{y:.1f}h{width:.1f}v{height:.1f}h-{width:.1f}z"
        self._squares.setdefault(kind, []).append(square)

    def circle(self, x: float, y: float, radius: float, kind: str, title: str = "") -> None:
        self._mark("circle", f'cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}"', title)

    def _mark(self, element: str, attributes: str, title: str) -> None:
        end = f"><title>{escape(title)}</title></{element}>" if title else "/>"
        self._parts.append(f"<{element} {attributes}{end}")

    def polyline(self, points: Sequence[Point], kind: str) -> None:
        if points:
            line = " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
            self._parts.append(f'<path d="M{line}" class="{kind}"/>')

    def svg(self) -> Markup:
        width, height = self.width, f"{self.height:g}"
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        squares = [
            f'<path d="{"".join(paths)}" class="{color}"/>'
            for color, paths in sorted(self._squares.items())
        ]
        return Markup(
            f'<svg class="plot" {size} role="img"><title>{escape(self._title)}</title>'
            f"<desc>{escape(self._description)}</desc>{''.join([*squares, *self._parts])}</svg>"
        )


def is_narrow(width: float) -> bool:
    """Whether a figure of this width is for a phone."""
    return width < 500


def figure(draw: Callable[[int], Drawing]) -> Markup:
    """A figure, drawn for each width."""
    drawn = [f'<div class="{name}">{draw(width).svg()}</div>' for name, width in WIDTHS.items()]
    return Markup(f'<div class="fig">{"".join(drawn)}</div>')


class Scale:
    """Maps numbers between `low` and `high`, both positive on a logarithmic scale, to pixels."""

    def __init__(
        self, low: float, high: float, start: float, end: float, logarithmic: bool = False
    ):
        self.low, self.high = low, high
        self._start, self._end = start, end
        self._value: Callable[[float], float] = math.log if logarithmic else float

    def __call__(self, value: float) -> float:
        inside = min(max(value, min(self.low, self.high)), max(self.low, self.high))
        # Both ends are equal if there is a single value, and its share is then 0.
        first, last = self._value(self.low), self._value(self.high)
        share = (self._value(inside) - first) / ((last - first) or 1)
        return self._start + share * (self._end - self._start)


def ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers between `low` and `high`, at most `most`."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    # Without the margins, 0.3 / 0.1 is less than 3, and the tick at an end is lost.
    step = next(power * m for m in (1, 2, 5, 10, 20) if power * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def shortened(text: str, pixels: float, size: float = 13) -> str:
    """`text`, cut with an ellipsis so that it is not wider than `pixels`."""
    # SVG cannot measure text before a browser draws it. A character is about half as wide as high.
    most = max(int(pixels / (0.5 * size)), 3)
    return text if len(text) <= most else text[: most - 1] + "…"


@dataclass(frozen=True)
class Row:
    """One row of a chart.

    Args:
        parts: bars: start, end, class of the color, tooltip.
        dots: value, class of the color, tooltip.
        hatched: the row is hatched; the tooltip that says why.
    """

    name: str
    value: str
    parts: Sequence[tuple[float, float, str, str]] = ()
    dots: Sequence[tuple[float, str, str]] = ()
    hatched: str = ""
    detail: str = ""


def chart(
    title: str,
    rows: Sequence[Row],
    width: int,
    ends: tuple[float, float] | None = None,
    line: tuple[float, str] | None = None,
) -> Drawing:
    """Rows of bars and dots on one scale; on a phone, names are above them.

    Args:
        ends: ends of the scale. Default: a logarithmic scale with room for all values, and an axis.
        line: position and label of a line through all rows.
    """
    narrow, logarithmic = is_narrow(width), ends is None
    if ends is None:
        values = [v for row in rows for v, *_ in row.dots]
        values += [v for row in rows for part in row.parts for v in part[:2]]
        margin = max((max(values) / min(values)) ** 0.08, 1.005)
        ends = min(values) / margin, max(values) * margin
    longest = 12 + 7.5 * max(len(row.value) for row in rows)
    left, end, step = (0, width, 44) if narrow else (250, width - longest, 36)
    top = 26 if line else 6
    bottom = top + step * len(rows)
    scale = Scale(ends[0], ends[1] or 1, left, end, logarithmic)
    words = [f"{row.name} {row.value}" for row in rows] + ([line[1]] if line else [])
    drawing = Drawing(width, bottom + 22 * logarithmic, title, f"{'; '.join(words)}.")
    if logarithmic:
        for tick in ticks(scale.low, scale.high, 4 if narrow else 8):
            drawing.line(scale(tick), top, scale(tick), bottom)
            drawing.text(scale(tick), bottom + 18, significant(tick), "ax", "middle")
    if line is not None:
        x = scale(line[0])
        anchor = "start" if x < (left + end) / 2 else "end"
        drawing.line(x, 16, x, bottom, "limit")
        drawing.text(x, 12, line[1], "ax", anchor)
    for number, row in enumerate(rows):
        y, name = top + step * number, row.name
        # On a phone, the name is in the line of the value; else it has a column of its own.
        room = width - longest if narrow else left - 8.0
        if narrow and row.detail:
            name += f", {row.detail}"
        elif row.detail:
            drawing.text(0, y + 25, shortened(row.detail, room, 12), "ax")
        drawing.text(0, y + 11, shortened(name, room), "lb")
        kind = "nm2" if row.parts or row.dots else "mut"
        drawing.text(width, y + 11, row.value, kind, "end")
        y += 16 if narrow else 0
        if row.hatched or not logarithmic:
            kind = "hatch" if row.hatched else "track"
            drawing.rect(left, y, end - left, 12, kind, row.hatched, 2)
        # A bar has at least two pixels, so that a small cost is seen, also at the end of the scale.
        for start, stop, color, tooltip in row.parts:
            x = min(scale(start), end - 2)
            drawing.rect(x, y, max(scale(stop) - x, 2), 12, f"mark {color}", tooltip, 2)
        places = [scale(value) for value, *_ in row.dots]
        if len(places) > 1:
            drawing.line(min(places), y + 6, max(places), y + 6, "conn")
        for x, (_, color, tooltip) in zip(places, row.dots, strict=True):
            drawing.circle(x, y + 6, 5, f"mark {color}", tooltip)
    return drawing
