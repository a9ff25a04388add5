"""The whole recipe, and what must hold between its sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qwlora.recipe.adapter_section import Adapter
from qwlora.recipe.base_section import Base, Model
from qwlora.recipe.data_section import Data
from qwlora.recipe.section import Count, Name, Section
from qwlora.recipe.simulation_section import SimulationSection

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"base": {"solver": "search"}, "adapter": {"init": "zero"}},
    "balanced": {"base": {"solver": "gptq"}, "adapter": {"init": "qera"}},
    "best": {
        "base": {"solver": "gptq", "gptq": {"sweeps": 4}, "tuning": {"steps": 512}},
        "adapter": {"init": "qera"},
    },
}


class Export(Section):
    """Step 4: the files to write."""

    targets: list[Literal["onnx"]] = Field(["onnx"], description="runtimes to write files for")


class Verify(Section):
    """Step 5: how exported files are tested, and the limits they must meet."""

    sequences: Count = Field(
        8, description="held-out sequences to run through every exported file, at most"
    )
    layer_tokens: Annotated[int, Field(ge=2)] = Field(
        128, description="tokens for the layer-by-layer comparison"
    )
    perplexity_difference: Annotated[float, Field(gt=0)] = Field(
        0.003,
        description="largest allowed relative difference from the perplexity of the simulation",
    )
    layer_steps: Annotated[float, Field(gt=0)] = Field(
        2.0, description="largest allowed difference of a layer output, in quantization steps"
    )
    layer_mean_steps: Annotated[float, Field(gt=0)] = Field(
        0.05, description="largest allowed mean difference of a layer output, in quantization steps"
    )


class Recipe(Section):
    """The whole file."""

    name: Name = Field(
        "qwlora", description="name of the job; an output directory belongs to one job"
    )
    preset: Literal["fast", "balanced", "best"] = Field(
        "balanced",
        description="how much work goes into the base and the starts of adapters. fast: solver "
        "search, init zero; balanced: gptq, init qera; best: gptq with 4 sweeps, scales tuned for "
        "512 steps, init qera. Keys that the recipe sets itself win",
    )
    workflow: Literal["qw-lora", "qwa-lora"] = Field(
        "qw-lora",
        description="qw-lora: calibrate activations after training; qwa-lora: calibrate the base's "
        "activations first and train through them",
    )
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = Field(
        0, description="seed of the data split, the start of adapters and the order of training"
    )
    model: Model
    data: Data
    base: Base = Base()
    adapters: list[Adapter] = Field(min_length=1, description="one base, many adapters")
    simulation: SimulationSection = SimulationSection()
    export: Export = Export()
    verify: Verify = Verify()

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, given: Any) -> Any:
        """Fill in what the preset says and the recipe does not."""
        if not isinstance(given, dict) or given.get("preset", "balanced") not in PRESETS:
            return given
        preset, base = PRESETS[given.get("preset", "balanced")], given.get("base") or {}
        adapters = given.get("adapters")
        if not isinstance(base, dict) or not isinstance(adapters, list):
            return given
        keeps = base.get("solver") == "keep"
        base = base if keeps else _filled(base, preset["base"])
        adapters = [
            _filled(a, preset["adapter"]) if isinstance(a, dict) and _may_correct(a, keeps) else a
            for a in adapters
        ]
        return {**given, "base": base, "adapters": adapters}

    @model_validator(mode="after")
    def _encodings_are_used(self) -> Recipe:
        if self.model.encodings is not None and self.base.solver != "keep":
            raise ValueError(
                "model.encodings are taken by base.solver keep; set it, or remove them"
            )
        if self.model.trust_remote_code and self.base.solver == "keep":
            raise ValueError(
                "model.trust_remote_code: base.solver keep reads integers without code of the "
                "model's own; remove it"
            )
        needy = [a.name for a in self.adapters if a.init != "zero" or a.objective == "recovery"]
        if self.base.solver == "keep" and self.model.encodings is None and needy:
            raise ValueError(
                f"adapters {', '.join(needy)}: recovery, and a start other than zero, need floats, which base.solver keep does not have"
            )
        return self

    @model_validator(mode="after")
    def _runtimes_have_the_bits(self) -> Recipe:
        section = self.simulation
        asked = {
            "simulation.activation_bitwidth": section.activation_bitwidth
            if section.policy != "weights-only"
            else 8
        }
        asked |= {
            f"simulation.rules.{i}.bitwidth": r.bitwidth
            for i, r in enumerate(section.rules)
            if r.bitwidth is not None and r.of != "weights"
        }
        if "onnx" in self.export.targets and (
            wrong := [f"{where} {bits}" for where, bits in asked.items() if bits not in (8, 16)]
        ):
            raise ValueError(
                f"{', '.join(wrong)}: ONNX has activations of 8 and 16 bits; change that, or take onnx out of export.targets"
            )
        return self

    @model_validator(mode="after")
    def _starts_come_first(self) -> Recipe:
        names = [a.name for a in self.adapters]
        for i, adapter in enumerate(self.adapters):
            if adapter.start in names[i:]:
                raise ValueError(
                    f"adapter {adapter.name} starts from {adapter.start}, which must be listed before it"
                )
        return self

    @model_validator(mode="after")
    def _what_is_shared_has_one_shape(self) -> Recipe:
        experts = {
            tuple(sorted(set(a.target_parameters))) for a in self.adapters if a.target_parameters
        }
        if self.simulation.base_activations != "all" and len(experts) > 1:
            raise ValueError(
                f"simulation.base_activations {self.simulation.base_activations}: PEFT takes adapters together only with the same target_parameters; "
                "give those that have any the same, or say all"
            )
        roots = [a for a in self.adapters if self.start_of(a) is None]
        if self.simulation.base_activations != "none" or len(roots) < 2:
            return self
        if budgets := [a.name for a in roots if a.rank_budget is not None]:
            raise ValueError(
                f"simulation.base_activations none: rank_budget gives {', '.join(budgets)} ranks of its own, "
                "and adapters that share every encoding have one shape; leave rank_budget out, or say adapter_only"
            )
        shapes = [
            a.shape() for a in roots if a.start is None
        ]  # that of another lies in its files, and is looked at when they are
        if differ := [
            name
            for name in (shapes[0] if shapes else ())
            if any(shape[name] != shapes[0][name] for shape in shapes)
        ]:
            raise ValueError(
                f"simulation.base_activations none: adapters that share every encoding have one shape, and {', '.join(differ)} "
                f"{'differs' if len(differ) == 1 else 'differ'} among them; give them the same, or say adapter_only"
            )
        return self

    @model_validator(mode="after")
    def _fits_the_workflow(self) -> Recipe:
        if self.workflow == "qw-lora":
            problems = [
                f"adapter {a.name}: range_learning_rate goes with workflow qwa-lora"
                for a in self.adapters
                if a.range_learning_rate is not None
            ]
        else:
            problems = [
                problem
                for adapter in self.adapters
                if adapter.steps
                for problem in adapter.without_graph()
            ]
            if self.data.packing == "documents":
                problems.append(
                    "data.packing documents needs positions, which the graph does not take; use join or none"
                )
            if self.simulation.base_activations != "all":
                problems.append(
                    "simulation.base_activations: the base's activations are calibrated before training, for all adapters; leave it out"
                )
        if problems:
            raise ValueError(f"workflow {self.workflow}: {'; '.join(problems)}")
        return self

    def start_of(self, adapter: Adapter) -> Adapter | None:
        """The recipe's own adapter that `adapter` goes on from."""
        return next((a for a in self.adapters if a.name == adapter.start), None)

    @field_validator("adapters")
    @classmethod
    def _distinct(cls, adapters: list[Adapter]) -> list[Adapter]:
        folders = [a.name.casefold() for a in adapters]  # some file systems ignore case
        if twice := [a.name for a in adapters if folders.count(a.name.casefold()) > 1]:
            raise ValueError(
                f"adapters {', '.join(twice)}: names are folders and must differ in more than case"
            )
        return adapters


def _filled(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`given`, and what it lacks of `defaults`, section by section."""
    filled = dict(given)
    for key, value in defaults.items():
        own = filled.get(key)
        if isinstance(value, dict) and isinstance(own, dict):
            filled[key] = _filled(own, value)
        elif key not in filled:
            filled[key] = value
    return filled


def _may_correct(adapter: dict[str, Any], base_is_kept: bool) -> bool:
    """Whether an adapter can start from what quantization lost."""
    return not (base_is_kept or adapter.get("dora") or adapter.get("start") is not None)
