"""A job as the report reads it: results.json, the resolved recipe, and what is out of date.

The report knows nothing but these. A key that is missing was not measured.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from qwlora.export.proof.checks import Check as Row

RUNTIMES = {
    "onnx": "ONNX Runtime",
    "onnx_each": "ONNX Runtime",
    "hf": "transformers",
    "gguf": "llama.cpp",
    "mlx": "MLX",
    "qnn": "HTP emulator",
}  # others as they are
FILES = {"onnx": "ONNX adapter", "onnx_each": "ONNX file"}
BASE = "base"  # instead of the name of an adapter: the files without one
FEW_TOKENS = 1000  # a proof on fewer tokens is a caution
NOT_MEASURED = Markup('<span class="nm">not measured</span>')

Path = tuple[str, ...]
ItemPath = tuple[str | int, ...]  # with numbers of items of lists


@dataclass(frozen=True)
class Job:
    """One job.

    Args:
        results: the content of results.json.
        recipe: the resolved recipe; empty if it cannot be read.
        recipe_text: the file's text.
        name: of the job's folder, without its parents.
        stale: why the proof of an adapter's files is out of date, by (target, adapter).
    """

    results: Mapping[str, Any]
    recipe: Mapping[str, Any]
    recipe_text: str
    name: str
    stale: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def get(self, *path: str) -> Any:
        """The value at `path` of the results; None if it is not there."""
        return _at(self.results, path)

    def setting(self, *path: str) -> Any:
        """The value at `path` of the recipe; None if it is not there."""
        return _at(self.recipe, path)

    def number(self, *path: str) -> float | None:
        """A finite number of the results; None if there is none."""
        return finite(self.get(*path))

    def section(self, *path: str) -> dict[str, Any]:
        """A dict of the results; empty if there is none."""
        found = self.get(*path)
        return found if isinstance(found, dict) else {}

    @property
    def title(self) -> str:
        """The name of the job: that of its recipe, or of its folder."""
        return str(self.setting("name") or self.get("recipe") or self.name)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters, in the order of the recipe."""
        listed = self.setting("adapters")
        names = [str(a["name"]) for a in listed] if isinstance(listed, list) else []
        return names or list(self.section("train"))

    @property
    def targets(self) -> list[str]:
        """Export targets of the recipe, or those that were checked."""
        listed = self.setting("export", "targets")
        return (
            [str(t) for t in listed] if isinstance(listed, list) else list(self.section("parity"))
        )

    @property
    def state(self) -> str:
        """`running`, `finished`, `failed`, `interrupted` or `incomplete`."""
        if isinstance(state := self.get("run", "state"), str):
            return state
        waits = self.targets and not self.section("parity")  # a job of an older version
        return "incomplete" if waits else "finished"

    @property
    def model(self) -> str:
        """Name of the model: the last part of its source, without the file's ending."""
        source = str(self.setting("model", "source") or "").rstrip("/")
        return re.sub(r"\.(gguf|safetensors)$", "", source.rpartition("/")[2]) or "unknown model"

    def text_of(self, adapter: str | None) -> str | None:
        """The name of the adapter's text, if adapters have different texts."""
        text = self.get("train", adapter, "text") if adapter else None
        return text if isinstance(text, str) else None

    def path(self, kind: str, adapter: str | None, key: str = "perplexity") -> Path:
        """Where the results hold a measurement of a model on the text of `adapter`.

        Args:
            kind: `float`, `base`, `adapted`, `simulated` or `imported`.
            key: `perplexity`, `perplexity_stderr`, `perplexity_ratio`, `kl` or `top1`.
        """
        if kind in ("float", "base"):
            text = self.text_of(adapter)
            on = (key, "on", text, kind) if text else ()
            return on if on and self.get(*on) is not None else (key, kind)
        return (key, kind, adapter or "")

    def perplexity(self, kind: str, adapter: str | None) -> float | None:
        """The perplexity of a model on the text of `adapter`."""
        return self.number(*self.path(kind, adapter))

    def change(self, kind: str, against: str, adapter: str | None) -> float | None:
        """Relative change of the perplexity; negative is better."""
        after, before = self.perplexity(kind, adapter), self.perplexity(against, adapter)
        return after / before - 1 if after and before else None

    def parity(self, target: str, adapter: str) -> dict[str, Any]:
        """What the proof of an adapter's files found; empty if they were not run."""
        found = self.section("parity", target, adapter)
        return {} if "not_run" in found else found

    def other_cases(self, target: str) -> list[str]:
        """What was checked besides adapters: the base without one, several adapters together."""
        return [name for name in self.section("parity", target) if name not in self.adapters]

    def proof_rows(self, target: str, adapter: str) -> list[Row]:
        """The checks that the proof of an adapter's files recorded."""
        rows = self.get("parity", target, adapter, "checks")
        rows = rows if isinstance(rows, list) else []
        return [Row.from_json(row) for row in rows if isinstance(row, Mapping)]

    def perplexity_row(self, target: str, adapter: str) -> Row | None:
        """The check of the perplexity with the adapter, if there is one."""
        rows = [row for row in self.proof_rows(target, adapter) if is_of_perplexity(row)]
        return next((row for row in rows if "without" not in row.what), None)

    def compared_with(self, target: str, adapter: str) -> str:
        """What the files were compared with: `simulated`, or, without activations, `adapted`."""
        is_trained = self.get("parity", target, adapter, "of") == "trained"
        return "adapted" if is_trained else "simulated"

    def expected(self, target: str, adapter: str) -> float | None:
        """The perplexity of that model on the tokens of the proof."""
        return self.number("parity", target, adapter, "reference_perplexity")

    def drift(self, target: str, adapter: str) -> float | None:
        """Relative difference of the exported file's perplexity from what is expected."""
        found = self.number("parity", target, adapter, "perplexity")
        expected = self.expected(target, adapter)
        return found / expected - 1 if found and expected else None

    def worst_proof(
        self, adapter: str, key: str, is_least: bool = False
    ) -> tuple[float | None, Path]:
        """The largest (or least) `key` of an adapter's proofs, over all targets that measured it,
        and its place in the results."""
        places = [
            ("parity", target, adapter, key)
            for target in self.targets
            if (target, adapter) not in self.stale
        ]
        found = [(value, place) for place in places if (value := self.number(*place)) is not None]
        return (min if is_least else max)(found) if found else (None, ())

    def best_kind(self, adapter: str) -> str | None:
        """The last model of an adapter that was evaluated: `simulated`, else `adapted`."""
        kinds = ("simulated", "adapted")
        return next((kind for kind in kinds if self.perplexity(kind, adapter)), None)

    @property
    def planned_stages(self) -> list[str]:
        """Names of all stages of the job, in order; empty if they were not recorded."""
        plan = self.get("run", "plan")
        return [str(stage) for stage in plan] if isinstance(plan, list) else []

    @property
    def finished_stages(self) -> dict[str, dict[str, float]]:
        """What was recorded of each finished stage, in order."""
        found = {}
        for verb in self.section("stages"):
            found.update(self.section("stages", verb, "parts"))
        order = {name: n for n, name in enumerate(self.planned_stages)}
        return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))

    @property
    def seconds_so_far(self) -> float:
        """Time of all finished stages, also of earlier runs, and of the stage that runs."""
        parts = list(self.finished_stages.values())
        began = str(self.get("run", "started") or "")
        earlier = [part for part in parts if str(part.get("started") or "") < began]
        finished, before = (
            sum(finite(p.get("seconds")) or 0.0 for p in ps) for ps in (parts, earlier)
        )
        if self.state == "finished":
            return finished
        return max(finished, before + (self.number("run", "elapsed_seconds") or 0.0))

    @property
    def command(self) -> str:
        """The command that runs the job, from the folder above the job's."""
        command = self.get("run", "command")
        return (
            command
            if isinstance(command, str)
            else f"qwlora run {self.name}/recipe.yaml --out {self.name}"
        )

    def verb_command(self, verb: str) -> str:
        """The command that runs one stage of this job."""
        return f"qwlora {verb} --out {self.name}"


def _at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        if not isinstance(content, Mapping):
            return None
        content = content.get(key)
    return content


def finite(value: Any) -> float | None:
    """`value` if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def is_of_perplexity(row: Row) -> bool:
    """Whether a check of a proof is of a perplexity."""
    return row.what.startswith("difference of perplexity")


def runtime(target: str) -> str:
    """The runtime's name of an export target."""
    return RUNTIMES.get(target, target)


class Tagged(Markup):
    """A number as HTML, and what it was made of."""

    text = ""
    value = 0.0


def tagged(text: str, value: float | None, path: ItemPath) -> Markup:
    """A number with its exact value and its place in results.json, which tests and tools read."""
    if value is None:
        return NOT_MEASURED
    html = Markup('<data value="{}" data-key="{}">{}</data>').format(
        repr(value), json.dumps(path), text
    )
    number = Tagged(html)
    number.text, number.value = text, value
    return number


def valued(text: str, value: float) -> Markup:
    """A number that was computed from several keys, with its exact value, by which tables sort."""
    return Markup('<data value="{}">{}</data>').format(repr(value), text)


def without_folders(text: str) -> str:
    """`text` with absolute paths cut to their last part: a report can be passed on."""
    return re.sub(r"(?<![\w.:/~])(?:/|[A-Za-z]:\\)(?:[^\s/\\'\":,;)]+[/\\])+", "", text)


def code(text: str) -> Markup:
    """`text` as code."""
    return Markup("<code>{}</code>").format(escape(text))
