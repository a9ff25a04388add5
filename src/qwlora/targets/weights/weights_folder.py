"""What the folders of all weights targets hold: float tensors, configuration, tokenizer."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from qwlora.errors import ExportError, QwloraWarning, lines
from qwlora.grid.scheme import Blocks
from qwlora.nn.packed_layer import PackedEmbedding, PackedLayer, PackedLinear, packed_weights
from qwlora.system import strict_json
from qwlora.targets.proof.contents import NUMBER, OTHER_KEYS, PLAIN, known_settings
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import LayerKind

ROPE_FORM = {
    "rope_scaling": {"rope_type": PLAIN, "type": PLAIN, OTHER_KEYS: object},
    **dict.fromkeys(("rope_theta", "rope_local_base_freq", "partial_rotary_factor"), NUMBER),
}


def layers_to_write(model: PreTrainedModel) -> dict[str, PackedLayer]:
    """Packed layers by the name of their weight, without output heads that share an embedding."""
    return {name: layer for name, layer in packed_weights(model).items() if not layer.is_tied}


def held_layers(
    name: str, model: PreTrainedModel, sizes: Sequence[int] = ()
) -> dict[str, PackedLayer]:
    """`layers_to_write`, if target `name` holds integers of their kinds and schemes, in blocks of
    one of `sizes`, if given.

    Raises:
        ExportError: it does not; all layers are listed.
    """
    target, layers, problems = TARGETS[name], layers_to_write(model), list[str]()
    for path, layer in layers.items():
        problem = target.kind_problem(layer_kind(layer))
        if not (isinstance(layer, PackedEmbedding) and target.writes_float_embeddings):
            problem = problem or target.scheme_problem(layer.scheme)
        if problem := problem or (width_problem(layer, sizes) if sizes else None):
            problems.append(f"{path}: {problem}")
    refuse(name, problems)
    return layers


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
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in inside:
            tensors.setdefault(id(tensor), (name, tensor.detach()))
    return dict(tensors.values())


def as_float16(values: Tensor) -> Tensor:
    """Scales or offsets as float16.

    Raises:
        ExportError: a value is not a float16.
    """
    half = values.half()
    if inexact := int((half.float() != values).sum()):
        raise ExportError(
            f"{inexact:,} of {values.numel():,} scales or offsets are not exact in float16, which "
            "the files need. Solvers gptq, search and sqnr round the scales of blocks to float16, "
            "rtn and coarser grids do not"
        )
    return half


def largest_group(layer: PackedLayer, sizes: Sequence[int]) -> int | None:
    """The first of `sizes` whose groups cross no block of the grid and fill the rows; None if there
    is none."""
    granularity, columns = layer.scheme.granularity, layer.tensor.shape[-1]
    block = granularity.size if isinstance(granularity, Blocks) else columns
    return next((size for size in sizes if block % size == 0 and columns % size == 0), None)


def width_problem(layer: PackedLayer, sizes: Sequence[int]) -> str | None:
    """Why there is no `largest_group`; None if there is one."""
    if largest_group(layer, sizes) is not None:
        return None
    columns = layer.tensor.shape[-1]
    return f"{layer.scheme}: {columns} inputs do not divide into blocks of {sizes[-1]}"


def refuse(target: str, problems: list[str]) -> None:
    """Raise one error about all layers that a target cannot hold.

    Raises:
        ExportError: there are problems.
    """
    if problems:
        shown = "\n  ".join(lines(problems))
        raise ExportError(f"{target} cannot hold {len(problems)} layers of this base:\n  {shown}")


def rotations(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rotary settings of layers with full attention, and of those with a window if these differ."""
    settings = getattr(config, "rope_parameters", None) or {}
    return settings.get("full_attention", settings), settings.get("sliding_attention", {})


def rope_settings(model: PreTrainedModel) -> dict[str, Any]:
    """Rotary settings for the top level of config.json, where mlx-lm 0.32 and transformers 4 read
    them, and else silently take their defaults; transformers 5 writes rope_parameters."""
    (whole, local), top = rotations(model.config), ("rope_theta", "partial_rotary_factor")
    settings = {key: whole[key] for key in top if key in whole}
    if (kind := whole.get("rope_type", "default")) != "default":
        scaling = {key: value for key, value in whole.items() if key not in top}
        settings["rope_scaling"] = {**scaling, "type": kind}  # "type" in older releases
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    tensors: Mapping[str, Tensor],
    changes: Mapping[str, Any],
) -> None:
    """Write a Hugging Face folder.

    Args:
        tensors: every tensor of the model's files.
        changes: keys to set in config.json.
    """
    save_torch_state_dict(dict(tensors), folder)
    config: Any = copy.deepcopy(model.config)
    config.dtype, config.architectures = model.dtype, [type(model).__name__]
    if "quantization_config" in vars(config):
        del config.quantization_config
    config.save_pretrained(folder)
    write_settings(model, tokenizer, folder, changes)


def write_settings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Write the generation settings and the tokenizer next to config.json, and leave out settings
    that are text and that transformers does not know: runtimes may take one for a file to load.

    Args:
        changes: keys to set in config.json.
    """
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name, changed in (("config.json", changes or {}), ("generation_config.json", {})):
        if (folder / name).is_file():
            content = {**json.loads((folder / name).read_text()), **changed}
            content.pop("transformers_weights", None)
            known = known_settings(content, changed)
            (folder / name).write_text(strict_json.dumps(known, indent=2) + "\n")
