"""Numbers as the report writes them: "13.6%", "1,595", "2 min 06 s", "149.5 MB"; and as HTML.

A minus sign is U+2212. What rounds to zero has no sign.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

MINUS = "\u2212"
TIMES = "\u00d7"
NOT_MEASURED = Markup('<span class="nm">not measured</span>')

Format = Callable[[float], str]
Path = tuple[str | int, ...]  # of a value in results.json: keys, and numbers of items of lists


def finite(value: Any) -> float | None:
    """`value` if it is a finite number."""
    # True is an int of Python, but no number of a result.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def tagged(text: str, value: float, path: Path = ()) -> Markup:
    """A number with its exact value, by which tables sort, and its place in results.json, which
    tests and tools read; without one it was computed from several."""
    # `repr` is the shortest text that reads as the same float.
    key = Markup(' data-key="{}"').format(json.dumps(path)) if path else ""
    return Markup('<data value="{}"{}>{}</data>').format(repr(value), key, text)


def signed(text: str) -> str:
    """`text`, a formatted number, with a minus sign that has the width of a digit."""
    # -0.0004 is formatted as `-0.00`, which would read like a change.
    digits = text.lstrip("+-")
    if not any(digit in "123456789" for digit in digits):
        return digits
    return text.replace("-", MINUS)


def fixed(value: float, digits: int = 2) -> str:
    """With a fixed number of decimals and separated thousands."""
    return signed(f"{value:,.{digits}f}")


count = partial(fixed, digits=0)  # `1,595`
three_decimals = partial(fixed, digits=3)  # `13.619`


def perplexity(value: float) -> str:
    """Two decimals; none from 1,000 on."""
    return fixed(value, 2 if value < 1000 else 0)


def percent(value: float, sign: bool = False, digits: int | None = None) -> str:
    """A share as a percentage: one decimal, two below 1%."""
    # From 0.995 % on, two decimals would say 1.00%.
    if digits is None:
        digits = 2 if abs(value) < 0.00995 else 1
    return signed(f"{100 * value:{'+' if sign else ''},.{digits}f}%")


precise_percent = partial(percent, digits=2)  # for tables and limits


def significant(value: float, digits: int = 3) -> str:
    """With a number of significant digits: `28,344`, `0.44`, `1.2e−07`."""
    if not value:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    if places > digits + 4:
        return signed(f"{value:.{digits - 1}e}")
    return fixed(value, max(0, places))


def seconds(value: float) -> str:
    """`0.35 s`, `52.6 s`, `2 min 06 s`, `1 h 16 min`."""
    if value < 60:
        return f"{value:.{2 if value < 10 else 1}f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`, `a, b and 4 more`."""
    if len(names) > 4:
        return f"{', '.join(names[:2])} and {len(names) - 2} more"
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
