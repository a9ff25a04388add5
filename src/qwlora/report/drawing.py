"""Inline SVG: a drawing of one width, scales, and figures that are drawn once for each width.

A plotting library draws one size and scales it; text must stay 12 to 13 px on a phone, so each
figure is drawn for 920, 660 and 358 px and the style sheet shows one of them. Colors are classes,
so that they follow the theme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

WIDTHS = {"wide": 920, "mid": 660, "narrow": 358}
PANEL_WIDTHS = {"large": 208, "small": 168}
MOST_TITLES = 2000  # above this, marks have no tooltip


class Drawing:
    """One SVG.

    Args:
        title: its name, for screen readers.
        description: its numbers, in words.
    """

    def __init__(self, width: int, height: float, title: str, description: str):
        self.width, self.height = width, height
        self._title, self._description = title, description
        self._parts: list[str] = []

    def text(self, x: float, y: float, text: str, kind: str = "ax", anchor: str = "start") -> None:
        """Text whose baseline begins, is centered or ends at (x, y)."""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">'
            f"{escape(text)}</text>"
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> None:
        """A straight line."""
        self._parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'
        )

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        kind: str,
        title: str = "",
        radius: float = 0,
    ) -> None:
        """A rectangle, with a tooltip if it has a title."""
        rx = f' rx="{radius:g}"' if radius else ""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}"{rx} '
            f'class="{kind}"{self._closed(title, "rect")}'
        )

    def circle(self, x: float, y: float, radius: float, kind: str, title: str = "") -> None:
        """A dot."""
        self._parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}"'
            f"{self._closed(title, 'circle')}"
        )

    def path(self, commands: str, kind: str) -> None:
        """A path in SVG's own commands."""
        self._parts.append(f'<path d="{commands}" class="{kind}"/>')

    def polyline(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """A line through points."""
        if points:
            self.path("M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points), kind)

    def band(
        self, upper: Sequence[tuple[float, float]], lower: Sequence[tuple[float, float]], kind: str
    ) -> None:
        """The area between two lines."""
        if upper:
            around = [*upper, *reversed(lower)]
            self.path("M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in around) + "Z", kind)

    def svg(self, kind: str = "plot") -> Markup:
        """The drawing as inline SVG."""
        width, height = self.width, f"{self.height:g}"
        size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        return Markup(
            f'<svg class="{kind}" {size} role="img"><title>{escape(self._title)}</title>'
            f"<desc>{escape(self._description)}</desc>{''.join(self._parts)}</svg>"
        )

    @staticmethod
    def _closed(title: str, element: str) -> str:
        return f"><title>{escape(title)}</title></{element}>" if title else "/>"


def figure(draw: Callable[[int], Drawing]) -> Markup:
    """A figure, drawn for each width."""
    drawn = "".join(
        f'<div class="{name}">{draw(width).svg()}</div>' for name, width in WIDTHS.items()
    )
    return Markup(f'<div class="fig">{drawn}</div>')


def panels(draw: Callable[[int], Sequence[Drawing]]) -> Markup:
    """Small multiples: four in a row, and two on a phone, drawn for each width."""
    drawn = "".join(
        f'<div class="sm-grid {name}">{"".join(d.svg("plot sm") for d in draw(width))}</div>'
        for name, width in PANEL_WIDTHS.items()
    )
    return Markup(drawn)


class Scale:
    """Maps numbers between `low` and `high` to pixels between `start` and `end`.

    Args:
        logarithmic: equal ratios are equal lengths; both ends must be positive.
    """

    def __init__(
        self, low: float, high: float, start: float, end: float, logarithmic: bool = False
    ):
        self.logarithmic, self.low, self.high = logarithmic, low, high
        self._start, self._end = start, end
        self._from, self._to = self._value(low), self._value(high)

    def __call__(self, value: float) -> float:
        inside = min(max(value, min(self.low, self.high)), max(self.low, self.high))
        share = (self._value(inside) - self._from) / ((self._to - self._from) or 1)
        return self._start + share * (self._end - self._start)

    def _value(self, value: float) -> float:
        return math.log(value) if self.logarithmic else value


def ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers between `low` and `high`, at most `most`."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10, 20) if power * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between `low` and `high`."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    return [10.0**n for n in range(first, last + 1)]


def shortened(text: str, pixels: float, size: float = 13) -> str:
    """`text`, cut with an ellipsis so that it is not wider than `pixels`."""
    most = max(int(pixels / (0.5 * size)), 3)
    return text if len(text) <= most else text[: most - 1] + "…"
