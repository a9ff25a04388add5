"""Models built without data on the meta device, and the places of their tensors.

A place is a module path and the key of a parameter or buffer there; a tied tensor has several
places. Code that loads a checkpoint or a base puts each tensor at all of its places. Only buffers
that are not stored in files (rotary frequencies, masks) have data from the start.
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
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from qwlora.errors import SourceError, foreign_as

MOST_BUFFER_BYTES = 2**28

Place = tuple[str, str]
"""Path of a module, and the key of its parameter or buffer."""


def empty_model(
    config: PretrainedConfig,
    trust_remote_code: bool = False,
    kind: str | None = None,
) -> PreTrainedModel:
    """Build the model of `config` without data: frozen, in evaluation mode, weights tied.

    Args:
        config: the configuration.
        trust_remote_code: allow code from the folder of the configuration.
        kind: the name of a model class of transformers; default: a causal language model.

    Raises:
        SourceError: no such model can be built from the configuration, or its buffers would fill
            the memory.
    """
    _check_buffers(meta_model(config, trust_remote_code, kind))
    with init_empty_weights(include_buffers=False):
        model = build_model(config, trust_remote_code, kind)
    model.tie_weights()
    return model.requires_grad_(False).eval()


def meta_model(
    config: PretrainedConfig,
    trust_remote_code: bool = False,
    kind: str | None = None,
) -> PreTrainedModel:
    """As `empty_model`, but buffers have no data either; enough for names and shapes.

    Raises:
        SourceError: no such model can be built from the configuration.
    """
    with torch.device("meta"):
        model = build_model(config, trust_remote_code, kind)
    model.tie_weights()
    return model


def build_model(
    config: PretrainedConfig, trust_remote_code: bool = False, kind: str | None = None
) -> PreTrainedModel:
    """Build the model of `config` on the current device, with random weights.

    Args:
        config: the configuration.
        trust_remote_code: allow code from the folder of the configuration.
        kind: the name of a model class of transformers; default: a causal language model.

    Raises:
        SourceError: no such model can be built from the configuration.
    """
    try:
        model: PreTrainedModel
        if kind is None:
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        else:
            model = _class_named(kind)._from_config(config, dtype=torch.float32)
    except SourceError:
        raise
    except Exception as error:  # bad values can fail anywhere in a model class
        raise SourceError(
            f"config.json ({type(config).__name__}) does not describe a causal language model: "
            f"{error or type(error).__name__}"
        ) from error
    return model


def _class_named(kind: Any) -> type[PreTrainedModel]:
    """The model class of transformers with this name."""
    found = getattr(transformers, kind, None) if isinstance(kind, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise SourceError(
            f"transformers {transformers.__version__} has no model class {kind!r}; install the "
            "version that the model was saved with"
        )
    return found


def blocks_of(model: nn.Module) -> list[str]:
    """The paths of a model's blocks: the members of its outermost `ModuleList`s."""
    found: list[str] = []
    for path, module in model.named_modules():  # outer lists come before nested ones
        if isinstance(module, nn.ModuleList) and not any(
            path.startswith(f"{block}.") or path == block for block in found
        ):
            found += [f"{path}.{name}" if path else name for name, _ in module.named_children()]
    return found


def tensor_places(model: nn.Module) -> dict[str, list[Place]]:
    """The places of each parameter and saved buffer, by the name of its first place."""
    places: dict[int, list[Place]] = {}
    for path, module in model.named_modules():
        saved = {
            key: buffer
            for key, buffer in module._buffers.items()
            if key not in module._non_persistent_buffers_set
        }
        for key, tensor in (module._parameters | saved).items():
            if tensor is not None:
                places.setdefault(id(tensor), []).append((path, key))
    return {place_name(found[0]): found for found in places.values()}


def place_name(place: Place) -> str:
    """The name of the tensor at this place."""
    return ".".join(filter(None, place))


def is_below(place: Place, path: str) -> bool:
    """Whether a place is in the module at `path`; the empty path contains every place."""
    return not path or place[0] == path or place[0].startswith(f"{path}.")


def tensor_at(model: nn.Module, place: Place) -> Tensor | None:
    """The tensor at a place; None if the module there was replaced and has no such tensor."""
    path, key = place
    module = model.get_submodule(path)
    found = module._parameters.get(key)
    return found if found is not None else module._buffers.get(key)


def put_(model: nn.Module, places: Iterable[Place], tensor: Tensor) -> None:
    """Put one tensor at all of its places, as a frozen parameter where the module has a
    parameter."""
    parameter: nn.Parameter | None = None
    for path, key in places:
        module = model.get_submodule(path)
        if key in module._parameters:
            parameter = (
                nn.Parameter(tensor, requires_grad=False) if parameter is None else parameter
            )
            module._parameters[key] = parameter
        else:
            module._buffers[key] = tensor


def read_generation_config_(model: PreTrainedModel, folder: Path) -> None:
    """Give the model the generation_config.json in `folder`, if there is one.

    Raises:
        SourceError: transformers cannot read it.
    """
    path = folder / "generation_config.json"
    if path.is_file():
        with foreign_as(SourceError, f"{str(path)!r} cannot be read", "correct it, or remove it"):
            model.generation_config = GenerationConfig.from_pretrained(folder)


def _check_buffers(model: nn.Module) -> None:
    """Refuse a model whose buffers would fill the memory; they are allocated from config.json
    alone."""
    for name, buffer in model.named_buffers():
        if buffer.nbytes > MOST_BUFFER_BYTES:
            raise SourceError(
                f"config.json asks for a buffer {name} of shape {list(buffer.shape)}, larger than "
                "in any real model. It is damaged; download the model again"
            )
