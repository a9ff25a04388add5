"""Models built without data on the meta device, and the names of their tensors.

A tied tensor has several names. Code that loads a checkpoint or a base puts each tensor at all of
its names. Only buffers that are not stored in files (rotary frequencies, masks) have data from the
start.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from qwlora.errors import SourceError, foreign_as


def empty_model(
    config: PretrainedConfig,
    trust_remote_code: bool = False,
    class_name: str | None = None,
    buffers: bool = True,
) -> PreTrainedModel:
    """As `build_model`, but without data: frozen, in evaluation mode, weights tied.

    Args:
        buffers: give data to buffers that are not stored; False is enough for names and shapes.
    """
    with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
        model = build_model(config, trust_remote_code, class_name)
    model.tie_weights()
    return model.requires_grad_(False).eval()


def build_model(
    config: PretrainedConfig, trust_remote_code: bool = False, class_name: str | None = None
) -> PreTrainedModel:
    """Build the model of `config` on the current device, with random weights.

    Args:
        config: the configuration.
        trust_remote_code: allow code from the folder of the configuration.
        class_name: a model class of transformers; default: the causal language model of the
            configuration.

    Raises:
        SourceError: no such model can be built from the configuration.
    """
    named: Any = getattr(transformers, str(class_name), None)
    is_model = isinstance(named, type) and issubclass(named, PreTrainedModel)
    if class_name is not None and not is_model:
        raise SourceError(
            f"transformers {transformers.__version__} has no model class {class_name!r}; "
            "install the version that the model was saved with"
        )
    settings: dict[str, Any] = {"dtype": torch.float32}
    what = f"config.json ({type(config).__name__}) does not describe a causal language model"
    with foreign_as(SourceError, what):  # bad values can fail anywhere in a model class
        if is_model:
            return named._from_config(config, **settings)
        settings["trust_remote_code"] = trust_remote_code
        return auto_class(config).from_config(config, **settings)


def auto_class(config: PretrainedConfig) -> Any:
    """What loads the model of `config`: a language model, or one that reads images too. Where
    transformers has both (Llama 4), the configuration names the class."""
    is_language_model = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    reads_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if reads_images and is_language_model:
        kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        is_language_model = kind.__name__ not in (config.architectures or ())
    is_vision_language = reads_images and not is_language_model
    return AutoModelForImageTextToText if is_vision_language else AutoModelForCausalLM


def blocks_of(model: nn.Module) -> list[str]:
    """The paths of a model's blocks: the members of its outermost `ModuleList`s."""
    blocks: list[str] = []
    for path, module in model.named_modules():  # outer lists come before nested ones
        if isinstance(module, nn.ModuleList) and not any(
            path.startswith(f"{block}.") or path == block for block in blocks
        ):
            blocks += [f"{path}.{name}" if path else name for name, _ in module.named_children()]
    return blocks


def tensor_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter and saved buffer, by its first name."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        saved = {
            key: buffer
            for key, buffer in module._buffers.items()
            if key not in module._non_persistent_buffers_set
        }
        for key, tensor in (module._parameters | saved).items():
            if tensor is not None:
                names.setdefault(id(tensor), []).append(f"{path}.{key}" if path else key)
    return {of_tensor[0]: of_tensor for of_tensor in names.values()}


def is_below(name: str, path: str) -> bool:
    """Whether a tensor is in the module at `path`; the empty path contains every tensor."""
    return not path or name.startswith(f"{path}.")


def tensor_at(model: nn.Module, name: str) -> Tensor | None:
    """The tensor of a name; None if its module was replaced and has no such tensor."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    parameter = module._parameters.get(key)
    return parameter if parameter is not None else module._buffers.get(key)


def put_(model: nn.Module, names: Iterable[str], tensor: Tensor) -> None:
    """Put one tensor at all of its names, as a frozen parameter where the module has a
    parameter."""
    parameter: nn.Parameter | None = None
    for name in names:
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if key in module._parameters:
            if parameter is None:
                parameter = nn.Parameter(tensor, requires_grad=False)
            module._parameters[key] = parameter
        else:
            module._buffers[key] = tensor


def read_generation_config_(model: PreTrainedModel, folder: Path) -> None:
    """Give the model the generation_config.json in `folder`, if there is one."""
    path = folder / "generation_config.json"
    if path.is_file():
        with foreign_as(SourceError, f"{str(path)!r} cannot be read", "correct it, or remove it"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
