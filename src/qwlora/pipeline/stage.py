"""A stage of a job, and what stages have in common. Each module in `stages` adds its own to a plan.

What a stage depends on is its `inputs`, by the names of the recipe, and the records that it needs.
Neither has a path, the name of an adapter, a version of a package or anything of this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qwlora.errors import SourceError
from qwlora.grid.scheme import RangeEstimator
from qwlora.pipeline.sources import Sources, unread
from qwlora.pipeline.store import STAGES
from qwlora.quantize.solvers import REVISIONS
from qwlora.recipe import Adapter, Data, Recipe
from qwlora.recipe.grid_sections import JOB
from qwlora.targets.registry import TARGETS

ZERO, CASES = "calibrate/_base", "calibrate/_use_cases"  # no adapter can have these names

# What stages write, in a job's directory.
RULES = "rules.yaml"  # what a budget of bits chose, in base/
SOLVER_SCALES = "tuning/solver_scales.safetensors"  # scales before tuning, in base/
BASE_SIMULATION = "base_simulation"  # encodings of the base without an adapter; workflow qwa-lora
SHARED = "simulation/_shared"  # encodings that adapters share
ADAPTER = "adapter"  # in simulation/NAME/: the adapter as it was calibrated
ZERO_ADAPTER = "simulation/_base"  # of bundles of simulations
USE_CASES = "simulation/_use_cases"  # of export.use_cases
FLOAT_ADAPTERS = ".qwlora/reference"  # trained on the float model; hidden, as of no base here
SAMPLE, ACTIVATIONS = "quantize/sample", "quantize/activations"
SAMPLED = ".qwlora/sampled"  # what the float model wrote: token ids by part of base.calibration
SAMPLED_IDS = "ids.safetensors"  # in it


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: `verb` or `verb/...`; unique.
        kind: the same without names of adapters.
        inputs: what the result depends on, besides `needs`: JSON values, or `Unread`.
        needs: names of the stages whose records it reads, by a name without that of an adapter.
        adapter: name of the adapter that the stage works on, if any.
        case: name of the use case that it checks, if any.
        text: name of the other adapter on whose text it measures, if any.
        artifact: the folder that the stage writes, relative to the job's directory.
        labels: where `inputs` are in the recipe, for messages.
        missing: says why the stage's runtime cannot run here, or None.
    """

    name: str
    kind: str
    inputs: Mapping[str, Any]
    needs: Mapping[str, str] = field(default_factory=dict)
    adapter: str | None = None
    case: str | None = None
    text: str | None = None
    artifact: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    missing: Callable[[], str | None] = lambda: None

    @property
    def verb(self) -> str:
        return self.name.partition("/")[0]

    def check_read(self) -> None:
        for input_ in unread(self.inputs):
            raise input_.error or SourceError(f"{self.name}: a file named in the recipe is missing")

    @property
    def place(self) -> str:
        return self.artifact or f"{STAGES}/{self.name}.json"


class Planner:
    """Collects the stages of a recipe; a stage must be added after the stages that it needs."""

    def __init__(self, recipe: Recipe, sources: Sources):
        self.recipe, self.sources = recipe, sources
        self.targets = {name: TARGETS[name] for name in recipe.export.targets}
        self.shares = recipe.is_simulated and recipe.simulation.base_activations != "all"
        self.base_text = "base.calibrate_on" if recipe.base.calibrate_on else ""  # its key, if set
        self.stages: dict[str, Stage] = {}

    def add(
        self, name: str, inputs: Mapping[str, Any], *needs: str, kind: str = "", **more: Any
    ) -> None:
        """Add a stage. `kind` is by default its name; `more` are other fields of `Stage`."""
        kinds = [self.stages[need].kind for need in needs]
        # Kinds have no names of adapters, so that a renamed adapter stays current. Several needs of
        # one kind are told apart by their order.
        names = [f"{k}/{n}" if kinds.count(k) > 1 else k for n, k in enumerate(kinds)]
        by_name = dict(zip(names, needs, strict=True))
        labels = {"rotation": "base.rotation", "calibration": "base.calibration"}
        plain = _plain(inputs, "", labels)
        more["labels"] = labels | more.get("labels", {})
        self.stages[name] = Stage(name, kind or name, plain, by_name, **more)

    @property
    def model(self) -> dict[str, Any]:
        rotation = self.recipe.base.rotation
        inputs: dict[str, Any] = {"model": self.sources.model}
        if rotation is not None:
            inputs |= {"rotation": rotation, "seed": self.recipe.seed}
        return inputs

    def calibration(self) -> dict[str, Any]:
        """The texts that the base is calibrated on."""
        texts = {}
        for number, part in enumerate(self.recipe.base.calibration):
            where = self.base_text if part.text == JOB else f"base.calibration.{number}.text"
            # None if the float model generates the part: that has its own stage, which is needed.
            read = [self.text(data, where) for data in self.recipe.calibration_texts(part)]
            texts[str(number)] = {"weight": part.weight, "texts": read}
        return {"calibration": texts, "seed": self.recipe.seed}

    def text(self, data: Data, where: str = "", **counts: int) -> _Text:
        """A text as an input; see `Sources.text`. `where` is the key that has its source."""
        text, sections = _Text(self.sources.text(data, **counts)), {"data": self.recipe.data}
        sections |= {f"adapters.{a.name}.data": a.data for a in self.recipe.adapters if a.data}
        same = [name for name, section in sections.items() if section == data]
        # A text that the base is calibrated on is cut as the data section says, so its section may
        # be no one's. Its source is still that of an adapter.
        source = [name for name, section in sections.items() if section.source == data.source]
        where = where or f"{[*same, *source, 'data'][0]}.source"
        text.labels = {"": [*same, "data"][0], ".source": where}
        return text

    def measured(self, data: Data) -> _Text:
        return self.text(data, evaluation_sequences=data.evaluation_sequences)

    def shipped(self) -> dict[str, Any]:
        proof = {"proof": self.recipe.export.proof}
        return {"export": proof, "seed": self.recipe.seed, **revisions("sampled_text")}

    def ranges(self, texts: Iterable[Data], where: str = "") -> dict[str, Any]:
        """Activation ranges that are measured on `texts`; `where` as for `text`."""
        section = self.recipe.simulation
        counted = [
            self.text(data, where, calibration_sequences=data.calibration_sequences)
            for data in texts
        ]
        observers = {section.observer, *(r.observer for r in section.rules if r.observer)}
        has_histogram = any(RangeEstimator(observer).needs_histogram for observer in observers)
        used = revisions("activation_ranges") if has_histogram else {}
        # Only observer percentile reads the key of this name.
        settings = section.model_dump(mode="json", exclude={"percentile"} - observers)
        return {"simulation": settings, "texts": counted, **used}


def revisions(*names: str) -> dict[str, Any]:
    """The revisions of algorithms that a stage runs."""
    # Raised only if an algorithm computes something else, so an upgrade keeps most artifacts.
    return {"revisions": {name: REVISIONS[name] for name in names}}


def labels_of(adapter: Adapter) -> dict[str, str]:
    """Where the recipe has the settings of an adapter."""
    where = f"adapters.{adapter.name}"
    return {"adapter": where, "start": where, "continue_from": f"{where}.continue_from"}


class _Text(dict[str, Any]):
    """A text among the inputs. `labels` says where its keys are in the recipe."""

    labels: dict[str, str]


def _plain(value: Any, path: str, labels: dict[str, str]) -> Any:
    # As JSON reads it back, since inputs are compared with those of a stage.json.
    if isinstance(value, _Text):
        labels |= {f"{path}{key}": label for key, label in value.labels.items()}
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{path}.{k}".strip("."), labels) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}.{n}", labels) for n, item in enumerate(value)]
    return value
