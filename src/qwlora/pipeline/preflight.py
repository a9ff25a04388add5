"""Checks of text, model, grids, adapters and packages, before a job writes or computes anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qwlora.adapter.adapter_files import adapter_folder, read_config
from qwlora.adapter.adapter_folder import refuse_saved
from qwlora.adapter.padded_adapters import check_one_shape
from qwlora.adapter.train import check_loggers
from qwlora.data.sequences import check_isolation
from qwlora.errors import ExportError, GridError, SourceError, TrainingError
from qwlora.formats.base_files import read_record
from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint
from qwlora.formats.huggingface.model_config import check_positions
from qwlora.formats.model_source import fetch
from qwlora.pipeline.stages.job_context import JobContext
from qwlora.quantize.layer_rules import find_tensors, plan_layers
from qwlora.recipe import Recipe
from qwlora.recipe.implied import is_foreign, reads_base_text, sampled_sequences
from qwlora.recipe.model_files import check_source, exported_base, kept_weights, second_rounding
from qwlora.system.device import pick_device
from qwlora.system.machine import device_type, exact_type, slow_compute
from qwlora.system.parameter_names import is_factor_name, parameter_name
from qwlora.targets.refusals import AdapterParts, Subject, Weight, chip_notes, genie_notes, refuse
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import LayerKind
from qwlora.targets.weights.weights_folder import kind_of, layer_kind

Packed = Mapping[str, Weight]  # by the names of tensors that the base packs
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # of weights by name, by adapter


def preflight(context: JobContext, verbs: set[str], say: Callable[[str], None]) -> None:
    """Check everything that the stages of `verbs` need. Passes warnings and notes to `say`."""
    recipe, device = context.recipe, device_type(context.recipe.device)
    trained = [a for a in recipe.adapters if a.steps and "train" in verbs]
    # Files are written and run on the CPU, so a job from a GPU can be exported on any machine.
    if verbs - {"export", "verify"}:
        pick_device(recipe.device)
    if "quantize" in verbs:
        check_source(recipe)
        if note := second_rounding(recipe):
            say(f"warning: {note}")
    computes = {f"adapter {a.name}": (a.compute, device) for a in trained}
    if "quantize" in verbs and recipe.base.tuning.steps:
        computes = {"base.tuning": (recipe.base.tuning.compute, exact_type(device))} | computes
    for section, (compute, kind) in computes.items():
        if problem := slow_compute(compute, kind):
            say(f"warning: {section}: {problem}")
    texts = [*context.all_texts().values()]
    is_read = "quantize" in verbs and reads_base_text(recipe)
    for part in recipe.base.calibration if is_read else ():  # cut as the data section says
        texts += map(context.prepared, recipe.calibration_texts(part))
    largest = max(text.largest_id() for text in texts)
    is_packed = any(text.train.position_ids is not None for text in texts)
    if "train" in verbs:
        shapes = _adapter_shapes(context)
        if recipe.workflow == "qwa-lora" and is_packed:
            raise TrainingError(
                "workflow qwa-lora: data.packing documents packs several documents into a "
                "sequence, but the graph cannot mask attention between them. Use join or none"
            )
        for adapter in trained if recipe.workflow == "qwa-lora" else ():
            source = recipe.root(adapter).continue_from
            if source and (dropout := read_config(adapter_folder(source)).get("lora_dropout")):
                say(
                    f"adapter {adapter.name}: {source} has dropout {dropout:g}; "
                    "workflow qwa-lora trains without dropout"
                )
    if "quantize" in verbs:
        model, packed = _unquantized(context)
    else:
        # The base exists already: its record has the names, and no weights are needed.
        layers, model = read_record(context.path / "base")["layers"], context.skeleton()
        packed = {n: Weight(None, None, kind_of(model, n)) for n in map(parameter_name, layers)}
    if note := check_positions(model, max(t.positions() for t in texts)):
        say(note)
    if verbs & {"quantize", "export"}:
        table = model.get_input_embeddings()
        path = next(name for name, module in model.named_modules() if module is table)
        is_packed_table = "quantize" not in verbs or f"{path}.weight" in packed
        subject = replace(
            exported_base(recipe, packed),
            float_embedding=None if is_packed_table else path,
            model=model,
            tokenizer=context.tokenizer,
        )
        refuse(recipe.export.targets, subject, GridError)
        for note in (*chip_notes(subject, recipe.export.targets), *genie_notes(subject)):
            say(f"warning: {note}")
    if "train" in verbs:
        _check_saved(recipe, model, packed)
        check_places(recipe, shapes, context.skeleton())
    if "export" in verbs:
        for name in recipe.export.targets:
            TARGETS[name].require_packages(to_write=True)
    if context.why_loaded_whole is not None:
        say(
            "the whole model is loaded at once, which takes more memory: "
            f"{context.why_loaded_whole}"
        )
    if "quantize" not in verbs:
        return
    if recipe.base.tuning.steps:
        _check_tuning(context, model, packed)
    embedding: Any = model.get_input_embeddings()
    if largest >= (known := embedding.weight.shape[0]):
        raise SourceError(
            f"the tokenizer of {recipe.model.source!r} produces token id {largest}, "
            f"but the model has only {known} tokens; use the tokenizer of this model"
        )
    # No model class tells whether it keeps documents apart, so each one is tried
    # (docs/log/data.md). With solver keep there is no float model; training tries the base.
    if is_packed and recipe.base.solver != "keep":
        if context.lazy is None or context.holds_float_model:
            check_isolation(context.float_model())
        else:
            with context.lazy.one_block_at_a_time() as passing:
                check_isolation(passing)


def _unquantized(context: JobContext) -> tuple[PreTrainedModel, Packed]:
    base = context.recipe.base
    if base.solver == "keep":
        return kept_weights(context.recipe)
    location = fetch(context.recipe.model.source)
    if context.lazy is not None:
        model = context.lazy.model
    elif location.gguf_file and base.rotation is None:
        # Names and shapes suffice here: loading SmolLM2's values takes 45 s (docs/log/plan.md).
        model = GgufCheckpoint(location.path, as_floats=True).model
    else:
        model = context.float_model()
    plan = plan_layers(model, base.scheme, base.solver, base.layer_rules())
    return model, {n: Weight(a.scheme, a.solver, kind_of(model, n)) for n, a in plan.items()}


def _check_tuning(context: JobContext, model: PreTrainedModel, packed: Packed) -> None:
    # Text of the float model does not exist yet, but there will be enough of it.
    is_sampled = sampled_sequences(context.recipe)
    if not is_sampled and (count := len(context.base_calibration_ids(2))) < 2:
        raise SourceError(
            f"base.tuning needs at least 2 training sequences, but the text gives {count}; use "
            "more text, or set base.tuning.steps: 0"
        )
    if not any(
        type(module) in (nn.Linear, Conv1D) and f"{path}.weight" in packed
        for path, module in model.named_modules()
    ):
        raise GridError(
            "base.tuning trains the scales of packed layers of class Linear or Conv1D, but the "
            "recipe packs none; set base.tuning.steps: 0"
        )


def _check_saved(recipe: Recipe, model: PreTrainedModel, packed: Packed) -> None:
    # PEFT saves a full copy of trained heads and embeddings, which cannot replace packed ones.
    foreign = [adapter for adapter in recipe.adapters if is_foreign(recipe, adapter)]
    tensors = find_tensors(model).items() if foreign else ()
    paths = [path for name, tensor in tensors if name in packed for path in tensor.paths]
    for adapter in foreign:
        source = str(adapter.continue_from)
        refuse_saved(adapter_folder(source), paths, f"adapter {adapter.name}: {source!r}")


def _adapter_shapes(context: JobContext) -> Shapes:
    """Check that adapters fit the model and each other; the shapes of those that continue none."""
    recipe, shapes = context.recipe, dict[str, dict[str, tuple[int, ...]]]()
    for adapter in recipe.adapters:
        check_loggers(adapter.report_to)
        try:
            if recipe.predecessor(adapter) is None:
                shapes[adapter.name] = context.checked_shapes(adapter)
        except (TrainingError, SourceError) as error:
            raise type(error)(f"adapter {adapter.name}: {error}") from error
    if recipe.simulation.base_activations == "none":
        check_one_shape(shapes, any(adapter.target_parameters for adapter in recipe.adapters))
    return shapes


def check_places(recipe: Recipe, shapes: Shapes, skeleton: PreTrainedModel) -> None:
    """Check that the targets have a place for everything that adapters change. Raises ExportError
    for more than LoRA factors, TrainingError for factors of other than linear layers."""
    kinds = {path: layer_kind(module) for path, module in skeleton.named_modules()}
    linear = {p for p, kind in kinds.items() if kind in (LayerKind.LINEAR, LayerKind.CONV1D)}
    others, places = list[AdapterParts](), list[AdapterParts]()
    for name, weights in shapes.items():
        others.append(AdapterParts(name, [n for n in weights if not is_factor_name(n)]))
        paths = {n.removeprefix("base_model.model.").partition(".lora_")[0] for n in weights}
        places.append(AdapterParts(name, places=sorted(paths - linear)))
    refuse(recipe.export.targets, Subject(adapters=others), ExportError)
    refuse(recipe.export.targets, Subject(adapters=places), TrainingError)
