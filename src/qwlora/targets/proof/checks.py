"""Checks: one measured value, its limit, and whether it passed. All verdicts are made of them.

Whoever shows a verdict (console, report, README of a bundle, model card) prints checks, and judges
nothing. JSON holds no NaN and no infinity: such a value is None in a check, which then failed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Unit = Literal["share", "steps", "dB", "nats", ""]
_FORMS = {"share": ".2%", "steps": ".4g", "dB": ".1f", "nats": ".3g", "": ".4g"}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Largest allowed differences.

    Args:
        layer_steps, layer_mean_steps: largest and mean difference of a layer, in steps of its grid.
        perplexity_difference: relative difference of a language model's perplexity.
        sqnr, below_floor: an output may be `below_floor` dB below its noise floor; `sqnr` dB is
            always enough, and less than `compare.WRONG` dB never is.
    """

    # Of SmolLM2, the worst of 1,595 layers is 1.00 steps off, the worst mean 0.0078
    # (docs/log/runtimes.md).
    layer_steps: float = 2.0
    layer_mean_steps: float = 0.05
    perplexity_difference: float = 0.003
    sqnr: float = 60.0
    below_floor: float = 6.0


LIMITS = Limits()


@dataclass(frozen=True)
class Check:
    """One row of a verdict.

    Args:
        what: a phrase, such as "perplexity with the adapter differs".
        value, limit: numbers in `unit`, None if not finite; booleans if two things must be equal.
    """

    what: str
    value: float | bool | None
    limit: float | bool | None
    passed: bool
    unit: Unit = ""
    bound: Literal["at most", "at least"] = "at most"

    @property
    def sentence(self) -> str:
        limit = f" (limit: {self.shown_limit})" if self.shown_limit else ""
        return f"{self.what}: {self.shown_value}{limit}"

    @property
    def shown_value(self) -> str:
        if isinstance(self.value, bool):
            return "yes" if self.value else "no"
        return self._written(self.value)

    @property
    def shown_limit(self) -> str:
        """`at most 3`; empty where the answer is yes or no."""
        if isinstance(self.value, bool):
            return ""
        return f"{self.bound} {self._written(self.limit)}"

    def _written(self, value: float | None) -> str:
        if value is None:
            return "not finite"
        unit = f" {self.unit}" if self.unit not in ("", "share") else ""
        return f"{value:{_FORMS[self.unit]}}{unit}"

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Check:
        # Anybody can edit results.json. What is missing or not of its type was not measured.
        value, limit = (
            number if isinstance(number, bool | int | float) else None
            for number in (fields.get("value"), fields.get("limit"))
        )
        unit: Any = fields["unit"] if fields.get("unit") in _FORMS else ""
        bound: Any = "at least" if fields.get("bound") == "at least" else "at most"
        is_passed = fields.get("passed") is True
        return cls(str(fields.get("what")), value, limit, is_passed, unit, bound)


def at_most(what: str, value: float, limit: float, unit: Unit = "") -> Check:
    """A check that passes if both are finite and `value <= limit`."""
    passed = math.isfinite(limit) and math.isfinite(value) and value <= limit
    return Check(what, _finite(value), _finite(limit), passed, unit)


def at_least(what: str, value: float, limit: float, unit: Unit = "") -> Check:
    """A check that passes if `value >= limit`."""
    # A signal without noise has an infinite ratio: it passes, since nothing differs.
    passed = math.isfinite(limit) and value >= limit
    return Check(what, _finite(value), _finite(limit), passed, unit, "at least")


def is_so(what: str, value: bool) -> Check:
    """A check of something that has to be true."""
    return Check(what, value, True, value)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class Parity:
    """How far exported files are from what they were made of."""

    figures: dict[str, Any]
    checks: tuple[Check, ...]

    def extended(self, figures: Mapping[str, Any], *checks: Check) -> Parity:
        return Parity({**self.figures, **figures}, (*self.checks, *checks))

    @property
    def problems(self) -> list[str]:
        return [check.sentence for check in self.checks if not check.passed]


def verdict(checks: Iterable[Check]) -> dict[str, Any]:
    """What JSON holds of checks: whether all passed, sentences of those that did not, and all."""
    rows = list(checks)
    return {
        # Without a check, nothing was compared.
        "passed": bool(rows) and all(row.passed for row in rows),
        "problems": [row.sentence for row in rows if not row.passed],
        "checks": [asdict(row) for row in rows],
    }


def only_finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """`figures`, and those nested in them, without numbers that are NaN or infinite."""
    return {
        key: only_finite(value) if isinstance(value, Mapping) else value
        for key, value in figures.items()
        if not isinstance(value, float) or math.isfinite(value)
    }


def shown(figures: Mapping[str, Any], key: str, form: str) -> str:
    """A figure in a format such as `.3f`, or `not finite` if it was left out."""
    return format(figures[key], form) if key in figures else "not finite"
