"""The plan of a job: its stages in order, what each needs, and what its result depends on.

A stage's key is a hash of everything its result depends on, so that a change reruns exactly the
stages that it affects:

    its section of the recipe, the revisions of the package and of the algorithms that it runs,
    the content of its text or model, the keys of the stages that it needs

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
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qwlora.data import Documents, load_documents
from qwlora.formats.model_source import content_files, fetch
from qwlora.grid.scheme import RangeEstimator
from qwlora.pipeline.job.digests import Digests
from qwlora.pipeline.job.stage_records import Stage
from qwlora.quantize.solvers import REVISIONS, SOLVERS
from qwlora.recipe import Adapter, Data, Recipe
from qwlora.recipe.grid_sections import JOB, MODEL
from qwlora.system.machine import auto_compute, device_type, exact_type
from qwlora.system.parameter_names import BASE
from qwlora.system.progress import Track, one_step, untracked
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
REFERENCE = "reference"  # the float model with an adapter trained on it, as others are `adapted`
SAMPLE = "quantize/sample"
SAMPLED = ".qwlora/sampled"  # what the float model wrote: token ids by part of base.calibration
SAMPLED_IDS = "ids.safetensors"  # in it
_MOST_SAMPLED = 128  # sequences of a part, for a base that is tuned for hundreds of steps
# settings of an adapter that do not change the result; the text itself is an input
_WITHOUT_EFFECT = {"checkpoint_steps", "divergence", "report_to", "data"}
_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")
_IN_BLOCK = re.compile(r".+\.\d+\..+")


class JobTexts:
    """The documents of the texts of a recipe. Each source is read once, when it is needed.

    Args:
        reads: False for a plan that is only looked at: nothing is read, and keys say nothing.
    """

    def __init__(self, recipe: Recipe, track: Track = untracked, reads: bool = True):
        self.recipe, self.reads, self._track = recipe, reads, track
        self._loaded: dict[Any, Documents] = {}

    def documents(self, data: Data) -> Documents:
        """The documents of a data section that has a source."""
        assert data.source is not None
        key = (data.source, data.held_out, data.reading())
        if key not in self._loaded:
            source, held_out, reading = key
            with one_step(self._track, f"reading {source}"):
                self._loaded[key] = load_documents(source, held_out, self.recipe.seed, reading)
        return self._loaded[key]

    def key(self, data: Data) -> list[Any]:
        """Key inputs for the documents and how they are cut into sequences."""
        if not self.reads:
            return []
        documents = self.documents(data)
        packing = data.cutting().packing_of(documents.kind)
        template = data.read_template()
        inputs = [documents.digest, data.sequence_tokens, packing, data.turns, template]
        if documents.kind == "completions" and data.prompt_format != "plain":
            inputs.append(data.prompt_format)
        return inputs


def make_plan(recipe: Recipe, texts: JobTexts, digests: Digests | None = None) -> list[Stage]:
    """All stages in the order of a full run.

    All stages of one adapter's simulation follow each other, while it is in memory.

    Args:
        digests: digests of the model's files and of adapters to continue from. Pass those of the
            job, so that unchanged files are not read again.
    """
    plan = _Plan(recipe, texts, digests or Digests())
    calibration = map(recipe.calibration_texts, recipe.base.calibration)
    for data in (*recipe.base_texts(), *recipe.texts().values(), *chain(*calibration)):
        texts.key(data)  # an error is reported before the model's files are read
    has_float, targets = has_float_model(recipe), plan.targets
    bundles = [name for name, target in targets.items() if target.has_base]
    with_cases = [name for name, target in targets.items() if target.has_cases]
    switched = [name for name, target in targets.items() if target.needs_zero_adapter]
    if has_float:
        plan.evaluate("float")
    plan.sample()
    plan.quantize()
    plan.evaluate("base", "quantize")
    for name in bundles:
        if name not in switched:
            artifact = f"export/{name}/{BASE}"
            plan.add(f"export/{name}", plan.files(name), "quantize", artifact=artifact)
    if recipe.workflow == "qwa-lora":
        ranges = plan.ranges(recipe.base_texts())
        plan.add("calibrate-base", ranges, "quantize", artifact=BASE_SIMULATION)
    for adapter in recipe.adapters:
        if has_float and is_foreign(recipe, adapter) and adapter.unknown_base == "accept":
            plan.evaluate("imported", adapter=adapter)
        plan.train(adapter)
        if (reference := reference_stage(recipe, adapter)) is not None:
            plan.train_reference(adapter, reference)
            plan.evaluate(REFERENCE, reference, adapter=adapter)
    if plan.shares:
        trained = [f"train/{adapter.name}" for adapter in recipe.adapters]
        plan.add("calibrate", plan.ranges(recipe.texts().values()), *trained, artifact=SHARED)
    if switched:
        plan.calibrate_zero_adapter()
    for name in switched:
        artifact = f"export/{name}/{BASE}"
        plan.add(f"export/{name}", plan.files(name), ZERO, artifact=artifact)
    for adapter in recipe.adapters:
        plan.evaluate("adapted", f"train/{adapter.name}", adapter=adapter)
        if recipe.is_simulated:
            plan.calibrate(adapter)
            plan.evaluate("simulated", f"calibrate/{adapter.name}", adapter=adapter)
        for name in targets:
            if name not in with_cases:
                *base, stage = targets[name].stages(name, adapter.name)
                source = "calibrate" if targets[name].is_simulated else "train"
                needs = [*base, f"{source}/{adapter.name}"]
                inputs = plan.files(name)
                plan.add(stage, inputs, *needs, adapter=adapter.name, artifact=stage)
                # a proof is written once the runtime is installed
                missing = [targets[name].missing()] if targets[name].has_proof else []
                text = texts.key(recipe.data_of(adapter))
                plan.verify(name, adapter.name, [text, *missing], adapter.name)
    for name in switched:  # last, so that a failure leaves nothing of the adapters undone
        text = texts.key(recipe.data_of(recipe.adapters[0]))
        plan.add(f"verify/{name}", [recipe.verify.model_dump(), text], f"export/{name}")
    if with_cases:
        ranges, cases = plan.ranges(recipe.texts().values()), recipe.use_cases()
        calibrated = [f"calibrate/{adapter.name}" for adapter in recipe.adapters]
        plan.add(CASES, [cases, ranges], *calibrated, artifact=USE_CASES)
    for name in with_cases:
        # compiled and verified once the compiler and its emulator are installed
        missing = [targets[name].missing()] if targets[name].compilers else []
        inputs = [*plan.files(name), *missing]
        plan.add(f"export/{name}", inputs, CASES, artifact=f"export/{name}")
        for case in recipe.use_cases():
            keys = [texts.key(text) for text in recipe.texts().values()]
            plan.verify(name, case, [keys, *missing], None)
    return list(plan.stages.values())


class _Plan:
    """Collects the stages of a recipe; a stage must be added after the stages that it needs."""

    def __init__(self, recipe: Recipe, texts: JobTexts, digests: Digests):
        self.recipe, self.texts, self.digests = recipe, texts, digests
        self.targets = {name: TARGETS[name] for name in recipe.export.targets}
        self.shares = recipe.is_simulated and recipe.simulation.base_activations != "all"
        self.stages: dict[str, Stage] = {}

    def add(
        self,
        name: str,
        inputs: Any,
        *needs: str,
        adapter: str | None = None,
        artifact: str | None = None,
    ) -> None:
        """Add a stage; its result depends on `inputs`, JSON values, in addition to `needs`."""
        content = [name, inputs, [self.stages[need].key for need in needs]]
        text = json.dumps(content, sort_keys=True, allow_nan=False)
        key = hashlib.sha256(text.encode()).hexdigest()
        self.stages[name] = Stage(name, key, adapter, artifact, needs)

    @cached_property
    def model(self) -> list[Any]:
        section, rotation = self.recipe.model, self.recipe.base.rotation
        files = self.contents(fetch(section.source).files)
        trusted = ["trust_remote_code"] if section.trust_remote_code else []
        rotated = [rotation, self.recipe.seed] if rotation is not None else []
        return [version("qwlora"), section.source, *files, *trusted, *rotated]

    @cached_property
    def calibration(self) -> list[Any]:
        """The texts that the base is calibrated on; what the model writes is a stage of its own."""
        parts = [(p.weight, self.recipe.calibration_texts(p)) for p in self.recipe.base.calibration]
        return [[weight, [self.texts.key(data) for data in texts]] for weight, texts in parts]

    def sample(self) -> None:
        recipe, parts = self.recipe, self.recipe.base.calibration
        if counts := sampled_sequences(recipe):
            sampled = [[n, count, parts[n].temperature] for n, count in counts.items()]
            inputs = [self.model, sampled, recipe.data.sequence_tokens, recipe.seed]
            self.add(SAMPLE, [*inputs, REVISIONS["sampled_text"]], artifact=SAMPLED)

    def held_out(self, data: Data) -> list[Any]:
        return [*self.texts.key(data), data.evaluation_sequences]

    def contents(self, files: Iterable[Path]) -> list[tuple[str, str | None]]:
        """Name and digest of each file."""
        files = files if self.texts.reads else ()
        return [(file.name, self.digests.content(file)) for file in files]

    def adapter_contents(self, source: str | None) -> list[tuple[str, str | None]]:
        """Files of an adapter to continue; of one on the hub its name in the recipe is enough."""
        folder = Path(source or "")
        is_local = source and folder.is_dir()
        return self.contents(content_files(folder)) if is_local else []

    def files(self, target: str) -> list[Any]:
        """What exported files depend on besides the tensors in them: the encodings version, the
        ONNX opset and the embedding bits unless default; the sizes and layout of graphs with a
        cache; and which text the golden inputs are."""
        export, graphs = self.recipe.export, self.recipe.export.graphs_of(target)
        keys = {"encodings_version", "opset"} if TARGETS[target].opsets else set[str]()
        keys |= {"embedding_bits"} if len(TARGETS[target].embedding_bits) > 1 else set()
        version = export.model_dump(include=keys, exclude_defaults=True)
        more = [export.layout_of(target)]
        sizes = [] if graphs is None else [graphs.model_dump()]
        golden = self.shipped() if TARGETS[target].has_golden else []
        return [*version.values(), *sizes, *filter(None, more), *golden]

    def shipped(self) -> list[Any]:
        """What the text next to exported files depends on."""
        return [self.recipe.export.proof, self.recipe.seed, REVISIONS["sampled_text"]]

    def ranges(self, texts: Iterable[Data]) -> list[Any]:
        """Activation ranges that are measured on `texts`."""
        section = self.recipe.simulation
        counts = [[self.texts.key(text), text.calibration_sequences] for text in texts]
        observers = {section.observer, *(r.observer for r in section.rules if r.observer)}
        counted = any(RangeEstimator(observer).needs_histogram for observer in observers)
        revision = [REVISIONS["activation_ranges"]] if counted else []
        return [section.model_dump(), counts, *revision]

    def quantize(self) -> None:
        recipe, base, model = self.recipe, self.recipe.base, self.recipe.model
        named = {base.solver, *(rule.solver for rule in base.rules)}
        solvers = [name for name in SOLVERS if name in named]
        observed: list[Any] | None = None
        if is_calibrated(recipe):
            observed = [self.calibration, recipe.seed, REVISIONS["layer_statistics"]]
        budget: list[Any] | None = None
        if base.has_budget:
            budget = [REVISIONS["bit_budget"], *map(str, recipe.budget_schemes())]
        encodings: list[Any] | None = None
        if model.encodings is not None:
            settings = (model.keep_float, model.block_order, model.prefix)
            encodings = [*self.contents([Path(model.encodings)]), *settings]
        tuning: list[Any] | None = None
        if base.tuning.steps:
            revision = REVISIONS["tune_scales"]
            tuning = [base.tuning.model_dump(), self.calibration, recipe.seed, revision]
        template = recipe.data.read_template() if self.texts.reads else None  # exported too
        inputs = [
            self.model,
            encodings,
            base.model_dump(exclude={"tuning", "calibrate_on", "calibration"}),
            observed,
            needs_moments(recipe) and REVISIONS["second_moments"],
            *([name, REVISIONS[name]] for name in solvers),
            budget,
            tuning,
            *([] if template is None else [template]),
        ]
        reads = bool(observed or tuning) and SAMPLE in self.stages
        self.add("quantize", inputs, *[SAMPLE] * reads, artifact="base")

    def learns(self, adapter: Adapter, start: Adapter) -> list[Any]:
        """The texts of an adapter, and the files that `start` continues."""
        data, is_new = self.recipe.data_of(adapter), self.recipe.predecessor(start) is None
        return [
            self.texts.key(data),
            self.held_out(data) if adapter.evaluation_steps else None,
            self.adapter_contents(start.continue_from if is_new else None),
        ]

    def train(self, adapter: Adapter) -> None:
        recipe, name = self.recipe, adapter.name
        first, has_init = recipe.predecessor(adapter), adapter.init != "zero"
        settings = adapter.model_dump(exclude=_WITHOUT_EFFECT)
        if not has_init:
            del settings["init_share"]
        learns = self.learns(adapter, adapter)
        learns += [REVISIONS["initialize_adapter"]] if has_init else []
        needs = ["quantize", *([f"train/{first.name}"] if first else [])]
        needs += ["calibrate-base"] if recipe.workflow == "qwa-lora" else []
        if recovers_on_base_text(recipe, adapter):
            learns.append(self.calibration)
            needs += [SAMPLE] * (SAMPLE in self.stages)
        inputs = [settings, learns, recipe.seed]
        self.add(f"train/{name}", inputs, *needs, adapter=name, artifact=f"adapters/{name}")

    def train_reference(self, adapter: Adapter, stage: str) -> None:
        """It does not depend on the base."""
        recipe, start = self.recipe, without_recovery(self.recipe, adapter)
        no_effect = {*_WITHOUT_EFFECT, "init", "init_share"}
        settings = [a.model_dump(exclude=no_effect) for a in (adapter, start)]
        inputs = [self.model, settings, self.learns(adapter, start), recipe.seed, recipe.workflow]
        first = recipe.predecessor(start)
        before = reference_stage(recipe, first) if first else None
        needs, name = [before] if before else [], adapter.name
        self.add(stage, inputs, *needs, adapter=name, artifact=f"{FLOAT_ADAPTERS}/{name}")

    def evaluate(self, kind: str, *needs: str, adapter: Adapter | None = None) -> None:
        """Add the stages of one model: `float`, `base`, `imported`, `reference`, `adapted` or
        `simulated`."""
        recipe, name = self.recipe, None if adapter is None else adapter.name
        own = recipe.base_text() if adapter is None else recipe.data_of(adapter)
        model: list[Any] = [self.model] if kind in ("float", "imported", REFERENCE) else []
        model.append(REVISIONS["token_scores"])
        if kind == "imported" and adapter is not None:
            model.append([adapter.continue_from, self.adapter_contents(adapter.continue_from)])
        stage = f"evaluate/{kind}" if name is None else f"evaluate/{kind}/{name}"
        if own is not None:
            reference = compared_with(recipe, kind, adapter)
            against = [reference] if reference else []
            self.add(stage, [*model, self.held_out(own)], *needs, *against, adapter=name)
        kinds = {"float", "base", *(["adapted"] if recipe.evaluate == "all" else [])}
        texts = recipe.texts() if kind in kinds else {}
        for text, data in texts.items() if len(texts) > 1 else ():
            if data != own:
                measured = ["kl"] if is_compared(kind, text) else []
                inputs = [*model, *measured, self.held_out(data)]
                self.add(f"{stage}/on/{text}", inputs, *needs, adapter=name)

    def calibrate(self, adapter: Adapter) -> None:
        """If encodings are shared, the cost of sharing is measured on held-out text."""
        name, data = adapter.name, self.recipe.data_of(adapter)
        inputs = [self.ranges([data]), self.held_out(data) if self.shares else None]
        needs = [f"train/{name}", *(["calibrate"] if self.shares else [])]
        artifact = f"simulation/{name}"
        self.add(f"calibrate/{name}", inputs, *needs, adapter=name, artifact=artifact)

    def calibrate_zero_adapter(self) -> None:
        """It depends on the shape of the first adapter, and on which layers have one: another
        adapter of the same layers changes nothing. Of an adapter from elsewhere the recipe does not
        say the layers, but its files may."""
        recipe = self.recipe
        first, *others = recipe.adapters
        counted = [first]
        counted += [a for a in others if not is_foreign(recipe, a) or not self._is_covered(a)]
        shape = first.model_dump(include={"rank", "rank_pattern"})
        layers = {a.model_dump_json(include={"target_modules", "layers"}) for a in counted}
        needs = ["quantize", *(f"train/{a.name}" for a in counted if is_foreign(recipe, a))]
        needs += ["calibrate-base"] if recipe.workflow == "qwa-lora" else []
        needs += ["calibrate"] if self.shares else []
        inputs = [self.ranges(recipe.base_texts()), [shape, *sorted(layers)], recipe.seed]
        self.add(ZERO, inputs, *needs, artifact=ZERO_ADAPTER)

    def _is_covered(self, adapter: Adapter) -> bool:
        """Whether new adapters change all layers of an adapter that continues a folder, by the
        target_modules that PEFT reads: `all-linear` is every linear layer inside a numbered block,
        names are the ends of paths. A regular expression is never tried: it could take forever.

        False if the adapter is on the hub, or its files cannot be read or hold something else than
        factors of linear layers.
        """
        folder = Path(str(adapter.continue_from))
        try:
            config = json.loads((folder / "adapter_config.json").read_text())
            with safe_open(folder / "adapter_model.safetensors", "np") as file:
                sizes = {n: len(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
            factors = [size == 2 and _FACTOR.fullmatch(name) for name, size in sizes.items()]
            layers = {match[1] for match in factors if match}
            if not layers or not all(factors) or config.get("target_parameters"):
                return False
        except (OSError, ValueError, AttributeError, RecursionError, SafetensorError):
            return False

        def targets(modules: str | list[str], layer: str) -> bool:
            if isinstance(modules, list):
                return any(f".{layer}".endswith(f".{name}") for name in modules)
            return modules.lower() == "all-linear" and _IN_BLOCK.fullmatch(layer) is not None

        new = [a for a in self.recipe.adapters if a.continue_from is None and a.layers is None]
        return any(all(targets(a.target_modules, layer) for layer in layers) for a in new)

    def verify(self, target: str, name: str, inputs: list[Any], adapter: str | None) -> None:
        kind = self.targets[target]
        inputs = [self.recipe.verify.model_dump(), *inputs]
        inputs += self.shipped() if kind.has_proof else []
        artifact = f"export/{target}/{PROOF}/{name}" if kind.has_proof else None
        needs = kind.stages(target, name)
        self.add(f"verify/{target}/{name}", inputs, *needs, adapter=adapter, artifact=artifact)


def resolve_compute(recipe: Recipe) -> Recipe:
    """Replace `compute: auto` with the precision it means on this machine.

    Results depend on it, so stage keys and the recipe in the directory hold the actual precision.
    """
    base, graph = recipe.base, recipe.workflow == "qwa-lora"  # the graph computes in float32 only
    device = device_type(recipe.device)
    if base.tuning.steps and base.tuning.compute == "auto":
        compute = {"compute": auto_compute(exact_type(device))}
        base = base.model_copy(update={"tuning": base.tuning.model_copy(update=compute)})
    adapters = list(recipe.adapters)
    for i, adapter in enumerate(adapters):
        if adapter.compute == "auto":
            is_fixed = graph or not adapter.steps
            compute = {"compute": "float32" if is_fixed else auto_compute(device)}
            adapters[i] = adapter.model_copy(update=compute)
    return recipe.model_copy(update={"base": base, "adapters": adapters})


def is_foreign(recipe: Recipe, adapter: Adapter) -> bool:
    """Whether an adapter continues one from elsewhere, not another one of the job."""
    return adapter.continue_from is not None and recipe.predecessor(adapter) is None


def has_float_model(recipe: Recipe) -> bool:
    """Whether there is a float model to compare with, or only integers in a quantized format."""
    return fetch(recipe.model.source).holds_floats


def needs_moments(recipe: Recipe) -> bool:
    """Whether the initialization of an adapter needs second moments of the base's layers."""
    return any(adapter.init == "qera" for adapter in recipe.adapters)


def is_calibrated(recipe: Recipe) -> bool:
    """Whether quantizing the base, before it is tuned, needs calibration text."""
    named = {recipe.base.solver, *(rule.solver for rule in recipe.base.rules)}
    solvers = [solver for name, solver in SOLVERS.items() if name in named]
    is_read = needs_moments(recipe) or recipe.base.has_budget
    return is_read or any(solver.needs_calibration for solver in solvers)


def reads_base_text(recipe: Recipe) -> bool:
    """Whether quantizing or tuning the base needs calibration text."""
    return is_calibrated(recipe) or recipe.base.tuning.steps > 0


def sampled_sequences(recipe: Recipe) -> dict[int, int]:
    """How many sequences the float model writes for each part of `base.calibration`, by its number;
    none if nothing reads them."""
    base, adapters = recipe.base, recipe.adapters
    recovers = any(recovers_on_base_text(recipe, adapter) for adapter in adapters)
    if not recovers and not reads_base_text(recipe):
        return {}
    wanted = max(base.calibration_sequences, base.tuning.steps)
    share = wanted / sum(part.weight for part in base.calibration)
    return {
        number: min(_MOST_SAMPLED, math.ceil(share * part.weight))
        for number, part in enumerate(base.calibration)
        if part.text == MODEL
    }


def recovers_on_base_text(recipe: Recipe, adapter: Adapter) -> bool:
    """Whether an adapter for recovery is trained on the text that the base is calibrated on: if it
    has none of its own, and the job's is no part of that."""
    is_general = adapter.objective == "recovery" and adapter.data is None
    return is_general and all(part.text != JOB for part in recipe.base.calibration)


def is_compared(kind: str, other: str) -> bool:
    """Whether a model is compared with the float model on its own text, or on `other`."""
    return kind not in ("float", REFERENCE) and (not other or kind == "base")


def reference_stage(recipe: Recipe, adapter: Adapter) -> str | None:
    """The stage that trains an adapter on the float model, if the recipe asks for it. An adapter
    for recovery has none: its goal is the float model as it is."""
    is_trained = recipe.reference is not None and adapter.objective == "text"
    return f"train/{adapter.name}/float" if is_trained else None


def compared_with(recipe: Recipe, kind: str, adapter: Adapter | None) -> str | None:
    """The stage that trains what a model is compared with, unless that is the float model."""
    if adapter is None or kind not in ("adapted", "simulated"):
        return None
    return reference_stage(recipe, adapter)


def without_recovery(recipe: Recipe, adapter: Adapter) -> Adapter:
    """The adapter whose start `adapter` has on the float model: itself, or the first of those for
    recovery that it continues, since there is nothing to recover."""
    while (first := recipe.predecessor(adapter)) is not None and first.objective == "recovery":
        adapter = first
    return adapter
