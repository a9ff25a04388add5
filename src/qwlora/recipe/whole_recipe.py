"""The whole recipe, and the checks that involve several sections."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from qwlora.grid.scheme import Scheme, similar_schemes
from qwlora.recipe.adapter_section import Adapter, Data
from qwlora.recipe.grid_sections import JOB, MODEL, Base, CalibrationText, Model, SimulationSection
from qwlora.recipe.section import Count, Name, Section
from qwlora.targets.refusals import AdapterParts, Subject, Weight, refusals, refused
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import NONE, OPSETS, members, size_problems

if TYPE_CHECKING:
    TargetName = str
else:
    TargetName = Literal[tuple(TARGETS)]

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"base": {"solver": "search"}, "adapter": {"init": "zero"}},
    "balanced": {"base": {"solver": "gptq"}, "adapter": {"init": "qera"}},
    "best": {
        "base": {"solver": "gptq", "calibration": [JOB, MODEL], "tuning": {"steps": 512}},
        "adapter": {"init": "qera"},
    },
}
_USE_CASE = r"^[A-Za-z0-9][A-Za-z0-9_-]*(\+[A-Za-z0-9][A-Za-z0-9_-]*)*$"


class Graphs(Section):
    """Graphs with a key-value cache, for qnn, aimet and qairt: one for each pair of tokens and
    context. They share one copy of the weights, except in aimet."""

    tokens: list[int] = [128, 1]
    """new tokens per call: many to read prompts, 1 to generate"""
    context: list[int] = [1024]
    """past and new tokens together"""

    def problems(self) -> Iterator[str]:
        yield from size_problems(self.tokens, self.context)


class Export(Section):
    """Step 4: the files to write."""

    targets: list[TargetName] = ["onnx"]
    """runtimes to write files for. Default with dora, mergeable or target_parameters: onnx_each"""
    encodings_version: Literal["1.0.0", "2.0.0"] = "1.0.0"
    """version of the encodings files of aimet and qairt"""
    use_cases: list[Annotated[str, Field(pattern=_USE_CASE)]] | None = None
    """for qairt and qnn: what the runtime can switch to: an adapter, several joined by a plus sign,
    or none for the base. Default: each adapter alone, and none"""
    graphs: Graphs | None = None
    opset: Annotated[int, Field(ge=OPSETS[0], le=OPSETS[-1])] | None = None
    """ONNX opset for aimet and qairt, 17 to 23 (default). Lower it for older tools"""
    embedding_bits: Literal[8, 16, 32] | None = None
    """bits of embeddings, output heads and other float values. 8: blocks of 8 bits, and float16 for
    adapters of gguf and mlx (gguf, mlx, genai and web only, where it is the default). 16: float16
    or bfloat16 where lossless, else float32. 32: float32 (the only choice for aimet, qairt, qnn and
    qairt_pipeline). Default of other targets: 16"""
    proof: Literal["generated", "held_out", "none"] = "generated"
    """text for qwlora verify BUNDLE, and for golden/ of aimet and qairt. generated: from the float
    model or the base; held_out: your data, as token ids; none: no text"""
    canary: Literal["generated", "held_out", "none"] = "generated"
    """prompts for qwlora verify --server. generated: from the float model or the base; held_out:
    from the first adapter's held-out text; none: no canary.json"""
    layout: Literal["genie"] | None = None
    """for qairt and qnn. genie: files for Qualcomm's Genie. Default: for ONNX Runtime"""

    def problems(self) -> Iterator[str]:
        if self.layout and not any(map(self.layout_of, self.targets)):
            names = " or ".join(filter(self.layout_of, TARGETS))
            yield f"layout: {self.layout} is for {names}. Add it to targets, or remove layout"

    def layout_of(self, target: str) -> str | None:
        return self.layout if self.layout in TARGETS[target].graph_layouts else None

    def embedding_bits_of(self, target: str) -> int:
        return self.embedding_bits or TARGETS[target].embedding_bits[0]

    def graphs_of(self, target: str) -> Graphs | None:
        return (self.graphs or Graphs()) if TARGETS[target].cached_graphs else None


class Verify(Section):
    """Step 5: how exported files are tested."""

    sequences: Count = 8
    """held-out sequences to run through every exported file"""
    perplexity_difference: Annotated[float, Field(gt=0, le=1)] = 0.003
    """largest relative difference from the simulation's perplexity, beyond what rounding explains
    in 95 % of samples"""


class Recipe(Section):
    """The whole file."""

    name: Name = "qwlora"
    """name of the job: letters, digits, _ and -"""
    preset: Literal["fast", "balanced", "best"] = "balanced"
    """effort; keys you set win. fast: base.solver search, init zero; balanced: gptq, init qera;
    best: also base.calibration [job, model] and 512 steps of base.tuning"""
    workflow: Literal["qw-lora", "qwa-lora"] = "qw-lora"
    """qw-lora: calibrate activations after training; qwa-lora: calibrate the base's activations
    first and train through them"""
    reference: Literal["float"] | None = None
    """float: also train every adapter on the float model, for comparison. Doubles the training
    time"""
    evaluate: Literal["own", "all"] = "own"
    """own: measure each adapter on its own text; all: on every adapter's text"""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$")] = "auto"
    """cpu, cuda, xpu, mps, cuda:N, xpu:N, or auto: an accelerator if torch can use one. Files are
    always verified on the CPU"""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """seed of data split, initialization and training order"""
    model: Model
    data: Data = Data()
    base: Base = Base()
    adapters: list[Adapter] = Field(min_length=1)
    simulation: SimulationSection = SimulationSection()
    export: Export = Export()
    verify: Verify = Verify()

    @model_validator(mode="wrap")
    @classmethod
    def _fill_in(cls, content: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        recipe = validate(cls._filled_in(content))
        # What is filled in does not count as set: a job's recipe stays as short as the user's.
        _unset(recipe, content)
        return recipe

    @classmethod
    def _filled_in(cls, content: Any) -> Any:
        """The content, with what follows from other keys."""
        if not isinstance(content, dict):
            return content
        adapters = content.get("adapters")
        sections = [content.get(key) or {} for key in ("base", "data", "export", "simulation")]
        base, data, export, simulation = sections
        preset = PRESETS.get(str(content.get("preset", "balanced")))
        is_typed = isinstance(adapters, list) and all(isinstance(s, dict) for s in sections)
        # What has the wrong type is left to the validation, which names it.
        if preset is None or not is_typed or not all(isinstance(a, dict) for a in adapters or ()):
            return content
        keeps, names = base.get("solver") == "keep", [a.get("name") for a in adapters or ()]
        filled, warmup = [], Adapter.model_fields["warmup_steps"].default
        for adapter in adapters or ():
            start, steps = adapter.get("continue_from"), adapter.get("steps")
            if isinstance(steps, int) and steps <= warmup:
                adapter = {"warmup_steps": max(0, steps - 1), **adapter}
            if not (keeps or adapter.get("dora") or adapter.get("mergeable") or start is not None):
                adapter = _filled(adapter, preset["adapter"])
            if isinstance(adapter.get("data"), dict):
                own = adapter["data"]
                # Held-out documents belong to their source.
                inherited = {
                    k: v for k, v in data.items() if k != "evaluation" or "source" not in own
                }
                adapter = {**adapter, "data": {**inherited, **own}}
            # A name that no adapter has is a folder, and is checked as one.
            if isinstance(start, str) and re.fullmatch(r"[\w.-]+", start) and start not in names:
                adapter = {**adapter, "continue_from": f"./{start}"}
            filled.append(adapter)
        # The default target, `onnx`, switches nothing but LoRA factors of linear layers.
        if any(a.get("dora") or a.get("target_parameters") or a.get("mergeable") for a in filled):
            export = {"targets": ["onnx_each"], **export}
        targets, defaults = export.get("targets"), preset["base"]
        for name, target in TARGETS.items():
            if not isinstance(targets, list) or name not in targets:
                continue
            # Qualcomm's HTP has no scales below zero.
            defaults = {**defaults, "weights": "w4-block32"} if target.chip else defaults
            if simulation.get("policy") != "weights-only":
                needed = {key: values[0] for key, values in target.simulation.items()}
                simulation = _filled(simulation, needed)
        base = base if keeps else _filled(base, defaults)
        changed = {"base": base, "adapters": filled, "export": export}
        return {**content, **changed, **({"simulation": simulation} if simulation else {})}

    def problems(self) -> Iterator[str]:
        folders = [a.name.casefold() for a in self.adapters]
        if twice := [a.name for a in self.adapters if folders.count(a.name.casefold()) > 1]:
            yield (
                f"adapters {', '.join(twice)}: these names differ only in case, and each becomes a "
                "folder. Some file systems ignore case, so choose other names"
            )
            return
        if without := [a.name for a in self.adapters if self.data_of(a).source is None]:
            yield (
                "data.source is missing, and so is adapters[].data.source of "
                f"{', '.join(without)}. Set one of them"
            )
        if unknown := self._unknown(self.base.calibrate_on):
            yield f"base.calibrate_on: {unknown}"
        names = [a.name for a in self.adapters]
        for i, adapter in enumerate(self.adapters):
            first = self.predecessor(adapter)
            if adapter.continue_from in names[i:]:
                yield (
                    f"adapter {adapter.name} continues {adapter.continue_from}, which is listed "
                    "later. List it first"
                )
            elif first is not None and first.mergeable and not adapter.mergeable:
                yield (
                    f"adapter {adapter.name} continues {first.name}, which is mergeable. Set "
                    "mergeable: true for both"
                )
        yield from self._base_problems()
        yield from self._target_problems()
        yield from self._use_case_problems()
        if self.simulation.base_activations != "all":
            yield from self._sharing_problems()
        if self.workflow == "qwa-lora":
            yield from self._workflow_problems()

    def _unknown(self, names: list[str]) -> str | None:
        known = sorted(a.name for a in self.adapters)
        unknown = [name for name in names if name not in known]
        if not unknown:
            return None
        return f"there is no adapter {', '.join(unknown)}; the recipe has {', '.join(known)}"

    def _base_problems(self) -> Iterator[str]:
        if self.model.encodings is not None and self.base.solver != "keep":
            yield "model.encodings needs base.solver: keep; set it, or remove model.encodings"
        needy = [a.name for a in self.adapters if a.init != "zero" or a.objective == "recovery"]
        if self.base.solver == "keep" and self.model.encodings is None and needy:
            yield (
                f"adapters {', '.join(needy)}: objective recovery and init svd or qera need the "
                "float model, which base.solver: keep does not have; use objective text, init zero"
            )
        if self.base.rotation is None:
            return
        if self.base.solver == "keep":
            yield (
                "base.rotation needs float weights, but solver keep uses integers. Remove one of "
                "them"
            )
        names = [a.name for a in self.adapters]
        starts = [a.continue_from for a in self.adapters if a.continue_from not in (None, *names)]
        if starts:
            yield (
                f"continue_from: {', '.join(map(str, starts))} was trained without rotation and "
                "does not fit a rotated model. Remove base.rotation, or train a new adapter"
            )

    def _target_problems(self) -> Iterator[str]:
        yield from refused(self.export.targets, self.subject())
        schemes = self.budget_schemes() if self.base.has_budget else []
        together = {str(scheme): Weight(scheme) for scheme in schemes}
        for problem in refused(self.export.targets, Subject(weights=together)):
            yield f"base.bits, base.size: {problem}. Use symmetric base.weights"

    def subject(self) -> Subject:
        parts = [
            AdapterParts(
                a.name,
                ["DoRA"] * a.dora + ["experts"] * bool(a.target_parameters),
                is_mergeable=a.mergeable,
                sequence_tokens=self.data_of(a).sequence_tokens,
            )
            for a in self.adapters
        ]
        return Subject(
            weights=self.base.grids(),
            adapters=parts,
            input_bits=self.simulation.activation_bitwidth,
            simulation=self.simulation.model_dump(),
            embedding_bits=self.export.embedding_bits,
            trains_graph=self.workflow == "qwa-lora",
        )

    def _use_case_problems(self) -> Iterator[str]:
        has_cases = any(TARGETS[name].has_cases for name in self.export.targets)
        if not has_cases and self.export.use_cases is None:
            return
        cases = self.use_cases()
        for case in cases:
            parts = members(case)
            if len(parts) > 1 and self.export.layout and "qairt" in self.export.targets:
                yield (
                    f"export.use_cases: {case}: Genie can set the strength of one adapter only. "
                    "Remove this use case, or remove export.layout"
                )
            if unknown := self._unknown(parts):
                yield f"export.use_cases: {case}: {unknown}"
            if len(set(parts)) < len(parts):
                yield f"export.use_cases: {case} names an adapter twice"
        if len(set(cases)) < len(cases) or set(cases) <= {NONE}:
            yield (
                "export.use_cases must list at least one adapter, and each use case once. It lists "
                f"{', '.join(cases) or 'nothing'}"
            )

    def _sharing_problems(self) -> Iterator[str]:
        asked = f"simulation.base_activations {self.simulation.base_activations}"
        experts = {frozenset(a.target_parameters) for a in self.adapters if a.target_parameters}
        if len(experts) > 1:
            yield (
                f"{asked}: PEFT can load several adapters only if all have the same "
                "target_parameters. Make them equal, or use base_activations: all"
            )
        # What an adapter that continues one in files has is known only when these are read.
        dora = {a.dora for a in self.adapters if a.continue_from is None}
        if mergeable := [a.name for a in self.adapters if a.mergeable]:
            yield (
                f"{asked}: mergeable adapters ({', '.join(mergeable)}) change the base's integers, "
                "so they cannot share encodings. Use base_activations: all"
            )
        if self.simulation.base_activations == "none" and len(dora) > 1:
            yield (
                f"{asked}: adapters that share all encodings need the same value of dora. Make "
                "them equal, or use base_activations: adapter_only"
            )

    def _workflow_problems(self) -> Iterator[str]:
        for adapter in self.adapters:
            if adapter.steps:
                yield from adapter.without_graph()
        if self.data.packing == "documents":
            yield (
                "workflow qwa-lora: data.packing documents needs position inputs, which the "
                "captured graph does not have; use join or none"
            )
        if self.simulation.base_activations != "all":
            yield (
                "simulation.base_activations has no effect in workflow qwa-lora, which calibrates "
                "the base's activations before training. Remove it"
            )

    @property
    def is_simulated(self) -> bool:
        targets = self.export.targets
        is_held = any(TARGETS[name].is_simulated for name in targets)
        # Without a target, the simulation is a study of its own.
        return is_held or not targets or self.workflow == "qwa-lora"

    def use_cases(self) -> list[str]:
        if self.export.use_cases is not None:
            return self.export.use_cases
        return [*(adapter.name for adapter in self.adapters), NONE]

    def init_share(self, adapter: Adapter) -> float:
        # Perplexity after training with half of the ranks and with all: 25.81 and 24.70 at 2 bits,
        # 15.56 and 15.83 at 4 bits (docs/log/initialization.md).
        default = 1.0 if self.base.scheme.bitwidth == 2 else 0.5
        return default if adapter.init_share is None else adapter.init_share

    def data_of(self, adapter: Adapter | str | None) -> Data:
        """The data of an adapter, or of an adapter by name; None: the data section."""
        if isinstance(adapter, str):
            adapter = next(a for a in self.adapters if a.name == adapter)
        return self.data if adapter is None or adapter.data is None else adapter.data

    def texts(self) -> dict[str, Data]:
        """The distinct texts of the adapters, each by the name of the first adapter that has it."""
        first: dict[Data, str] = {}
        for adapter in self.adapters:
            first.setdefault(self.data_of(adapter), adapter.name)
        return {name: data for data, name in first.items()}

    def base_text(self) -> Data | None:
        """The data section's text, or else that of all adapters; None if they have several."""
        texts = list(self.texts().values())
        return self.data if self.data.source is not None else texts[0] if len(texts) == 1 else None

    def base_texts(self) -> list[Data]:
        """The texts that the base is calibrated on, cut as the data section says."""
        if self.base.calibrate_on:
            texts = [self.data_of(name) for name in self.base.calibrate_on]
        else:
            texts = [self.data] if self.data.source is not None else list(self.texts().values())
        keys = {"sequence_tokens", "evaluation_sequences", "calibration_sequences"}
        cut = self.data.model_dump(include=keys)
        return list(dict.fromkeys(data.model_copy(update=cut) for data in texts))

    def calibration_texts(self, part: CalibrationText) -> list[Data]:
        """The texts of a part of `base.calibration`; none if the float model generates it."""
        if part.text in (JOB, MODEL):
            return self.base_texts() if part.text == JOB else []
        return [Data(source=part.text, sequence_tokens=self.data.sequence_tokens)]

    def budget_schemes(self) -> list[Scheme]:
        """The schemes that `base.bits` chooses from: those that all targets can hold."""

        def is_held(scheme: Scheme) -> bool:
            subject = Subject(weights={"": Weight(scheme, self.base.solver)})
            return not any(refusals(TARGETS[name], subject) for name in self.export.targets)

        return [*filter(is_held, similar_schemes(self.base.scheme))]

    def predecessor(self, adapter: Adapter) -> Adapter | None:
        """The adapter in this recipe that `adapter` continues from; None if there is none."""
        return next((a for a in self.adapters if a.name == adapter.continue_from), None)

    def root(self, adapter: Adapter) -> Adapter:
        """The first of the adapters in this recipe that `adapter` continues, or itself."""
        while (first := self.predecessor(adapter)) is not None:
            adapter = first
        return adapter


def _filled(section: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    filled = {**defaults, **section}
    for key, value in defaults.items():
        if isinstance(value, dict) and isinstance(filled[key], dict):
            filled[key] = _filled(filled[key], value)
    return filled


def _unset(section: Any, written: Any) -> None:
    """Let only keys that are `written` count as set."""
    if isinstance(section, Section) and isinstance(written, dict):
        section.model_fields_set.intersection_update(written)
        for key in section.model_fields_set:
            _unset(getattr(section, key), written[key])
    elif isinstance(section, list) and isinstance(written, list):
        for pair in zip(section, written, strict=True):
            _unset(*pair)
