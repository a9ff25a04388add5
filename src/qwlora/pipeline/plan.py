"""The plan of a job: its stages in order, and what each needs and depends on.

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

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from qwlora.adapter.covered_layers import is_covered
from qwlora.grid.scheme import RangeEstimator
from qwlora.pipeline.sources import Sources
from qwlora.pipeline.stage import (
    BASE_SIMULATION,
    CASES,
    FLOAT_ADAPTERS,
    SAMPLE,
    SAMPLED,
    SHARED,
    USE_CASES,
    ZERO,
    ZERO_ADAPTER,
    Stage,
)
from qwlora.quantize.solvers import REVISIONS, SOLVERS
from qwlora.recipe import Adapter, Data, Recipe
from qwlora.recipe.grid_sections import JOB
from qwlora.recipe.implied import (
    REFERENCE,
    compared_with,
    is_calibrated,
    is_compared,
    is_foreign,
    needs_moments,
    recovers_on_base_text,
    reference_stage,
    sampled_sequences,
    without_recovery,
)
from qwlora.system.parameter_names import BASE
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import PROOF

# Settings of an adapter that do not change the result. What it continues and its text are inputs of
# their own.
_WITHOUT_EFFECT = {
    *("name", "data", "continue_from", "unknown_base"),
    *("checkpoint_steps", "divergence", "report_to"),
}


def make_plan(recipe: Recipe, sources: Sources) -> list[Stage]:
    """All stages in the order of a full run.

    All stages of one adapter's simulation follow each other, while it is in memory.
    """
    plan = Planner(recipe, sources)
    calibration = map(recipe.calibration_texts, recipe.base.calibration)
    for data in (*recipe.base_texts(), *recipe.texts().values(), *chain(*calibration)):
        sources.text(data)  # an error is reported before the model's files are read
    targets = {name: TARGETS[name] for name in recipe.export.targets}
    with_cases = [name for name, target in targets.items() if target.has_cases]
    switched = [name for name, target in targets.items() if target.needs_zero_adapter]
    if sources.holds_floats:
        _add_evaluation(plan, "float")
    _add_sample(plan)
    _add_quantize(plan)
    _add_evaluation(plan, "base", "quantize")
    for name, target in targets.items():
        if target.has_base and name not in switched:
            _add_exported_base(plan, name, "quantize")
    if recipe.workflow == "qwa-lora":
        ranges = plan.ranges(recipe.base_texts(), plan.base_text)
        plan.add("calibrate-base", ranges, "quantize", artifact=BASE_SIMULATION)
    for adapter in recipe.adapters:
        is_imported = is_foreign(recipe, adapter) and adapter.unknown_base == "accept"
        if sources.holds_floats and is_imported:
            _add_evaluation(plan, "imported", adapter=adapter)
        _add_train(plan, adapter)
        if (reference := reference_stage(recipe, adapter)) is not None:
            _add_reference(plan, adapter, reference)
            _add_evaluation(plan, REFERENCE, reference, adapter=adapter)
    if plan.shares:
        trained = [f"train/{adapter.name}" for adapter in recipe.adapters]
        ranges = plan.ranges(recipe.texts().values())
        plan.add("calibrate", ranges, *trained, kind="calibrate/shared", artifact=SHARED)
    if switched:
        _add_zero_adapter(plan)
    for name in switched:
        _add_exported_base(plan, name, ZERO)
    for adapter in recipe.adapters:
        _add_evaluation(plan, "adapted", f"train/{adapter.name}", adapter=adapter)
        if recipe.is_simulated:
            _add_calibration(plan, adapter)
            _add_evaluation(plan, "simulated", f"calibrate/{adapter.name}", adapter=adapter)
        for name in targets:
            if name not in with_cases:
                _add_export(plan, name, adapter)
                _add_check(plan, name, adapter.name, [recipe.data_of(adapter)])
    for name in switched:  # last, so that a failure leaves nothing of the adapters undone
        text = plan.text(recipe.data_of(recipe.adapters[0]))
        inputs = {"verify": recipe.verify.model_dump(mode="json"), "texts": [text]}
        plan.add(f"verify/{name}", inputs, f"export/{name}")
    if with_cases:
        _add_calibrated_cases(plan)
    for name in with_cases:
        _add_exported_cases(plan, name)
        for case in recipe.use_cases():
            _add_check(plan, name, case, recipe.texts().values())
    return list(plan.stages.values())


class Planner:
    """Collects the stages of a recipe; a stage must be added after the stages that it needs."""

    def __init__(self, recipe: Recipe, sources: Sources):
        self.recipe, self.sources = recipe, sources
        self.shares = recipe.is_simulated and recipe.simulation.base_activations != "all"
        self.base_text = "base.calibrate_on" if recipe.base.calibrate_on else ""  # its key, if set
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
        labels = {"rotation": "base.rotation", "calibration": "base.calibration"}
        plain = _plain(inputs, "", labels)
        more["labels"] = labels | more.get("labels", {})
        self.stages[name] = Stage(name, kind or name, plain, by_name, **more)

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
            where = self.base_text if part.text == JOB else f"base.calibration.{number}.text"
            found = [self.text(data, where) for data in self.recipe.calibration_texts(part)]
            texts[str(number)] = {"weight": part.weight, "texts": found}
        return {"calibration": texts, "seed": self.recipe.seed}

    def text(self, data: Data, where: str = "", **counts: int) -> _Text:
        """A text as an input; see `Sources.text`.

        Args:
            where: the key that has its source. Default: that of the section that is `data`; of a
                text of several that the base is calibrated on, which is cut as the data section
                says, that of its adapter.
        """
        text, sections = _Text(self.sources.text(data, **counts)), {"data": self.recipe.data}
        sections |= {f"adapters.{a.name}.data": a.data for a in self.recipe.adapters if a.data}
        same = [name for name, section in sections.items() if section == data]
        source = [name for name, section in sections.items() if section.source == data.source]
        where = where or f"{[*same, *source, 'data'][0]}.source"
        text.labels = {"": [*same, "data"][0], ".source": where}
        return text

    def measured(self, data: Data) -> _Text:
        """The held-out part of a text."""
        return self.text(data, evaluation_sequences=data.evaluation_sequences)

    def shipped(self) -> dict[str, Any]:
        """What the text next to exported files depends on."""
        proof = {"proof": self.recipe.export.proof}
        return {"export": proof, "seed": self.recipe.seed, **_revisions("sampled_text")}

    def ranges(self, texts: Iterable[Data], where: str = "") -> dict[str, Any]:
        """Activation ranges that are measured on `texts`; `where` as for `text`."""
        section = self.recipe.simulation
        counts = [(data, data.calibration_sequences) for data in texts]
        counted = [self.text(data, where, calibration_sequences=count) for data, count in counts]
        observers = {section.observer, *(r.observer for r in section.rules if r.observer)}
        has_histogram = any(RangeEstimator(observer).needs_histogram for observer in observers)
        used = _revisions("activation_ranges") if has_histogram else {}
        without = {"percentile"} - observers
        settings = section.model_dump(mode="json", exclude=without)
        return {"simulation": settings, "texts": counted, **used}


def _revisions(*names: str) -> dict[str, Any]:
    """The revisions of algorithms that a stage runs."""
    return {"revisions": {name: REVISIONS[name] for name in names}}


def _labels_of(adapter: Adapter) -> dict[str, str]:
    """Where the recipe has the settings of an adapter."""
    where = f"adapters.{adapter.name}"
    return {"adapter": where, "start": where, "continue_from": f"{where}.continue_from"}


class _Text(dict[str, Any]):
    """A text among the inputs. `labels` says where its keys are in the recipe."""

    labels: dict[str, str]


def _plain(value: Any, path: str, labels: dict[str, str]) -> Any:
    """`value` as JSON reads it back; what is unread stays. Adds the labels of texts in it."""
    if isinstance(value, _Text):
        labels |= {f"{path}{key}": label for key, label in value.labels.items()}
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{path}.{k}".strip("."), labels) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}.{n}", labels) for n, item in enumerate(value)]
    return value


def _add_sample(plan: Planner) -> None:
    """Text of the float model, if the base is calibrated on some."""
    recipe = plan.recipe
    if counts := sampled_sequences(recipe):
        sampled = {
            str(n): {"sequences": count, "temperature": recipe.base.calibration[n].temperature}
            for n, count in counts.items()
        }
        tokens = {"sequence_tokens": recipe.data.sequence_tokens}
        inputs = {**plan.model, "calibration": sampled, "data": tokens, "seed": recipe.seed}
        from_ = "(sequences, from base.calibration_sequences or base.tuning.steps)"
        labels = {f"calibration.{n}.sequences": f"base.calibration.{n} {from_}" for n in sampled}
        plan.add(SAMPLE, inputs | _revisions("sampled_text"), artifact=SAMPLED, labels=labels)


def _add_quantize(plan: Planner) -> None:
    """The frozen base."""
    recipe, base, model = plan.recipe, plan.recipe.base, plan.recipe.model
    named = {base.solver, *(rule.solver for rule in base.rules)}
    used = [name for name in SOLVERS if name in named]
    without = {"tuning", "calibrate_on", "calibration", "rotation", *(SOLVERS.keys() - named)}
    without |= set() if is_calibrated(recipe) else {"calibration_sequences"}
    inputs = {**plan.model, "base": base.model_dump(mode="json", exclude=without)}
    if is_calibrated(recipe) or base.tuning.steps:
        inputs |= plan.calibration()
    used += ["layer_statistics"] * is_calibrated(recipe)
    if needs_moments(recipe):
        inputs["second_moments"] = True
        used.append("second_moments")
    if base.has_budget:
        inputs["schemes_to_choose_from"] = [*map(str, recipe.budget_schemes())]
        used.append("bit_budget")
    if base.tuning.steps:
        inputs["base"] |= {"tuning": base.tuning.model_dump(mode="json")}
        used.append("tune_scales")
    if model.encodings is not None:
        settings = model.model_dump(include={"keep_float", "block_order", "prefix"})
        inputs["model"] |= {"encodings": plan.sources.file(model.encodings), **settings}
    if recipe.data.chat_template is not None:  # exported too
        inputs["chat_template"] = plan.sources.file(recipe.data.chat_template)
    needs = [SAMPLE] * ("calibration" in inputs and SAMPLE in plan.stages)
    labels = {"chat_template": "data.chat_template", "second_moments": "adapters[].init"}
    labels["schemes_to_choose_from"] = "export.targets (schemes that base.bits chooses from)"
    inputs |= _revisions(*used)
    plan.add("quantize", inputs, *needs, artifact="base", labels=labels)


def _learned(plan: Planner, adapter: Adapter, start: Adapter) -> dict[str, Any]:
    """What an adapter learns from, and the files that `start` continues."""
    data, is_new = plan.recipe.data_of(adapter), plan.recipe.predecessor(start) is None
    text = plan.measured(data) if adapter.evaluation_steps else plan.text(data)
    inputs = {"text": text, "seed": plan.recipe.seed, "workflow": plan.recipe.workflow}
    if start.continue_from is not None and is_new:
        inputs["continue_from"] = plan.sources.adapter(start.continue_from)
    return inputs


def _add_train(plan: Planner, adapter: Adapter) -> None:
    """Train an adapter on the base."""
    recipe, name = plan.recipe, adapter.name
    first, has_init = recipe.predecessor(adapter), adapter.init != "zero"
    settings = adapter.model_dump(mode="json", exclude=_WITHOUT_EFFECT)
    settings["init_share"] = recipe.init_share(adapter) if has_init else None
    inputs = {"adapter": settings, **_learned(plan, adapter, adapter)}
    inputs |= _revisions("initialize_adapter") if has_init else {}
    needs = ["quantize", *([f"train/{first.name}"] if first else [])]
    needs += ["calibrate-base"] if recipe.workflow == "qwa-lora" else []
    if recovers_on_base_text(recipe, adapter):
        inputs |= plan.calibration()
        needs += [SAMPLE] * (SAMPLE in plan.stages)
    more: dict[str, Any] = {"adapter": name, "labels": _labels_of(adapter)}
    more["artifact"] = f"adapters/{name}"
    plan.add(f"train/{name}", inputs, *needs, kind="train", **more)


def _add_reference(plan: Planner, adapter: Adapter, stage: str) -> None:
    """It does not depend on the base."""
    recipe, start = plan.recipe, without_recovery(plan.recipe, adapter)
    without = {*_WITHOUT_EFFECT, "init", "init_share"}
    settings = [a.model_dump(mode="json", exclude=without) for a in (adapter, start)]
    inputs = {**plan.model, "adapter": settings[0], **_learned(plan, adapter, start)}
    inputs["start"] = settings[1]
    first, name = recipe.predecessor(start), adapter.name
    before = reference_stage(recipe, first) if first else None
    more = {"artifact": f"{FLOAT_ADAPTERS}/{name}", "labels": _labels_of(adapter)}
    needs = [before] if before else []
    plan.add(stage, inputs, *needs, kind="train/float", adapter=name, **more)


def _add_calibration(plan: Planner, adapter: Adapter) -> None:
    """If encodings are shared, the cost of sharing is measured on held-out text."""
    name, data = adapter.name, plan.recipe.data_of(adapter)
    inputs = plan.ranges([data])
    inputs |= {"held_out": plan.measured(data)} if plan.shares else {}
    more = {"adapter": name, "artifact": f"simulation/{name}"}
    needs = [f"train/{name}", *(["calibrate"] if plan.shares else [])]
    plan.add(f"calibrate/{name}", inputs, *needs, kind="calibrate", **more)


def _add_zero_adapter(plan: Planner) -> None:
    """It depends on the shape of the first adapter, and on which layers have one: another
    adapter of the same layers changes nothing. Of an adapter from elsewhere the recipe does not
    say the layers, but its files may."""
    recipe = plan.recipe
    first, *others = recipe.adapters
    new = [a.target_modules for a in recipe.adapters if not (a.continue_from or a.layers)]
    counted = [
        a for a in others if not (is_foreign(recipe, a) and is_covered(str(a.continue_from), new))
    ]
    counted.insert(0, first)
    layers = {a.model_dump_json(include={"target_modules", "layers"}) for a in counted}
    needs = ["quantize", *(f"train/{a.name}" for a in counted if is_foreign(recipe, a))]
    needs += ["calibrate-base"] if recipe.workflow == "qwa-lora" else []
    needs += ["calibrate"] if plan.shares else []
    shape = first.model_dump(include={"rank", "rank_pattern"})
    zero = {"adapter": shape, "layers": sorted(layers), "seed": recipe.seed}
    labels = {"adapter": f"adapters.{first.name}"}
    labels["layers"] = "adapters[].target_modules, layers"
    inputs = plan.ranges(recipe.base_texts(), plan.base_text) | zero
    plan.add(ZERO, inputs, *needs, artifact=ZERO_ADAPTER, labels=labels)


def _add_calibrated_cases(plan: Planner) -> None:
    """Files of use cases hold the names of adapters."""
    names = [adapter.name for adapter in plan.recipe.adapters]
    ranges = plan.ranges(plan.recipe.texts().values())
    inputs = {**ranges, "use_cases": plan.recipe.use_cases(), "adapters": names}
    needs = [f"calibrate/{name}" for name in names]
    labels = {"use_cases": "export.use_cases"}
    plan.add(CASES, inputs, *needs, artifact=USE_CASES, labels=labels)


def _add_evaluation(plan: Planner, kind: str, *needs: str, adapter: Adapter | None = None) -> None:
    """Add the stages of one model: `float`, `base`, `imported`, `reference`, `adapted` or
    `simulated`."""
    recipe, name = plan.recipe, None if adapter is None else adapter.name
    own = recipe.base_text() if adapter is None else recipe.data_of(adapter)
    inputs = plan.model if kind in ("float", "imported", REFERENCE) else {}
    inputs |= _revisions("token_scores")
    if kind == "imported" and adapter is not None:
        inputs["continue_from"] = plan.sources.adapter(str(adapter.continue_from))
    stage = f"evaluate/{kind}" if name is None else f"evaluate/{kind}/{name}"
    labels = _labels_of(adapter) if adapter else {}
    if own is not None:
        reference = compared_with(recipe, kind, adapter)
        against = [reference] if reference else []
        read = {**inputs, "text": plan.measured(own)}
        read |= {"reference": recipe.reference} if reference else {}
        more: dict[str, Any] = {"adapter": name, "labels": labels, "kind": f"evaluate/{kind}"}
        plan.add(stage, read, *needs, *against, **more)
    kinds = {"float", "base", *(["adapted"] if recipe.evaluate == "all" else [])}
    texts = recipe.texts() if kind in kinds else {}
    for text, data in texts.items() if len(texts) > 1 else ():
        if data != own:
            more = {"adapter": name, "text": text}
            read = {**inputs, "text": plan.measured(data), "kl": is_compared(kind, text)}
            plan.add(f"{stage}/on/{text}", read, *needs, kind=f"evaluate/{kind}/on", **more)


def _files(plan: Planner, target: str) -> dict[str, Any]:
    """What exported files depend on besides the tensors in them: the encodings version, the
    ONNX opset and the embedding bits; the sizes and layout of graphs with a cache; and which
    text the golden inputs are."""
    export, graphs = plan.recipe.export, plan.recipe.export.graphs_of(target)
    keys = {"encodings_version", "opset"} if TARGETS[target].opsets else set[str]()
    written = export.model_dump(include=keys)
    written["embedding_bits"] = export.embedding_bits_of(target)
    written |= {} if graphs is None else {"graphs": graphs.model_dump()}
    written |= {"layout": layout} if (layout := export.layout_of(target)) else {}
    shipped = plan.shipped() if TARGETS[target].has_golden else {}
    return {**shipped, "export": {**written, **shipped.get("export", {})}}


def _add_exported_base(plan: Planner, target: str, source: str) -> None:
    """The base, made from stage `source`."""
    artifact = f"export/{target}/{BASE}"
    plan.add(f"export/{target}", _files(plan, target), source, artifact=artifact)


def _add_export(plan: Planner, target: str, adapter: Adapter) -> None:
    """An adapter."""
    *base, stage = TARGETS[target].stages(target, adapter.name)
    source = "calibrate" if TARGETS[target].is_simulated else "train"
    needs = [*base, f"{source}/{adapter.name}"]
    more = {"adapter": adapter.name, "artifact": stage, "kind": f"export/{target}/adapter"}
    plan.add(stage, _files(plan, target), *needs, **more)


def _add_exported_cases(plan: Planner, target: str) -> None:
    """All use cases in one folder."""
    known, more = TARGETS[target], dict[str, Any](artifact=f"export/{target}")
    more |= {"missing": known.missing} if known.compilers else {}
    plan.add(f"export/{target}", _files(plan, target), CASES, **more)


def _add_check(plan: Planner, target: str, name: str, texts: Iterable[Data]) -> None:
    """Add the check of an adapter or use case. Whether its runtime is installed does not
    matter: a proof is of files, and one that was not run is no proof."""
    known, recipe = TARGETS[target], plan.recipe
    inputs: dict[str, Any] = {"verify": recipe.verify.model_dump(mode="json")}
    inputs["texts"] = [plan.text(text) for text in texts]
    inputs |= plan.shipped() if known.has_proof else {}
    inputs |= {"use_case": name} if known.has_cases else {}
    named = {"case" if known.has_cases else "adapter": name}
    artifact = f"export/{target}/{PROOF}/{name}" if known.has_proof else None
    more: dict[str, Any] = {**named, "artifact": artifact}
    more |= {"missing": known.missing} if known.has_proof else {}
    needs, kind = known.stages(target, name), f"verify/{target}/adapter"
    plan.add(f"verify/{target}/{name}", inputs, *needs, kind=kind, **more)
