"""The whole recipe, and the checks that involve several sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qwlora.export.registry import TARGETS
from qwlora.export.target import NONE, Target, members
from qwlora.export.target_compatibility import refusal
from qwlora.recipe.adapter_section import Adapter
from qwlora.recipe.base_section import Base, Model
from qwlora.recipe.data_section import Data
from qwlora.recipe.section import Count, Name, Section
from qwlora.recipe.simulation_section import SimulationSection

if TYPE_CHECKING:
    TargetName = str
else:
    TargetName = Literal[tuple(TARGETS)]

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"base": {"solver": "search"}, "adapter": {"init": "zero"}},
    "balanced": {"base": {"solver": "gptq"}, "adapter": {"init": "qera"}},
    "best": {
        "base": {"solver": "gptq", "tuning": {"steps": 512}},
        "adapter": {"init": "qera"},
    },
}


_USE_CASE = r"^[A-Za-z0-9][A-Za-z0-9_-]*(\+[A-Za-z0-9][A-Za-z0-9_-]*)*$"


class Graphs(Section):
    """For targets qnn, aimet and qairt: sizes of graphs with a key-value cache, in tokens."""

    prefill: Annotated[int, Field(ge=2)] = Field(
        128, description="new tokens in a call of the graph that reads a prompt"
    )
    decode: Count = Field(1, description="new tokens in a call of the graph that generates")
    context: Annotated[int, Field(ge=3)] = Field(
        1024, description="new tokens and those in the key-value cache together, in both graphs"
    )

    @model_validator(mode="after")
    def _larger_than_the_next(self) -> Graphs:
        problems = []
        if self.decode >= self.prefill:
            problems.append(f"decode {self.decode} must be less than prefill {self.prefill}")
        if self.context <= self.prefill:
            problems.append(f"context {self.context} must be greater than prefill {self.prefill}")
        if problems:
            raise ValueError(
                f"{'; '.join(problems)}. Defaults: prefill 128, decode 1, context 1024"
            )
        return self


class Export(Section):
    """Step 4: the files to write."""

    targets: list[TargetName] = Field(
        ["onnx"],
        description="runtimes to write files for. Default: `onnx`, or `onnx_each` for adapters "
        "that cannot be switched (DoRA, experts)",
    )
    encodings_version: Literal["1.0.0", "2.0.0"] = Field(
        "1.0.0", description="version of the encodings files of targets aimet and qairt"
    )
    use_cases: list[Annotated[str, Field(pattern=_USE_CASE)]] | None = Field(
        None,
        description="for targets qairt and qnn: what the runtime can switch to. An adapter's name, "
        "several joined by a plus sign for all of them at once, or none for the base. Default: "
        "each adapter alone, and none",
    )
    graphs: Graphs | None = Field(
        None,
        description="sizes of the graphs with a key-value cache that targets qnn, aimet and qairt "
        "have. Default: the defaults of these keys",
    )

    def graphs_of(self, target: str) -> Graphs | None:
        """The sizes of the graphs with a cache that a target writes; None if it writes none."""
        return (self.graphs or Graphs()) if TARGETS[target].cached_graphs else None


class Verify(Section):
    """Step 5: how exported files are tested, and the limits they must meet."""

    sequences: Count = Field(
        8, description="held-out sequences to run through every exported file, at most"
    )
    layer_tokens: Annotated[int, Field(ge=2)] = Field(
        128, description="tokens for the layer-by-layer comparison"
    )
    perplexity_difference: Annotated[float, Field(gt=0, le=1)] = Field(
        0.003,
        description="largest allowed relative difference from the perplexity of the simulation; "
        "what rounding alone explains in 95 % of samples of this size is allowed on top",
    )
    layer_steps: Annotated[float, Field(gt=0)] = Field(
        2.0, description="largest allowed difference of a layer output, in quantization steps"
    )
    layer_mean_steps: Annotated[float, Field(gt=0)] = Field(
        0.05, description="largest allowed mean difference of a layer output, in quantization steps"
    )


class Recipe(Section):
    """The whole recipe file."""

    name: Name = Field(
        "qwlora", description="name of the job; an output directory belongs to one job"
    )
    preset: Literal["fast", "balanced", "best"] = Field(
        "balanced",
        description="how much work goes into the base and the initialization of adapters. fast: "
        "solver search, init zero; balanced: gptq, init qera; best: the same, with scales "
        "tuned for 512 steps. Keys that the recipe sets itself win",
    )
    workflow: Literal["qw-lora", "qwa-lora"] = Field(
        "qw-lora",
        description="qw-lora: calibrate activations after training; qwa-lora: calibrate the base's "
        "activations first and train through them",
    )
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(
        0,
        description="seed of the data split, the initialization of adapters and the order of "
        "training",
    )
    model: Model
    data: Data = Data()
    base: Base = Base()
    adapters: list[Adapter] = Field(min_length=1, description="one base, many adapters")
    simulation: SimulationSection = SimulationSection()
    export: Export = Export()
    verify: Verify = Verify()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, content: Any) -> Any:
        """Fill in what follows from other keys: the preset's values, the keys of the data section
        that an adapter's own data does not set, and target `onnx_each` for adapters that `onnx`
        cannot switch. What has the wrong type is left to the validation."""
        if not isinstance(content, dict):
            return content
        adapters = content.get("adapters")
        sections = [content.get(key) or {} for key in ("base", "data", "export")]
        base, data, export = sections
        preset = PRESETS.get(str(content.get("preset", "balanced")))
        is_typed = isinstance(adapters, list) and all(isinstance(s, dict) for s in sections)
        if preset is None or not is_typed or not all(isinstance(a, dict) for a in adapters or ()):
            return content
        filled, keeps = [], base.get("solver") == "keep"
        for adapter in adapters or ():
            if not (keeps or adapter.get("dora") or adapter.get("continue_from") is not None):
                adapter = _filled(adapter, preset["adapter"])
            if isinstance(adapter.get("data"), dict):
                adapter = {**adapter, "data": {**data, **adapter["data"]}}
            filled.append(adapter)
        if any(a.get("dora") or a.get("target_parameters") for a in filled):
            export = {"targets": ["onnx_each"], **export}
        base = base if keeps else _filled(base, preset["base"])
        return {**content, "base": base, "adapters": filled, "export": export}

    @model_validator(mode="after")
    def _everyone_has_text(self) -> Recipe:
        if without := [a.name for a in self.adapters if self.data_of(a).source is None]:
            raise ValueError(
                f"data.source: required, but not set, and adapters {', '.join(without)} have no "
                "adapters[].data.source either"
            )
        names = {a.name for a in self.adapters}
        if unknown := [name for name in self.base.calibrate_on if name not in names]:
            raise ValueError(
                f"base.calibrate_on: there is no adapter {', '.join(unknown)}; the recipe has "
                f"{', '.join(sorted(names))}"
            )
        return self

    @model_validator(mode="after")
    def _encodings_are_used(self) -> Recipe:
        if self.model.encodings is not None and self.base.solver != "keep":
            raise ValueError(
                "model.encodings needs base.solver: keep; set it, or remove model.encodings"
            )
        needy = [a.name for a in self.adapters if a.init != "zero" or a.objective == "recovery"]
        if self.base.solver == "keep" and self.model.encodings is None and needy:
            raise ValueError(
                f"adapters {', '.join(needy)}: objective recovery and init svd or qera need the "
                "float model, which base.solver: keep does not have; use objective text, init zero"
            )
        return self

    @model_validator(mode="after")
    def _targets_take_everything(self) -> Recipe:
        """What the recipe alone says; `target_compatibility.refusals` knows more with a model."""
        targets = {name: TARGETS[name] for name in self.export.targets}
        problems = [
            problem
            for name, target in targets.items()
            for problem in self._simulation_problems(name, target)
        ]
        if self.base.solver != "keep" and (refused := refusal(self.base.grids(), targets)):
            problems.append(f"base.weights, base.rules: {refused}")
        if problems:
            raise ValueError(f"{'; '.join(problems)}; or remove a target from export.targets")
        for name, target in targets.items():
            self._check_adapters(name, target)
        return self

    def _simulation_problems(self, name: str, target: Target) -> Iterator[str]:
        """Why a target cannot hold the simulation, with the keys to change."""
        section, bitwidths, problems = self.simulation, dict[str, int](), list[str]()
        if target.compilers:
            problems = list(section.htp_problems())
        elif target.cached_graphs:
            problems = list(section.graph_problems())
        if problems:
            yield f"target {name}: {'; '.join(problems)}"
        if section.policy != "weights-only":
            bitwidths["simulation.activation_bitwidth"] = section.activation_bitwidth
            if section.adapter_activation_bitwidth is not None:
                key = "simulation.adapter_activation_bitwidth"
                bitwidths[key] = section.adapter_activation_bitwidth
        bitwidths |= {
            f"simulation.rules.{i}.bitwidth": r.bitwidth
            for i, r in enumerate(section.rules)
            if r.bitwidth is not None and r.of != "weights"
        }
        held = target.activation_bitwidths
        if target.is_simulated and (wrong := [k for k, b in bitwidths.items() if b not in held]):
            yield (
                f"{', '.join(f'{key} {bitwidths[key]}' for key in wrong)}: {name} supports "
                f"activations of {' or '.join(map(str, held))} bits; use one of these"
            )

    def _check_adapters(self, name: str, target: Target) -> None:
        if taken := target.taken_names & {a.name for a in self.adapters}:
            raise ValueError(
                f"adapters: {', '.join(sorted(taken))} is the name of another file or folder in "
                f"export/{name}; choose another name"
            )
        others = [a.name for a in self.adapters if a.dora or a.target_parameters]
        if others and target.holds_factors_only:
            raise ValueError(
                f"adapters {', '.join(others)}: {name} holds LoRA factors of linear layers, but no "
                "DoRA and no experts. Train without dora and target_parameters, or use "
                "export.targets: [onnx_each], which writes a model for each adapter"
            )

    @model_validator(mode="after")
    def _use_cases_exist(self) -> Recipe:
        targets = [name for name in self.export.targets if TARGETS[name].has_cases]
        names = {a.name for a in self.adapters}
        if targets and self.workflow == "qwa-lora":
            raise ValueError(
                f"target {targets[0]} calibrates use cases after training, which would replace "
                "the grids that workflow qwa-lora trained through; use workflow qw-lora"
            )
        tokens = {a.name: self.data_of(a).sequence_tokens for a in self.adapters}
        if targets and len(set(tokens.values())) > 1:
            found = ", ".join(f"{name} {count}" for name, count in tokens.items())
            raise ValueError(
                f"adapters[].data.sequence_tokens: {found}; target {targets[0]} has one graph of a "
                f"fixed length for all adapters. Use equal values, or remove {targets[0]} from "
                "export.targets"
            )
        cases = self.use_cases()
        for case in cases:
            parts = members(case)
            if unknown := [part for part in parts if part not in names]:
                raise ValueError(
                    f"export.use_cases: {case}: there is no adapter {', '.join(unknown)}; the "
                    f"recipe has {', '.join(sorted(names))}"
                )
            if len(set(parts)) < len(parts):
                raise ValueError(f"export.use_cases: {case} names an adapter twice")
        if len(set(cases)) < len(cases) or set(cases) <= {NONE}:
            raise ValueError(
                "export.use_cases must hold an adapter, and every use case once; it holds "
                f"{', '.join(cases) or 'nothing'}"
            )
        return self

    def use_cases(self) -> list[str]:
        """`export.use_cases` with its default."""
        if self.export.use_cases is not None:
            return self.export.use_cases
        return [*(adapter.name for adapter in self.adapters), NONE]

    @model_validator(mode="after")
    def _continued_adapters_come_first(self) -> Recipe:
        names = [a.name for a in self.adapters]
        for i, adapter in enumerate(self.adapters):
            if adapter.continue_from in names[i:]:
                raise ValueError(
                    f"adapter {adapter.name} continues {adapter.continue_from}, which must be "
                    "listed before it"
                )
        return self

    @model_validator(mode="after")
    def _shared_encodings_need_equal_shapes(self) -> Recipe:
        experts = {
            tuple(sorted(set(a.target_parameters))) for a in self.adapters if a.target_parameters
        }
        if self.simulation.base_activations != "all" and len(experts) > 1:
            raise ValueError(
                f"simulation.base_activations {self.simulation.base_activations}: PEFT loads "
                "several adapters only if their target_parameters are equal; make them equal, or "
                "use base_activations: all"
            )
        roots = [a for a in self.adapters if self.predecessor(a) is None]
        if self.simulation.base_activations != "none" or len(roots) < 2:
            return self
        # The shape of an adapter that continues one in files is known only when these are read.
        known = [a for a in roots if a.continue_from is None]
        keys = ("rank", "rank_pattern", "dora")
        if differ := [k for k in keys if any(getattr(a, k) != getattr(known[0], k) for a in known)]:
            raise ValueError(
                "simulation.base_activations none: adapters that share all encodings must have "
                f"equal shapes, but {', '.join(differ)} "
                f"{'differs' if len(differ) == 1 else 'differ'} among them; "
                "use equal values, or base_activations: adapter_only"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_workflow(self) -> Recipe:
        if self.workflow == "qw-lora":
            return self
        trained = [adapter for adapter in self.adapters if adapter.steps]
        problems = [problem for adapter in trained for problem in adapter.without_graph()]
        if self.data.packing == "documents":
            problems.append(
                "data.packing documents needs position inputs, which the captured graph does not "
                "have; use join or none"
            )
        if self.simulation.base_activations != "all":
            problems.append(
                "simulation.base_activations has no effect, since the base's activations are "
                "calibrated before training, for all adapters; remove it"
            )
        if problems:
            raise ValueError(f"workflow {self.workflow}: {'; '.join(problems)}")
        return self

    def data_of(self, adapter: Adapter | str | None) -> Data:
        """The data of an adapter, or of an adapter by name; None: the data section."""
        if isinstance(adapter, str):
            adapter = next(a for a in self.adapters if a.name == adapter)
        return self.data if adapter is None or adapter.data is None else adapter.data

    def texts(self) -> dict[str, Data]:
        """The distinct texts of the adapters, each by the name of the first adapter that has it."""
        found: dict[Data, str] = {}
        for adapter in self.adapters:
            found.setdefault(self.data_of(adapter), adapter.name)
        return {name: data for data, name in found.items()}

    def base_text(self) -> Data | None:
        """The text that the base's perplexity is measured on; None if adapters have different ones
        and the data section has none."""
        texts = list(self.texts().values())
        return self.data if self.data.source is not None else texts[0] if len(texts) == 1 else None

    def base_texts(self) -> list[Data]:
        """The texts that the base is calibrated on, cut into sequences as the data section says."""
        if self.base.calibrate_on:
            given = [self.data_of(name) for name in self.base.calibrate_on]
        else:
            given = [self.data] if self.data.source is not None else list(self.texts().values())
        own = {"sequence_tokens": self.data.sequence_tokens}
        return list(dict.fromkeys(data.model_copy(update=own) for data in given))

    def predecessor(self, adapter: Adapter) -> Adapter | None:
        """The adapter in this recipe that `adapter` continues from; None if there is none."""
        return next((a for a in self.adapters if a.name == adapter.continue_from), None)

    @field_validator("adapters")
    @classmethod
    def _distinct(cls, adapters: list[Adapter]) -> list[Adapter]:
        folders = [a.name.casefold() for a in adapters]
        if twice := [a.name for a in adapters if folders.count(a.name.casefold()) > 1]:
            raise ValueError(
                f"adapters {', '.join(twice)}: each name becomes a folder, and some file systems "
                "ignore case; choose names that differ in more than case"
            )
        return adapters


def _filled(section: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`section`, with missing keys taken from `defaults`, recursively."""
    filled = {**defaults, **section}
    for key, value in defaults.items():
        if isinstance(value, dict) and isinstance(filled[key], dict):
            filled[key] = _filled(filled[key], value)
    return filled
