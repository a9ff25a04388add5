"""The results of a job for the report. A missing key was not measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from qwlora.report.number_format import Format, finite, precise_percent, tagged
from qwlora.targets.registry import TARGETS

REPORT = "report.html"
FILES = {"onnx": "ONNX adapter", "onnx_each": "ONNX file"}
KINDS = {
    "float": "Float model",
    "base": "Packed base",
    "adapted": "With adapter",
    "simulated": "Simulated",
}  # of models that are evaluated, in the order of the stages
# Models to compare with: the float model as loaded, or with the same adapter trained on it.
REFERENCES = {"float": "the float model", "reference": "float LoRA"}
FLOAT_BYTES = 4


@dataclass(frozen=True)
class Job:
    """One job. For missing values, `section` returns an empty dict, other methods None.

    Args:
        results: the content of results.json.
        recipe: the resolved recipe; empty if it cannot be read.
        stale: why the proof of an adapter's files is out of date, by (target, adapter).
    """

    results: Mapping[str, Any]
    recipe: Mapping[str, Any]
    recipe_text: str
    name: str
    stale: Mapping[tuple[str, str], str] = field(default_factory=dict)
    is_simulated: bool = True

    def get(self, *path: str) -> Any:
        return _at(self.results, path)

    def setting(self, *path: str) -> Any:
        return _at(self.recipe, path)

    def number(self, *path: str) -> float | None:
        return finite(self.get(*path))

    def shown(self, written: Format, *path: str) -> Markup | None:
        """A number of the results as HTML, with its place; None if there is none."""
        value = self.number(*path)
        return None if value is None else tagged(written(value), value, path)

    def section(self, *path: str) -> dict[str, Any]:
        return self.get(*path) or {}

    @property
    def title(self) -> str:
        return str(self.setting("name") or self.get("recipe") or self.name)

    def adapter_settings(self) -> dict[str, dict[str, Any]]:
        return {str(a["name"]): a for a in self.setting("adapters") or ()}

    @property
    def adapters(self) -> list[str]:
        return list(self.adapter_settings() or self.section("train"))

    @property
    def targets(self) -> list[str]:
        return self.setting("export", "targets") or [*self.section("parity")]

    @property
    def state(self) -> str:
        """`running`, `finished`, `failed`, `interrupted` or `incomplete`."""
        return self.get("run", "state") or "incomplete"

    @property
    def model(self) -> str:
        source = str(self.setting("model", "source") or "").rstrip("/")
        return re.sub(r"\.(gguf|safetensors)$", "", source.rpartition("/")[2]) or "unknown model"

    @property
    def bitwidth(self) -> int | None:
        name = re.match(r"w(\d+)-", str(self.setting("base", "weights")))
        return int(name[1]) if name else None

    @property
    def float_bytes(self) -> float | None:
        """Size of the whole model in float32."""
        packed, floats = self.number("base", "weights"), self.number("base", "float_weights")
        return None if packed is None or floats is None else FLOAT_BYTES * (packed + floats)

    @property
    def kinds(self) -> dict[str, str]:
        return {k: words for k, words in KINDS.items() if self.is_simulated or k != "simulated"}

    def origin(self, adapter: str) -> str:
        """`trained`, `imported` or `untrained`; empty before the adapter is there."""
        train = self.section("train", adapter)
        if not train or train.get("steps"):
            return "trained" if train else ""
        return "imported" if "continue_from" in train.get("settings", ()) else "untrained"

    def text_of(self, adapter: str | None) -> str | None:
        """The name of the adapter's text, if adapters have different texts."""
        return self.get("train", adapter or "", "text")

    def texts(self) -> dict[str, tuple[str, ...]]:
        """Path of each text's description in the results, by the name of the first adapter with
        that text; a single text has an empty name."""
        named = {name: ("texts", name) for name in self.section("texts")}
        return {name: path for name, path in named.items() if self.section(*path)} or {
            "": ("data",)
        }

    def data_cautions(self) -> Iterator[tuple[str, str]]:
        """The name of a text, and a sentence about its missing part."""
        for name, path in self.texts().items():
            cautions = self.get(*path, "cautions")
            for caution in cautions if isinstance(cautions, list) else ():
                yield name, str(caution)

    def path(self, kind: str, adapter: str | None, key: str = "perplexity") -> tuple[str, ...]:
        """Where the results hold a measurement of a model on the text of `adapter`.

        Args:
            kind: one of `KINDS`, `imported` or `reference`.
            key: `perplexity`, `perplexity_stderr`, `answers`, `perplexity_ratio`, `kl` or `top1`;
                the last three against the model that `reference` names.
        """
        if kind not in ("float", "base"):
            compared = ("reference", key, kind, adapter or "")
            return compared if self.get(*compared) is not None else (key, kind, adapter or "")
        on = (key, "on", self.text_of(adapter) or "", kind)
        return on if self.get(*on) is not None else (key, kind)

    def perplexity(self, kind: str, adapter: str | None) -> float | None:
        return self.number(*self.path(kind, adapter))

    def change(self, kind: str, against: str, adapter: str | None) -> float | None:
        """Relative change of the perplexity; negative is better."""
        after, before = self.perplexity(kind, adapter), self.perplexity(against, adapter)
        return after / before - 1 if after and before else None

    def final_kind(self, adapter: str) -> str | None:
        """The last model of an adapter that was evaluated: `simulated`, else `adapted`."""
        kinds = ("simulated", "adapted")
        return next((kind for kind in kinds if self.perplexity(kind, adapter)), None)

    def reference(self, kind: str, adapter: str | None) -> str:
        """The model that another is compared with, one of `REFERENCES`."""
        is_trained = kind in ("adapted", "simulated") and self.perplexity("reference", adapter)
        return "reference" if is_trained else "float"

    def gains(self, against: str = "float") -> dict[str, float]:
        """Change of the perplexity from `against` to the final model, by adapter."""
        changes = {n: self.change(self.final_kind(n) or "", against, n) for n in self.adapters}
        return {name: change for name, change in changes.items() if change is not None}

    def cases(self, target: str) -> list[str]:
        """The cases in which a target's files are checked: each adapter or use case, and others
        that were checked, such as the base without an adapter."""
        asked = self.setting("export", "use_cases") if TARGETS[target].has_cases else None
        asked = self.adapters if asked is None else [str(case) for case in asked]
        return list(dict.fromkeys([*asked, *self.section("parity", target)]))

    def compared_with(self, target: str, adapter: str) -> str:
        """The kind of model that files were compared with: `simulated`, or `adapted` if the target
        has float activations."""
        is_trained = self.get("parity", target, adapter, "of") == "trained"
        return "adapted" if is_trained else "simulated"

    def drift(self, target: str, adapter: str, settings: str = "shipped_") -> float | None:
        """Relative difference of the exported file's perplexity from the expected one, with the
        runtime's own settings if measured. Empty `settings`: with exact settings."""
        keys = (f"{settings}perplexity", "perplexity", "reference_perplexity")
        own, exact, expected = (self.number("parity", target, adapter, key) for key in keys)
        value = own or exact
        # Files that changed after the check count as not measured.
        if (target, adapter) in self.stale or not value or not expected:
            return None
        return value / expected - 1

    def arithmetic(self, targets: Sequence[str], adapters: Sequence[str]) -> str:
        """ " (in float32; as shipped ...)", for targets that match the trained model only in
        float32, with the worst adapter; empty for other targets."""
        parts = []
        for target in targets:
            places = [("parity", target, name, "shipped_top1_agreement") for name in adapters]
            if shares := [share for p in places if (share := self.number(*p)) is not None]:
                name = f"{runtime(target)} " * (len(targets) > 1)
                same = f"{'at least ' * (len(shares) > 1)}{precise_percent(min(shares))}"
                how = f"{TARGETS[target].shipped}, with {TARGETS[target].rounds}"
                parts.append(f"{name}in float32; {how}: {same} top-1 agreement")
        return f" ({'; '.join(parts)})" if parts else ""

    def worst_proof(self, adapter: str, key: str, worst: Any = max) -> tuple[str, ...]:
        """The place in the results of the worst `key` of an adapter's proofs, over all targets that
        measured it; empty if none did."""
        places = [
            place
            for target in self.targets
            if (target, adapter) not in self.stale
            and self.number(*(place := ("parity", target, adapter, key))) is not None
        ]
        return worst(places, key=lambda place: (self.number(*place), place), default=())

    @property
    def planned_stages(self) -> list[str]:
        return self.get("run", "plan") or []

    @property
    def finished_stages(self) -> dict[str, dict[str, float]]:
        # The results list stages by verb, and a job runs them in the order of its plan.
        stages: dict[str, dict[str, float]] = {}
        for verb in self.section("stages"):
            stages |= self.section("stages", verb, "parts")
        order = {name: n for n, name in enumerate(self.planned_stages)}
        return dict(sorted(stages.items(), key=lambda item: order.get(item[0], len(order))))

    @property
    def seconds_so_far(self) -> float:
        # `elapsed_seconds` is that of this run alone, with the stage that runs.
        began = str(self.get("run", "started") or "")
        finished = before = 0.0
        for part in self.finished_stages.values():
            seconds = finite(part.get("seconds")) or 0.0
            finished += seconds
            before += seconds if str(part.get("started") or "") < began else 0.0
        if self.state == "finished":
            return finished
        return max(finished, before + (self.number("run", "elapsed_seconds") or 0.0))

    @property
    def command(self) -> str:
        return self.get("run", "command") or f"qwlora run {self.name}"

    def verb_command(self, verb: str) -> Markup:
        return code(f"qwlora {verb} {self.name}")


def _at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        if not isinstance(content, Mapping):
            return None
        content = content.get(key)
    return content


def runtime(target: str) -> str:
    """The runtime's name of an export target; another name as it is."""
    return (target in TARGETS and TARGETS[target].runtime) or target


def capitalized(text: str) -> str:
    """`text` with its first letter as a capital."""
    return text[:1].upper() + text[1:]


def without_folders(text: str) -> str:
    """`text` with absolute paths cut to their last part."""
    # Reports are passed on, so they should not reveal local folders.
    return re.sub(r"(?<![\w.:/~])(?:/|[A-Za-z]:\\)(?:[^\s/\\'\":,;)]+[/\\])+", "", text)


def code(text: str) -> Markup:
    """`text` as code."""
    return Markup("<code>{}</code>").format(escape(text))
