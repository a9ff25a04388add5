"""Base classes of all checkpoint readers: tensors by Hugging Face parameter name, one at a time.

A tensor that is stored as integers is read as a `QuantizedTensor`, any other as a float tensor. A
reader loads a tensor only when it is asked for, so the whole model is never in memory as floats.

An `Origin` says which stored tensors make up a parameter, and how. A reader finds the origins, and
`MappedCheckpoint` compares them with the model: no parameter may be missing, and copies of a tied
tensor must be equal.

A `LazyModel` loads and releases the modules of a model one by one, to quantize models larger than
memory. Models are built without data, on the meta device. A tied tensor has several names, and code
that loads a checkpoint or a base puts it at all of them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
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
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Split,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from qwlora.errors import GridError, SourceError, foreign_as, listed
from qwlora.grid.encoding import Encoding, QuantizedTensor
from qwlora.grid.scheme import (
    Blocks,
    Granularity,
    PerBlock,
    PerChannel,
    PerTensor,
    Scheme,
    SignedBlock,
)
from qwlora.nn.frozen import check_finite
from qwlora.nn.packed_layer import pack_at_, tie_weights_
from qwlora.system.device import CPU, moved
from qwlora.system.progress import Track, untracked

# Each of them moves whole rows, and a row keeps its codes, scales and offsets together. So it may
# run on the codes, the scales and the offsets of an integer tensor separately.
ROW_OPERATIONS = (Chunk, Concatenate, MergeModulelist, Split)


class Checkpoint(ABC):
    """The stored tensors of one model.

    Attributes:
        config: the Hugging Face configuration, without its `quantization_config`.
        path: the file, or the folder of the files, which may also hold a generation_config.json.
    """

    config: PretrainedConfig
    path: Path

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Parameter names of the model that `config` builds, tied tensors once, in the model's
        order if that is known."""

    @abstractmethod
    def read(self, name: str) -> Tensor | QuantizedTensor:
        """Read one tensor, as integers `[out, in]` if it is stored as integers.

        Raises:
            SourceError: the tensor cannot be read, or no `Encoding` can express how it is stored.
                The message names the tensor and the format.
        """

    def __repr__(self) -> str:
        kind, model, count = type(self).__name__, self.config.model_type, len(self.names())
        return f"{kind} of {model} with {count} tensors in {str(self.path)!r}"


@dataclass(frozen=True)
class Origin:
    """The stored tensors of one parameter, and the conversion to it.

    Args:
        convert_all: makes this parameter, and maybe others, from the stored tensors, by name.
        operations: the steps of the conversion; empty if the parameter is stored as it is.
        shape: of the parameter, if it is known without reading.
    """

    target: str
    sources: tuple[str, ...]
    convert_all: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    operations: tuple[Any, ...] = ()
    shape: tuple[int, ...] | None = None

    def convert(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The parameter made from the stored tensors, by name."""
        return self.convert_all(tensors)[self.target]


class MappedCheckpoint(Checkpoint):
    """Base class; a subclass sets `model`, the model of the configuration without data, calls
    `_place_`, and implements `_converted`."""

    model: PreTrainedModel
    described_in = "config.json"  # says what the model is

    def names(self) -> list[str]:
        return list(self._origins)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        # Some writers store a tied tensor under each of its names. If the copies differ, using the
        # first would silently change the model.
        first, *copies = [self._converted(origin) for origin in self._origins_of(name)]
        if any(not _same(first, copy) for copy in copies):
            aliases = " and ".join(repr(origin.target) for origin in self._origins[name])
            raise self._error(
                f"{self.described_in} ties {aliases}, but the files hold different "
                "values for them. Set tie_word_embeddings to false in config.json"
            )
        return first

    def stored_names(self, name: str) -> list[str]:
        """The stored tensors of one parameter: several if its parts (experts) are separate."""
        return [stored for origin in self._origins_of(name) for stored in origin.sources]

    @property
    def origins(self) -> list[Origin]:
        return [origin for copies in self._origins.values() for origin in copies]

    @abstractmethod
    def _converted(self, origin: Origin) -> Tensor | QuantizedTensor:
        """A parameter, made from its stored tensors."""

    def _error(self, problem: str) -> SourceError:
        return SourceError(f"{str(self.path)!r}: {problem}")

    def _origins_of(self, name: str) -> list[Origin]:
        if name not in self._origins:
            raise self._error(
                f"{name!r} is not a parameter of {type(self.model).__name__} (use the first name "
                "of tied parameters)"
            )
        return self._origins[name]

    def _place_(self, origins: Mapping[str, Origin], unknown: list[str]) -> None:
        """Put the origins in the model's order, under the first name of each parameter. Refuse
        unknown stored tensors and missing parameters."""
        kind = f"{type(self.model).__name__}, which {self.described_in} describes"
        if unknown:
            raise self._error(
                f"{_listed(unknown)} in the files, but not in {kind}. Either it belongs to another "
                "model, or the model needs a newer transformers"
            )
        self._origins = {
            first: [origins[name] for name in names if name in origins]
            for first, names in tensor_names(self.model).items()
        }
        if missing := [name for name, copies in self._origins.items() if not copies]:
            raise self._error(
                f"{_listed(missing)} missing from the files, but needed by {kind}; download the "
                "model again"
            )


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
        # One thread: tensors arrive in the order in which `load_` will ask for them.
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: dict[str, Future[Tensor | QuantizedTensor]] = {}
        self.model = empty_model(checkpoint.config)
        # Rotary frequencies and masks are in no file: `empty_model` has computed them on the CPU.
        for module in self.model.modules():
            values = {n: b for n, b in module._buffers.items() if b is not None and not b.is_meta}
            module._buffers.update(moved(values, device))
        read_generation_config_(self.model, checkpoint.path)
        self.aliases = tensor_names(self.model)
        first = {alias: name for name, aliases in self.aliases.items() for alias in aliases}
        # A tied tensor may be stored under any of its names.
        self.stored = {first.get(name, name): name for name in checkpoint.names()}
        missing = self.aliases.keys() - self.stored.keys()
        unknown = self.stored.keys() - self.aliases.keys()
        if missing or unknown:
            raise SourceError(
                f"the files and config.json ({type(self.model).__name__}) do not match: missing: "
                f"{listed(sorted(missing))}; unknown to the model: {listed(sorted(unknown))}. "
                "Check that config.json belongs to this model, or download the model again"
            )

    def materialize_(self, path: str = "", track: Track = untracked) -> None:
        """Load all tensors in module `path` that have no data yet.

        Floats become float32, integers packed layers, which may replace the module.

        Raises:
            SourceError: a tensor cannot be read, or its shape differs from its parameter's.
        """
        names = self._missing(path)
        # One at a time, so that the peak memory is what is loaded plus one tensor: 1.99 GiB for
        # weights of 11.23 GiB (docs/log/formats.md).
        for name in track(names, "reading", len(names)):
            self.load_(name)

    def read_ahead(self, path: str) -> None:
        """Begin to read the tensors in module `path`, needed next, while the device computes."""
        # On a CPU, which itself computes, reading ahead would only slow the current block.
        if self.device.type != CPU.type:
            for name in self._missing(path):
                if name not in self._ahead:
                    read = partial(self.checkpoint.read, self.stored[name])
                    self._ahead[name] = self._reader.submit(read)

    def load_outside_(self, paths: Collection[str]) -> None:
        """Load every tensor that is used outside the modules at `paths`, or on both sides."""
        inside = tuple(f"{path}." for path in paths)
        for name in self.stored:
            if not all(alias.startswith(inside) for alias in self.aliases[name]):
                self.load_(name)

    def release_(self, path: str = "") -> None:
        """Drop the data of float tensors used only in module `path`; packed layers stay."""
        for aliases in self.aliases.values():
            tensors = {a: t for a in aliases if (t := tensor_at(self.model, a)) is not None}
            if tensors and all(is_below(alias, path) for alias in tensors):
                put_(self.model, tensors, next(iter(tensors.values())).to("meta"))

    @contextmanager
    def one_block_at_a_time(self) -> Iterator[PreTrainedModel]:
        """The model, ready to run. Each block (see `blocks_of`) is loaded only while it runs;
        everything outside blocks stays loaded."""
        # Hooks run only on modules that are called: a block that is a mere container never is.
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
                loading = block.register_forward_pre_hook(lambda *_, at=path: self.materialize_(at))
                releasing = block.register_forward_hook(lambda *_, at=path: self.release_(at))
                stack.callback(loading.remove)
                stack.callback(releasing.remove)
            yield self.model

    def _missing(self, path: str) -> list[str]:
        return [n for n in self.stored if any(is_below(a, path) for a in self._waiting(n))]

    def _waiting(self, name: str) -> list[str]:
        """The names of a tensor that still exist in the model and have no data."""
        tensors = {alias: tensor_at(self.model, alias) for alias in self.aliases[name]}
        return [alias for alias, tensor in tensors.items() if tensor is not None and tensor.is_meta]

    def load_(self, name: str) -> None:
        """Load one tensor by name if it has no data yet; see `materialize_`."""
        aliases = self._waiting(name)
        if not aliases:
            return
        ahead = self._ahead.pop(name, None)
        value = ahead.result() if ahead else self.checkpoint.read(self.stored[name])
        value = value.to(self.device)
        if isinstance(value, QuantizedTensor):
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
        # Infinity is a legitimate value in a buffer: attention masks hold it.
        check_finite(name, value, allow_infinity=not isinstance(expected, nn.Parameter))
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        put_(self.model, aliases, value.to(dtype))


def _same(a: Tensor | QuantizedTensor, b: Tensor | QuantizedTensor) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor) and a.equals(b)


def _listed(names: list[str]) -> str:
    return f"{listed(map(repr, names))} {'is' if len(names) == 1 else 'are'}"


def find_origins(
    model: PreTrainedModel,
    stored: Mapping[str, tuple[int, ...]],
    where: str,
    transforms: Sequence[WeightTransform] | None = None,
) -> tuple[dict[str, Origin], list[str]]:
    """Find the stored tensors of each parameter.

    Args:
        stored: shapes of the stored tensors, by name.
        transforms: conversions from the format's names; default: those that transformers has for
            this type of model.

    Returns:
        The origin of each parameter, and the stored names that belong to no parameter and that
        transformers does not ignore.

    Raises:
        SourceError: two stored tensors map to the same parameter, or a conversion does not fit the
            stored shapes.
    """
    meta = model.state_dict()
    # A checkpoint may lack the base model's prefix, have names of an older transformers, or store
    # one parameter in parts (experts, fused projections): transformers knows this by model type.
    transforms = get_model_conversion_mapping(model) if transforms is None else transforms
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    # Stored names and patterns by parameter (the first of a conversion that makes several).
    sources: dict[str, list[tuple[str, str | None]]] = {}
    unknown: list[str] = []
    for name in sorted(stored, key=dot_natural_key):
        prefix = model.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        # A pattern for an old name may also match a name that the model has today.
        if target not in meta and name in meta:
            target, pattern = rename_source_key(name, [], [], prefix, meta)
        if target not in meta:
            unknown.append(name)
        elif pattern is None and target in sources:
            raise SourceError(
                f"{where}: tensors {sources[target][0][0]!r} and {name!r} are both "
                f"parameter {target!r}; remove one of them from the checkpoint"
            )
        else:
            sources.setdefault(target, []).append((name, pattern))
    by_target: dict[str, Origin] = {}
    for first, parts in sources.items():
        converter = by_pattern.get(parts[0][1] or "")
        convert = partial(_parameters_of, model, first, converter, parts)
        # Without data, the conversion costs nothing and tells names and shapes of its results.
        empty = {name: torch.empty(stored[name], device="meta") for name, _ in parts}
        what = f"{where}: parameter {first!r} cannot be made from {listed(empty, 4)}"
        with foreign_as(SourceError, what, "download the model again"):
            converted = convert(empty)
        operations = () if converter is None else tuple(converter.operations)
        for target, tensor in converted.items():
            shape = tuple(tensor.shape)
            by_target[target] = Origin(target, tuple(empty), convert, operations, shape)
    ignored = list(model._keys_to_ignore_on_load_unexpected or [])
    buffers = [name for name, _ in model.named_buffers()]
    # Older versions of transformers stored these buffers, which are now computed.
    outdated = ("rotary_emb.inv_freq", "position_ids")
    ignored += [rf"(^|\.){re.escape(o)}$" for o in outdated if any(n.endswith(o) for n in buffers)]
    return by_target, [n for n in unknown if not any(re.search(part, n) for part in ignored)]


def _parameters_of(
    model: PreTrainedModel,
    target: str,
    converter: WeightConverter | None,
    sources: Sequence[tuple[str, str | None]],
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The parameters made from stored tensors; `target` is the first."""
    if converter is None:
        return {target: tensors[sources[0][0]]}
    # `add_tensor` changes a converter, and one converter serves every layer.
    converter = deepcopy(converter)
    for stored, pattern in sources:
        # transformers calls a callable when it converts, although the annotation is `Future`.
        value: Any = partial(tensors.__getitem__, stored)
        converter.add_tensor(target, stored, pattern or "", value)
    converted = converter.convert(target, model=model, config=model.config)
    # transformers 5.24 gives operations lists; one that changes nothing returns its list.
    return {name: v[0] if isinstance(v, list) else v for name, v in converted.items()}


def quantized_of(bitwidth: int, codes: Tensor, scale: Tensor, low_end: Tensor) -> QuantizedTensor:
    """A tensor from the numbers that a file stores. A symmetric one with a negative scale has
    signed blocks. In others, the codes of a group with a negative scale are counted from the other
    end. This changes values only by the rounding of one float32 addition:

        code' = steps - code      offset' = -steps - offset
        scale' = -scale           minimum' = minimum + steps * scale,  steps = 2^bitwidth - 1

    Args:
        codes: uint8 `[*rows, in]`.
        scale: of any float type, `[*rows, groups]`, or `[]` for the whole tensor.
        low_end: of the same shape: offsets (integers, AIMET's sign) or minimums (floats).

    Raises:
        GridError: a scale is zero or not finite, or an offset is out of range.
    """
    scale, steps = scale.to(torch.float32), 2**bitwidth - 1
    has_minimum = low_end.is_floating_point()
    symmetric = not has_minimum and bool((low_end == -(2 ** (bitwidth - 1))).all())
    granularity: Granularity = PerTensor()
    if scale.ndim:
        size = codes.shape[-1] // scale.shape[-1]
        negative = scale < 0
        is_signed = symmetric and bool(negative.any())
        if bool(negative.any()) and not is_signed:
            codes = torch.where(negative.repeat_interleave(size, dim=-1), steps - codes, codes)
            other_end = low_end + scale * steps if has_minimum else -steps - low_end
            low_end, scale = torch.where(negative, other_end, low_end), scale.abs()
        granularity = SignedBlock(size) if is_signed else PerBlock(size)
        if scale.ndim == 2 and scale.shape[1] == 1 and not (has_minimum or is_signed):
            granularity, scale, low_end = PerChannel(0), scale.flatten(), low_end.flatten()
    scheme = Scheme(bitwidth, symmetric, granularity, float_offset=has_minimum)
    low_end = low_end.to(torch.float32 if has_minimum else torch.int32).contiguous()
    return QuantizedTensor(codes.contiguous(), Encoding(scheme, scale.contiguous(), low_end))


def convert_quantized(
    origin: Origin, parts: Mapping[str, QuantizedTensor], where: str
) -> QuantizedTensor:
    """As `Origin.convert`, for codes, scales and offsets separately.

    Raises:
        SourceError: the stored parts have different schemes, or the conversion does more than move
            rows.
    """
    if not origin.operations:
        return parts[origin.sources[0]]
    for op in origin.operations:
        if not isinstance(op, ROW_OPERATIONS) or getattr(op, "dim", 0) < 0:
            raise SourceError(
                f"{where}: parameter {origin.target!r} needs the conversion {op!r}, which "
                "is not possible on integers. Quantize the float model instead"
            )
    blocks = {name: _as_blocks(part) for name, part in parts.items()}
    schemes = {part.encoding.scheme: name for name, part in blocks.items()}
    if len(schemes) > 1:
        parts_of = "; ".join(f"{name}: {scheme}" for scheme, name in schemes.items())
        raise SourceError(
            f"{where}: the parts of parameter {origin.target!r} have different schemes "
            f"({parts_of}), but a parameter must have one. Quantize the float model instead"
        )
    (scheme,) = schemes
    codes, scale, low_end = (
        origin.convert({name: attrgetter(values)(part) for name, part in blocks.items()})
        for values in ("codes", "encoding.scale", "encoding.low_end")
    )
    return QuantizedTensor(codes, Encoding(scheme, scale, low_end))


def _as_blocks(part: QuantizedTensor) -> QuantizedTensor:
    """The same values with at least one scale per row, so that rows can be moved."""
    encoding, shape = part.encoding, (*part.codes.shape[:-1], 1)
    if isinstance(encoding.scheme.granularity, Blocks):
        return part
    scale, end = (
        values.view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()
        for values in (encoding.scale, encoding.low_end)
    )
    scheme = replace(encoding.scheme, granularity=PerBlock(part.codes.shape[-1]))
    return QuantizedTensor(part.codes, Encoding(scheme, scale, end))


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
    # accelerate's context leaves buffers real; torch's device makes them meta too, so sizes from a
    # damaged file allocate nothing.
    with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
        model = build_model(config, trust_remote_code, class_name)
    model.tie_weights()
    return model.requires_grad_(False).eval()


def build_model(
    config: PretrainedConfig, trust_remote_code: bool = False, class_name: str | None = None
) -> PreTrainedModel:
    """Build the model of `config` on the current device, with random weights.

    Args:
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
    what = f"config.json ({type(config).__name__}) does not describe a causal language model"
    # Bad values can fail anywhere in a model class, with any type of error.
    with foreign_as(SourceError, what):
        if is_model:
            return named._from_config(config, dtype=torch.float32)
        settings = {"dtype": torch.float32, "trust_remote_code": trust_remote_code}
        return auto_class(config).from_config(config, **settings)


def auto_class(config: PretrainedConfig) -> Any:
    """What loads the model of `config`: a language model, or one that reads images too."""
    is_language_model = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    reads_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    # transformers has both for some configurations (Llama 4); `architectures` names the class.
    if reads_images and is_language_model:
        kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        is_language_model = kind.__name__ not in (config.architectures or ())
    use_images = reads_images and not is_language_model
    return AutoModelForImageTextToText if use_images else AutoModelForCausalLM


def blocks_of(model: nn.Module) -> list[str]:
    """The paths of a model's blocks: the members of its outermost `ModuleList`s."""
    blocks: list[str] = []
    # `named_modules` yields an outer list before those nested in it.
    for path, module in model.named_modules():
        is_nested = any(path == block or is_below(path, block) for block in blocks)
        if isinstance(module, nn.ModuleList) and not is_nested:
            blocks += [f"{path}.{name}" if path else name for name, _ in module.named_children()]
    return blocks


def tensor_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter and saved buffer, by its first name."""
    names: dict[int, list[str]] = {}
    # By default, `state_dict` detaches: each name would get a tensor object of its own, and a tied
    # tensor could not be recognized.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):  # not a module's extra state
            names.setdefault(id(tensor), []).append(name)
    return {of_tensor[0]: of_tensor for of_tensor in names.values()}


def is_below(name: str, path: str) -> bool:
    """Whether a tensor is in the module at `path`; the empty path contains every tensor."""
    return not path or name.startswith(f"{path}.")


def tensor_at(model: nn.Module, name: str) -> Tensor | None:
    """The tensor of a name; None if its module was replaced and has no such tensor."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    return module._parameters.get(key, module._buffers.get(key))


def put_(model: nn.Module, names: Iterable[str], tensor: Tensor) -> None:
    """Put one tensor at all of its names, as a frozen parameter where the module has one."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    for name in names:
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if key in module._parameters:
            module._parameters[key] = parameter
        else:
            module._buffers[key] = tensor


def read_generation_config_(model: PreTrainedModel, folder: Path) -> None:
    """Give the model the generation_config.json in `folder`, if there is one."""
    path = folder / "generation_config.json"
    if path.is_file():
        with foreign_as(SourceError, f"{str(path)!r} cannot be read", "correct it, or remove it"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
