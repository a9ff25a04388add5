"""The plan of a job: its stages in order, what each needs, and what its result depends on.

    evaluate/float            perplexity of the float model
    quantize/sample           text that the float model writes, if the base is calibrated on it
    quantize                  freeze the base
    evaluate/base
    export/TARGET             of a bundle: the base; where all use cases are together: everything
    calibrate-base            encodings of the base's activations, in workflow qwa-lora
    evaluate/imported/NAME    the float model with an adapter from elsewhere
    train/NAME
    train/NAME/float          the same adapter on the float model, with `reference: float`
    evaluate/reference/NAME   the float model with that adapter
    calibrate                 encodings that adapters share, if they share any
    calibrate/_base           the zero adapter, for targets that switch simulations
    evaluate/adapted/NAME, calibrate/NAME, evaluate/simulated/NAME
    export/TARGET/NAME, verify/TARGET/NAME
    verify/TARGET             the zero adapter
    calibrate/_use_cases      for targets that hold all use cases; then export, verify/TARGET/CASE

With several texts, evaluate/MODEL/on/TEXT measures the float model and the base on the text of each
adapter, and with `evaluate: all` every adapter on the text of each other. If no target holds
activations, nothing is calibrated (`Recipe.is_simulated`). Imports no torch, so that a run in which
nothing changed ends at once.

What a stage depends on is its `inputs`, by the names of the recipe, and the records that it needs.
Neither has a path, the name of an adapter, a version of a package or anything of this machine. Only
files of use cases have names of adapters in them, so there these are inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from qwlora.errors import SourceError
from qwlora.grid.scheme import RangeEstimator
from qwlora.pipeline.asked import (
    REFERENCE,
    compared_with,
    is_calibrated,
    is_compared,
    is_covered,
    is_foreign,
    needs_moments,
    recovers_on_base_text,
    reference_stage,
    sampled_sequences,
    without_recovery,
)
from qwlora.pipeline.sources import Sources, unread
from qwlora.pipeline.store import STAGES
from qwlora.quantize.solvers import REVISIONS, SOLVERS
from qwlora.recipe import Adapter, Data, Recipe
from qwlora.system.parameter_names import BASE
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import PROOF

ZERO, CASES = "calibrate/_base", "calibrate/_use_cases"  # no adapter can have these names

# What stages write, in a job's directory.
MOMENTS = "moments"  # second moments of the base's layers, in base/
RULES = "rules.yaml"  # what a budget of bits chose, in base/
SOLVER_SCALES = "tuning/solver_scales.safetensors"  # scales before tuning, in base/
BASE_SIMULATION = "base_simulation"  # encodings of the base without an adapter; workflow qwa-lora
SHARED = "simulation/_shared"  # encodings that adapters share
ADAPTER = "adapter"  # in simulation/NAME/: the adapter as it was calibrated
ZERO_ADAPTER = "simulation/_base"  # of bundles of simulations
USE_CASES = "simulation/_use_cases"  # of export.use_cases
FLOAT_ADAPTERS = ".qwlora/reference"  # trained on the float model; hidden, as of no base here
SAMPLE = "quantize/sample"
SAMPLED = ".qwlora/sampled"  # what the float model wrote: token ids by part of base.calibration
SAMPLED_IDS = "ids.safetensors"  # in it
# Settings of an adapter that do not change the result. What it continues and its text are inputs of
# their own.
_WITHOUT_EFFECT = {
    *("name", "data", "continue_from", "unknown_base"),
    *("checkpoint_steps", "divergence", "report_to"),
}


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
        """The command that runs the stage."""
        return self.name.partition("/")[0]

    def check_read(self) -> None:
        """Raise the error of an input that cannot be read."""
        for input_ in unread(self.inputs):
            raise input_.error or SourceError(f"{self.name}: a file that the recipe names is gone")

    @property
    def place(self) -> str:
        """Its record's place in the store."""
        return self.artifact or f"{STAGES}/{self.name}.json"


def make_plan(recipe: Recipe, sources: Sources) -> list[Stage]:
    """All stages in the order of a full run.

    All stages of one adapter's simulation follow each other, while it is in memory.
    """
    plan = _Plan(recipe, sources)
    calibration = map(recipe.calibration_texts, recipe.base.calibration)
    for data in (*recipe.base_texts(), *recipe.texts().values(), *chain(*calibration)):
        sources.text(data)  # an error is reported before the model's files are read
    targets = plan.targets
    bundles = [name for name, target in targets.items() if target.has_base]
    with_cases = [name for name, target in targets.items() if target.has_cases]
    switched = [name for name, target in targets.items() if target.needs_zero_adapter]
    if sources.holds_floats:
        plan.evaluate("float")
    plan.sample()
    plan.quantize()
    plan.evaluate("base", "quantize")
    for name in bundles:
        if name not in switched:
            plan.export_base(name, "quantize")
    if recipe.workflow == "qwa-lora":
        ranges = plan.ranges(recipe.base_texts())
        plan.add("calibrate-base", ranges, "quantize", artifact=BASE_SIMULATION)
    for adapter in recipe.adapters:
        is_imported = is_foreign(recipe, adapter) and adapter.unknown_base == "accept"
        if sources.holds_floats and is_imported:
            plan.evaluate("imported", adapter=adapter)
        plan.train(adapter)
        if (reference := reference_stage(recipe, adapter)) is not None:
            plan.train_reference(adapter, reference)
            plan.evaluate(REFERENCE, reference, adapter=adapter)
    if plan.shares:
        trained = [f"train/{adapter.name}" for adapter in recipe.adapters]
        ranges = plan.ranges(recipe.texts().values())
        plan.add("calibrate", ranges, *trained, kind="calibrate/shared", artifact=SHARED)
    if switched:
        plan.calibrate_zero_adapter()
    for name in switched:
        plan.export_base(name, ZERO)
    for adapter in recipe.adapters:
        plan.evaluate("adapted", f"train/{adapter.name}", adapter=adapter)
        if recipe.is_simulated:
            plan.calibrate(adapter)
            plan.evaluate("simulated", f"calibrate/{adapter.name}", adapter=adapter)
        for name in targets:
            if name not in with_cases:
                plan.export_adapter(name, adapter)
                plan.verify(name, adapter.name, [recipe.data_of(adapter)])
    for name in switched:  # last, so that a failure leaves nothing of the adapters undone
        plan.verify_zero_adapter(name)
    if with_cases:
        plan.calibrate_use_cases()
    for name in with_cases:
        more: dict[str, Any] = {"artifact": f"export/{name}"}
        more |= {"missing": targets[name].missing} if targets[name].compilers else {}
        plan.add(f"export/{name}", plan.files(name), CASES, **more)
        for case in recipe.use_cases():
            plan.verify(name, case, recipe.texts().values())
    return list(plan.stages.values())


class _Plan:
    """Collects the stages of a recipe; a stage must be added after the stages that it needs."""

    def __init__(self, recipe: Recipe, sources: Sources):
        self.recipe, self.sources = recipe, sources
        self.targets = {name: TARGETS[name] for name in recipe.export.targets}
        self.shares = recipe.is_simulated and recipe.simulation.base_activations != "all"
        self.stages: dict[str, Stage] = {}

    def add(
        self, name: str, inputs: Mapping[str, Any], *needs: str, kind: str = "", **more: Any
    ) -> None:
        """Add a stage.

        Args:
            kind: default: the name, for a stage without the name of an adapter.
            more: other fields of `Stage`.
        """
        kinds = [self.stages[need].kind for need in needs]
        several = [found for found, count in Counter(kinds).items() if count > 1]
        names = [f"{k}/{n}" if k in several else k for n, k in enumerate(kinds)]
        by_name = dict(zip(names, needs, strict=True))
        self.stages[name] = Stage(name, kind or name, _plain(inputs), by_name, **more)

    # Inputs

    @property
    def model(self) -> dict[str, Any]:
        """The float model, rotated if the recipe says so."""
        rotation = self.recipe.base.rotation
        inputs: dict[str, Any] = {"model": self.sources.model}
        if rotation is not None:
            inputs |= {"rotation": rotation, "seed": self.recipe.seed}
        return inputs

    def calibration(self) -> dict[str, Any]:
        """The texts that the base is calibrated on; what the model writes is a stage of its own."""
        texts = {}
        for number, part in enumerate(self.recipe.base.calibration):
            found = [self.sources.text(data) for data in self.recipe.calibration_texts(part)]
            texts[str(number)] = {"weight": part.weight, "texts": found}
        return {"calibration": texts, "seed": self.recipe.seed}

    def measured(self, data: Data) -> dict[str, Any]:
        """The held-out part of a text."""
        return self.sources.text(data, evaluation_sequences=data.evaluation_sequences)

    def files(self, target: str) -> dict[str, Any]:
        """What exported files depend on besides the tensors in them: the encodings version, the
        ONNX opset and the embedding bits unless default; the sizes and layout of graphs with a
        cache; and which text the golden inputs are."""
        export, graphs = self.recipe.export, self.recipe.export.graphs_of(target)
        keys = {"encodings_version", "opset"} if TARGETS[target].opsets else set[str]()
        keys |= {"embedding_bits"} if len(TARGETS[target].embedding_bits) > 1 else set()
        written = export.model_dump(include=keys, exclude_defaults=True)
        written |= {} if graphs is None else {"graphs": graphs.model_dump()}
        written |= {"layout": layout} if (layout := export.layout_of(target)) else {}
        shipped = self.shipped() if TARGETS[target].has_golden else {}
        return {**shipped, "export": {**written, **shipped.get("export", {})}}

    def shipped(self) -> dict[str, Any]:
        """What the text next to exported files depends on."""
        proof, revisions = {"proof": self.recipe.export.proof}, _revisions("sampled_text")
        return {"export": proof, "seed": self.recipe.seed, **revisions}

    def ranges(self, texts: Iterable[Data]) -> dict[str, Any]:
        """Activation ranges that are measured on `texts`."""
        section, text = self.recipe.simulation, self.sources.text
        counted = [text(d, calibration_sequences=d.calibration_sequences) for d in texts]
        observers = {section.observer, *(r.observer for r in section.rules if r.observer)}
        has_histogram = any(RangeEstimator(observer).needs_histogram for observer in observers)
        revisions = _revisions("activation_ranges") if has_histogram else {}
        return {"simulation": section.model_dump(mode="json"), "texts": counted, **revisions}

    def label(self, adapter: Adapter | None) -> str:
        """Where the recipe names the text of an adapter."""
        is_own = adapter is not None and adapter.data is not None
        return f"adapters.{adapter.name}.data" if adapter and is_own else "data"

    # Stages

    def sample(self) -> None:
        recipe, parts = self.recipe, self.recipe.base.calibration
        if counts := sampled_sequences(recipe):
            sampled = {
                str(n): {"sequences": count, "temperature": parts[n].temperature}
                for n, count in counts.items()
            }
            tokens = {"sequence_tokens": recipe.data.sequence_tokens}
            inputs = {**self.model, "calibration": sampled, "data": tokens, "seed": recipe.seed}
            self.add(SAMPLE, inputs | _revisions("sampled_text"), artifact=SAMPLED)

    def quantize(self) -> None:
        recipe, base, model = self.recipe, self.recipe.base, self.recipe.model
        named = {base.solver, *(rule.solver for rule in base.rules)}
        revisions = [name for name in SOLVERS if name in named]
        without = {"tuning", "calibrate_on", "calibration", "rotation"}
        inputs = {**self.model, "base": base.model_dump(mode="json", exclude=without)}
        if is_calibrated(recipe) or base.tuning.steps:
            inputs |= self.calibration()
        revisions += ["layer_statistics"] * is_calibrated(recipe)
        if needs_moments(recipe):
            inputs["second_moments"] = True
            revisions.append("second_moments")
        if base.has_budget:
            inputs["schemes_to_choose_from"] = [*map(str, recipe.budget_schemes())]
            revisions.append("bit_budget")
        if base.tuning.steps:
            inputs["base"] |= {"tuning": base.tuning.model_dump(mode="json")}
            revisions.append("tune_scales")
        if model.encodings is not None:
            settings = model.model_dump(include={"keep_float", "block_order", "prefix"})
            inputs["model"] |= {"encodings": self.sources.file(model.encodings), **settings}
        if recipe.data.chat_template is not None:  # exported too
            inputs["chat_template"] = self.sources.file(recipe.data.chat_template)
        needs = [SAMPLE] * ("calibration" in inputs and SAMPLE in self.stages)
        labels = {"chat_template": "data.chat_template", "calibration": "base.calibration"}
        labels["second_moments"] = "adapters[].init"
        labels["schemes_to_choose_from"] = "export.targets (schemes that base.bits chooses from)"
        inputs |= _revisions(*revisions)
        self.add("quantize", inputs, *needs, artifact="base", labels=labels)

    def learned(self, adapter: Adapter, start: Adapter) -> dict[str, Any]:
        """What an adapter learns from, and the files that `start` continues."""
        data, is_new = self.recipe.data_of(adapter), self.recipe.predecessor(start) is None
        text = self.measured(data) if adapter.evaluation_steps else self.sources.text(data)
        inputs = {"text": text, "seed": self.recipe.seed}
        if start.continue_from is not None and is_new:
            inputs["continue_from"] = self.sources.adapter(start.continue_from)
        return inputs

    def labels(self, adapter: Adapter) -> dict[str, str]:
        where = f"adapters.{adapter.name}"
        start = {"continue_from": f"{where}.continue_from"}
        return {"adapter": where, "text": self.label(adapter), **start}

    def train(self, adapter: Adapter) -> None:
        recipe, name = self.recipe, adapter.name
        first, has_init = recipe.predecessor(adapter), adapter.init != "zero"
        settings = adapter.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
        if not has_init:
            del settings["init_share"]
        inputs = {"adapter": settings, **self.learned(adapter, adapter)}
        inputs |= _revisions("initialize_adapter") if has_init else {}
        needs = ["quantize", *([f"train/{first.name}"] if first else [])]
        needs += ["calibrate-base"] if recipe.workflow == "qwa-lora" else []
        if recovers_on_base_text(recipe, adapter):
            inputs |= self.calibration()
            needs += [SAMPLE] * (SAMPLE in self.stages)
        more: dict[str, Any] = {"adapter": name, "labels": self.labels(adapter)}
        more["artifact"] = f"adapters/{name}"
        self.add(f"train/{name}", inputs, *needs, kind="train", **more)

    def train_reference(self, adapter: Adapter, stage: str) -> None:
        """It does not depend on the base."""
        recipe, start = self.recipe, without_recovery(self.recipe, adapter)
        without = {*_WITHOUT_EFFECT, "init", "init_share"}
        settings = [a.model_dump(mode="json", exclude=without) for a in (adapter, start)]
        inputs = {**self.model, "adapter": settings[0], **self.learned(adapter, start)}
        inputs |= {"start": settings[1], "workflow": recipe.workflow}
        first, name = recipe.predecessor(start), adapter.name
        before = reference_stage(recipe, first) if first else None
        more = {"artifact": f"{FLOAT_ADAPTERS}/{name}", "labels": self.labels(adapter)}
        needs = [before] if before else []
        self.add(stage, inputs, *needs, kind="train/float", adapter=name, **more)

    def evaluate(self, kind: str, *needs: str, adapter: Adapter | None = None) -> None:
        """Add the stages of one model: `float`, `base`, `imported`, `reference`, `adapted` or
        `simulated`."""
        recipe, name = self.recipe, None if adapter is None else adapter.name
        own = recipe.base_text() if adapter is None else recipe.data_of(adapter)
        inputs = self.model if kind in ("float", "imported", REFERENCE) else {}
        inputs |= _revisions("token_scores")
        if kind == "imported" and adapter is not None:
            inputs["continue_from"] = self.sources.adapter(str(adapter.continue_from))
        stage = f"evaluate/{kind}" if name is None else f"evaluate/{kind}/{name}"
        labels = self.labels(adapter) if adapter else {"text": "data"}
        if own is not None:
            reference = compared_with(recipe, kind, adapter)
            against = [reference] if reference else []
            read, needed = {**inputs, "text": self.measured(own)}, [*needs, *against]
            of = f"evaluate/{kind}"
            self.add(stage, read, *needed, kind=of, adapter=name, labels=labels)
        kinds = {"float", "base", *(["adapted"] if recipe.evaluate == "all" else [])}
        texts = recipe.texts() if kind in kinds else {}
        for text, data in texts.items() if len(texts) > 1 else ():
            if data != own:
                other = next(a for a in recipe.adapters if a.name == text)
                more: dict[str, Any] = {"adapter": name, "text": text}
                more["labels"] = {"text": self.label(other)}
                read = {**inputs, "text": self.measured(data), "kl": is_compared(kind, text)}
                self.add(f"{stage}/on/{text}", read, *needs, kind=f"evaluate/{kind}/on", **more)

    def calibrate(self, adapter: Adapter) -> None:
        """If encodings are shared, the cost of sharing is measured on held-out text."""
        name, data = adapter.name, self.recipe.data_of(adapter)
        inputs = self.ranges([data])
        inputs |= {"held_out": self.measured(data)} if self.shares else {}
        labels = {"texts.0": self.label(adapter), "held_out": self.label(adapter)}
        more: dict[str, Any] = {"adapter": name, "artifact": f"simulation/{name}", "labels": labels}
        needs = [f"train/{name}", *(["calibrate"] if self.shares else [])]
        self.add(f"calibrate/{name}", inputs, *needs, kind="calibrate", **more)

    def calibrate_zero_adapter(self) -> None:
        """It depends on the shape of the first adapter, and on which layers have one: another
        adapter of the same layers changes nothing. Of an adapter from elsewhere the recipe does not
        say the layers, but its files may."""
        recipe = self.recipe
        first, *others = recipe.adapters
        counted = [first]
        counted += [a for a in others if not is_foreign(recipe, a) or not is_covered(recipe, a)]
        keys = {"target_modules", "layers"}
        layers = {a.model_dump_json(include=keys) for a in counted}
        needs = ["quantize", *(f"train/{a.name}" for a in counted if is_foreign(recipe, a))]
        needs += ["calibrate-base"] if recipe.workflow == "qwa-lora" else []
        needs += ["calibrate"] if self.shares else []
        shape = first.model_dump(include={"rank", "rank_pattern"})
        zero = {"adapter": shape, "layers": sorted(layers), "seed": recipe.seed}
        labels = {"adapter": f"adapters.{first.name}", "layers": "adapters[].target_modules"}
        inputs = self.ranges(recipe.base_texts()) | zero
        self.add(ZERO, inputs, *needs, artifact=ZERO_ADAPTER, labels=labels)

    def calibrate_use_cases(self) -> None:
        """Files of use cases hold the names of adapters."""
        names = [adapter.name for adapter in self.recipe.adapters]
        ranges = self.ranges(self.recipe.texts().values())
        inputs = {**ranges, "use_cases": self.recipe.use_cases(), "adapters": names}
        needs = [f"calibrate/{name}" for name in names]
        labels = {"use_cases": "export.use_cases"}
        self.add(CASES, inputs, *needs, artifact=USE_CASES, labels=labels)

    def export_base(self, target: str, source: str) -> None:
        artifact = f"export/{target}/{BASE}"
        self.add(f"export/{target}", self.files(target), source, artifact=artifact)

    def export_adapter(self, target: str, adapter: Adapter) -> None:
        *base, stage = self.targets[target].stages(target, adapter.name)
        source = "calibrate" if self.targets[target].is_simulated else "train"
        needs = [*base, f"{source}/{adapter.name}"]
        more = {"adapter": adapter.name, "artifact": stage, "kind": f"export/{target}/adapter"}
        self.add(stage, self.files(target), *needs, **more)

    def verify(self, target: str, name: str, texts: Iterable[Data]) -> None:
        """Add the check of an adapter or use case. Whether its runtime is installed does not
        matter: a proof is of files, and one that was not run is no proof."""
        known, recipe = self.targets[target], self.recipe
        inputs: dict[str, Any] = {"verify": recipe.verify.model_dump(mode="json")}
        inputs["texts"] = [self.sources.text(text) for text in texts]
        inputs |= self.shipped() if known.has_proof else {}
        inputs |= {"use_case": name} if known.has_cases else {}
        named = {"case" if known.has_cases else "adapter": name}
        artifact = f"export/{target}/{PROOF}/{name}" if known.has_proof else None
        owner = next((a for a in recipe.adapters if a.name == name), None)
        more: dict[str, Any] = {
            **named,
            "artifact": artifact,
            "labels": {"texts.0": self.label(owner)},
        }
        more |= {"missing": known.missing} if known.has_proof else {}
        needs, kind = known.stages(target, name), f"verify/{target}/adapter"
        self.add(f"verify/{target}/{name}", inputs, *needs, kind=kind, **more)

    def verify_zero_adapter(self, target: str) -> None:
        text = self.sources.text(self.recipe.data_of(self.recipe.adapters[0]))
        inputs = {"verify": self.recipe.verify.model_dump(mode="json"), "texts": [text]}
        self.add(f"verify/{target}", inputs, f"export/{target}")


def _revisions(*names: str) -> dict[str, Any]:
    """The revisions of algorithms that a stage runs."""
    return {"revisions": {name: REVISIONS[name] for name in names}}


def _plain(value: Any) -> Any:
    """`value` as JSON reads it back; what is unread stays."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
