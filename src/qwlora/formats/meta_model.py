"""Models built without data on the meta device, and the names of their tensors.

A tied tensor has several names. Code that loads a checkpoint or a base puts each tensor at all of
its names. Only buffers that are not stored in files (rotary frequencies, masks) have data from the
start.

A `LazyModel` loads and releases its modules one by one, to quantize models larger than memory.
Tensors are read one at a time, so the peak memory is what is loaded plus one tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
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

from qwlora.errors import GridError, SourceError, foreign_as, listed
from qwlora.formats.checkpoint import Checkpoint
from qwlora.grid.encoding import QuantizedTensor
from qwlora.nn import pack_at_, tie_weights_
from qwlora.nn.frozen import check_finite
from qwlora.system.device import CPU, moved
from qwlora.system.progress import Track, untracked


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


class LazyModel:
    """A model on the meta device whose modules are loaded from a checkpoint when they are needed.

    `model` is frozen and in evaluation mode; what is loaded is on `device`. Changes made between
    `materialize_` and `release_` persist: a layer that was replaced by a packed layer is not loaded
    or released again.

    Raises:
        SourceError: the configuration does not describe a causal language model, or tensors are
            missing or unknown (the message lists them).
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device = CPU):
        self.checkpoint, self.device = checkpoint, device
        self.model = empty_model(checkpoint.config)
        for module in self.model.modules():  # buffers that are in no file, such as frequencies
            values = {n: b for n, b in module._buffers.items() if b is not None and not b.is_meta}
            module._buffers.update(moved(values, device))
        read_generation_config_(self.model, checkpoint.path)
        self.aliases = tensor_names(self.model)
        first = {alias: name for name, aliases in self.aliases.items() for alias in aliases}
        # a tied tensor may be stored under any of its names
        self.stored = {first.get(name, name): name for name in checkpoint.names()}
        missing = self.aliases.keys() - self.stored.keys()
        unknown = self.stored.keys() - self.aliases.keys()
        if missing or unknown:
            raise SourceError(
                f"the files and config.json ({type(self.model).__name__}) do not match: missing: "
                f"{listed(sorted(missing))}; unknown to the model: {listed(sorted(unknown))}. "
                "Check that config.json belongs to this model, or download the model again"
            )

    def materialize_(self, path: str = "", track: Track = untracked) -> nn.Module:
        """Load all tensors in module `path` that have no data yet, and return the module.

        Floats become float32, integers packed layers, which may replace the module.

        Raises:
            SourceError: a tensor cannot be read, or its shape differs from its parameter's.
        """
        names = [n for n in self.stored if any(is_below(a, path) for a in self._waiting(n))]
        for name in track(names, "reading", len(names)):
            self.load_(name)
        return self.model.get_submodule(path)

    def load_outside_(self, paths: Collection[str]) -> None:
        """Load every tensor that is used outside the modules at `paths`, even if also used
        inside."""
        for name in self.stored:
            if not all(
                any(is_below(alias, path) for path in paths) for alias in self.aliases[name]
            ):
                self.load_(name)

    def release_(self, path: str = "") -> None:
        """Drop the data of float tensors that are used only in module `path`; packed layers
        stay."""
        for aliases in self.aliases.values():
            tensors = {a: t for a in aliases if (t := tensor_at(self.model, a)) is not None}
            if tensors and all(is_below(alias, path) for alias in tensors):
                put_(self.model, tensors, next(iter(tensors.values())).to("meta"))

    @contextmanager
    def one_block_at_a_time(self) -> Iterator[PreTrainedModel]:
        """The model, ready to run. Each block (see `blocks_of`) is loaded only while it runs;
        everything outside blocks stays loaded."""
        blocks = [
            path
            for path in blocks_of(self.model)
            if type(self.model.get_submodule(path)).forward is not nn.Module.forward
        ]
        self.load_outside_(blocks)
        with ExitStack() as stack:
            stack.callback(self.release_)
            for path in blocks:
                block = self.model.get_submodule(path)
                loading = block.register_forward_pre_hook(partial(self._load_block_, path))
                releasing = block.register_forward_hook(partial(self._release_block_, path))
                stack.callback(loading.remove)
                stack.callback(releasing.remove)
            yield self.model

    def _load_block_(self, path: str, *ignored: object) -> None:
        self.materialize_(path)

    def _release_block_(self, path: str, *ignored: object) -> None:
        self.release_(path)

    def _waiting(self, name: str) -> list[str]:
        """The names of a tensor that still exist in the model and have no data."""
        tensors = {alias: tensor_at(self.model, alias) for alias in self.aliases[name]}
        return [alias for alias, tensor in tensors.items() if tensor is not None and tensor.is_meta]

    def load_(self, name: str) -> None:
        """Load one parameter or buffer by name if it has no data yet; see `materialize_`."""
        aliases = self._waiting(name)
        if not aliases:
            return
        value = self.checkpoint.read(self.stored[name])
        if isinstance(value, QuantizedTensor):
            value = QuantizedTensor(value.codes.to(self.device), value.encoding.to(self.device))
            try:
                pack_at_(self.model, name, value)
            except GridError as error:
                raise SourceError(
                    f"{name} is {value.encoding.scheme} in the files and cannot be packed: {error}"
                ) from error
            if len(self.aliases[name]) > 1:
                tie_weights_(self.model)
            return
        expected = tensor_at(self.model, aliases[0])
        assert expected is not None
        if value.shape != expected.shape:
            raise SourceError(
                f"{name} has shape {list(value.shape)} in the files, but {list(expected.shape)} in "
                "the model that config.json describes; download the model again"
            )
        check_finite(name, value, allow_infinity=not isinstance(expected, nn.Parameter))
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        put_(self.model, aliases, value.to(self.device, dtype))
