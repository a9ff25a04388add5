"""What the folders of all weights targets hold: float tensors, configuration, tokenizer."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qwlora.errors import ExportError, QwloraWarning
from qwlora.formats.checkpoint import tensor_names
from qwlora.nn.packed_layer import PackedLayer, PackedLinear, packed_weights
from qwlora.system import strict_json
from qwlora.targets.proof.contents import NUMBER, OTHER_KEYS, PLAIN, SETTINGS, known_settings
from qwlora.targets.refusals import Subject, Weight, refuse
from qwlora.targets.target import ExportedBase, LayerKind

ROPE_FORM = {
    "rope_scaling": {"rope_type": PLAIN, "type": PLAIN, OTHER_KEYS: object},
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "partial_rotary_factor"), NUMBER),
}


def layers_to_write(model: PreTrainedModel) -> dict[str, PackedLayer]:
    """Packed layers by the name of their weight, without output heads that share an embedding."""
    return {name: layer for name, layer in packed_weights(model).items() if not layer.is_tied}


def check_layers(target: str, layers: Mapping[str, PackedLayer]) -> None:
    """Check that a target can hold packed layers, by name; an ExportError lists all reasons."""
    weights = dict[str, Weight]()
    for name, layer in layers.items():
        solver = None if layer.encoding.fits_float16 else "keep"
        kind, columns = layer_kind(layer), layer.tensor.shape[-1]
        weights[name] = Weight(layer.scheme, solver, kind, columns)
    refuse([target], Subject(weights=weights), ExportError)


def kind_of(model: nn.Module, weight: str) -> LayerKind:
    """What a weight, by its name, is part of."""
    return layer_kind(model.get_submodule(weight.rpartition(".")[0]))


def layer_kind(module: nn.Module) -> LayerKind:
    """What a layer is, packed or not."""
    if isinstance(module, Conv1D) or (isinstance(module, PackedLinear) and module.was_conv1d):
        return LayerKind.CONV1D
    if isinstance(module, nn.Linear):
        return LayerKind.LINEAR
    return LayerKind.EMBEDDING if isinstance(module, nn.Embedding) else LayerKind.OTHER


def float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and saved buffers that are not part of a packed weight."""
    inside = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, PackedLayer)
        for name in module.state_dict()
        if name != "bias"
    }
    # of tied parameters, which are one tensor under several names, the first name is kept
    first, tensors = tensor_names(model).keys() - inside, model.state_dict()
    return {name: tensor for name, tensor in tensors.items() if name in first}


def rotations(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rotary settings of layers with full attention, and of those with a window if these differ."""
    settings = getattr(config, "rope_parameters", None) or {}
    return settings.get("full_attention", settings), settings.get("sliding_attention", {})


def rope_settings(model: PreTrainedModel) -> dict[str, Any]:
    """Rotary settings for the top level of config.json."""
    # transformers 5 writes rope_parameters. mlx-lm 0.32 and transformers 4 read the top level, and
    # silently take their defaults if nothing is there.
    (whole, local), top = rotations(model.config), ("rope_theta", "partial_rotary_factor")
    settings = {key: whole[key] for key in top if key in whole}
    if (kind := whole.get("rope_type", "default")) != "default":
        scaling = {key: value for key, value in whole.items() if key not in top}
        # older releases of transformers call rope_type "type"
        settings["rope_scaling"] = {**scaling, "type": kind}
    if local:
        settings["rope_local_base_freq"] = local["rope_theta"]
    return settings


def warn_of_window(config: Any, program: str, remedy: str) -> None:
    """Warn if layers attend to a window that sequences can exceed, and in `program` to all tokens.
    `remedy` may have a {} for the window's size."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if "sliding_attention" in kinds and 0 < window < config.max_position_embeddings:
        where = f"layers of this model attend to the last {window} tokens, in {program} to all"
        text = f"{where}: outputs differ beyond them. {remedy.format(window)}"
        warnings.warn(text, QwloraWarning, stacklevel=4)


def write_folder(
    exported: ExportedBase, folder: Path, tensors: Mapping[str, Tensor], changes: Mapping[str, Any]
) -> None:
    """Write a Hugging Face folder of `tensors`, with some keys of config.json changed."""
    save_torch_state_dict(dict(tensors), folder)
    model, config = exported.model, copy.deepcopy(exported.model.config)
    config.dtype, config.architectures = model.dtype, [type(model).__name__]
    # of the model's source; what the folder has is in `changes`
    if "quantization_config" in vars(config):
        del config.quantization_config
    write_settings(exported, config, folder, changes)


def write_settings(
    exported: ExportedBase, config: Any, folder: Path, changes: Mapping[str, Any] | None = None
) -> None:
    """Write the configuration with some `changes`, the generation settings and the tokenizer."""
    config.save_pretrained(folder)
    if exported.model.can_generate() and exported.model.generation_config is not None:
        exported.model.generation_config.save_pretrained(folder)
    if exported.tokenizer is not None:
        exported.tokenizer.save_pretrained(folder)
    for name, changed in zip(SETTINGS, (changes or {}, {}), strict=True):
        if (folder / name).is_file():
            content = {**json.loads((folder / name).read_text()), **changed}
            content.pop("transformers_weights", None)
            # no text that transformers does not know: runtimes may take it for a file to load
            settings = known_settings(content, changed)
            (folder / name).write_text(strict_json.dumps(settings, indent=2) + "\n")
