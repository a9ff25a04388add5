"""The fingerprint of a base: SHA-256 over everything in it that changes a number.

    fingerprint = sha256(settings, then name and digest of each tensor by name)
    digest      = sha256(name, its scheme as JSON if it is packed, kind and shape, its values)

Tensors are all parameters and persistent buffers, under names without what an adapter library adds.
Settings are everything besides tensors that a computation depends on. docs/fingerprint.md says
exactly what is hashed, and what is not covered.

Two bases have the same fingerprint exactly if they have the same codes, scales, offsets, remaining
floats and settings under the same names. Adapters and devices do not change it. A base that was
loaded in a dtype that cannot hold its floats keeps its fingerprint until it is changed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from numbers import Number
from types import BuiltinFunctionType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import container, dropout

from qwlora.nn.packed_layer import PACKED_ATTRIBUTES, PackedLayer, is_packed, unwrapped
from qwlora.system.parameter_names import adapter_of, canonical_name

# Keys of a configuration that change no output
VOLATILE = frozenset(
    (
        *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"),
        "_model_name_or_path",  # a GGUF file's general.name
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states"),
        *("quantization_config", "transformers_weights"),
        # Trainers set these to the tokenizer's. They matter only in the few encoders that count
        # positions from the padding id.
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("pretraining_tp", "output_router_logits"),  # PEFT sets the first; the second is of losses
        *("id2label", "label2id", "problem_type"),
        *("initializer_range", "init_std"),  # of randomly initialized weights
    )
)
# Attributes of plain modules that do not change the output in evaluation mode, or that follow from
# the shapes of their tensors.
INERT = frozenset(
    (
        *("training", "dropout", "inplace", "momentum", "gradient_checkpointing"),
        *("scale_grad_by_freq", "sparse"),  # only for an embedding's gradient
        *("name_or_path", "hf_device_map"),
        *("in_features", "out_features", "num_embeddings", "embedding_dim", "normalized_shape"),
        *("in_channels", "out_channels", "num_features", "num_channels"),
    )
)
# Classes of torch.nn that need no record: their tensors determine what they compute.
_OF_TENSORS = (nn.Module, nn.Identity, nn.Linear, nn.Embedding)
# values hashed at a time: their float32 copies take 64 MB, not a second tensor
_CHUNK = 2**24
_KEPT = "_kept_fingerprint"
_BEFORE = "_base_before_training"
# Where PEFT's wrappers hold the wrapped layer, copied module, model or tuner.
_WRAPPED = ("base_layer", "original_module", "model", "base_model")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the base inside `model`, as hex digits. Adapters do not change it."""
    return fingerprint_of(tensor_digests(model), model)


def fingerprint_of(digests: Mapping[str, str], model: nn.Module) -> str:
    """`fingerprint` of `model`, whose tensors have these digests (see `tensor_digests`)."""
    now = combined_fingerprint(digests, base_settings(model))
    kept = (vars(module)[_KEPT] for module in model.modules() if _KEPT in vars(module))
    before, identity = next(kept, (now, now))
    return identity if before == now else now


def adapter_fingerprint(model: nn.Module, adapters: Collection[str] | None = None) -> str | None:
    """SHA-256 over these adapters of `model` (default: the active ones): each weight by name, and
    the scaling of each branch. None without an adapter."""
    if not hasattr(model, "peft_config"):
        return None
    if adapters is None:
        if any(getattr(module, "disable_adapters", False) is True for module in model.modules()):
            return None
        # The model's own method of this name refuses every released PEFT (transformers 5.24), so
        # layers are asked.
        stated = (getattr(module, "active_adapters", None) for module in model.modules())
        adapters = {name for names in stated if isinstance(names, list) for name in names}
    active = set(adapters)
    # without the adapter's name, which users change when they load it
    digests = {
        canonical_name(path): tensor_digest(canonical_name(path), "", p)
        for path, p in model.named_parameters()
        if adapter_of(path) in active
    }
    scaling = {
        canonical_name(path): sorted(s for name, s in module.scaling.items() if name in active)
        for path, module in model.named_modules()
        if isinstance(scalings := getattr(module, "scaling", None), dict)
        and active & scalings.keys()  # a layer of other adapters says nothing of these
    }
    return combined_fingerprint(digests, scaling) if digests else None


def keep_fingerprint_(model: nn.Module, now: str, identity: str) -> None:
    """Let `model`, whose tensors now hash to `now`, keep `identity`, its fingerprint before its
    floats were cast."""
    # `fingerprint_of` compares `now`, so any later change ends that
    model.__dict__[_KEPT] = (now, identity)


def remember_base_(model: nn.Module, digests: Mapping[str, str] | None = None) -> None:
    """Remember floats and settings of `model` for `changed_since`; `digests` of all tensors, if
    known."""
    # packed layers are not remembered, because their integers are never trained
    floats = {
        name: (digests[name] if digests else tensor_digest(name, "", tensor), tensor.dtype)
        for name, tensor in float_tensors(model).items()
    }
    # the outermost module of the base, which may later become part of another model
    _, root = next(base_modules(model))
    for module in root.modules():
        vars(module).pop(_BEFORE, None)
    vars(root)[_BEFORE] = floats, flat(base_settings(model))


def changed_since(model: nn.Module, digests: Mapping[str, str]) -> list[str]:
    """Names of float tensors that changed since `remember_base_`, and settings with old and new
    values; `digests` are those of all tensors now."""
    memories = {path: module for path, module in base_modules(model) if _BEFORE in vars(module)}
    changed: list[str] = []
    for path, part in memories.items():
        floats, settings = vars(part)[_BEFORE]
        prefix = f"{path}." if path else ""
        # a part that was quantized later is compared with its own memory
        later = tuple(f"{p.removeprefix(prefix)}." for p in memories if p != path)
        now, known = float_tensors(part), tensor_digests(part) if path else digests
        names = now.keys() - floats.keys()
        for name, (digest, dtype) in floats.items():
            # the values before a cast to a narrower dtype are unknown
            is_narrower = name in now and now[name].dtype.itemsize < dtype.itemsize
            if known.get(name) != digest and not is_narrower:
                names.add(name)
        lines = sorted(names) + differences(settings, flat(base_settings(part)))
        changed += [f"{prefix}{line}" for line in lines if not line.startswith(later)]
    return changed


def float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the base that are not packed, by name."""
    return {
        name: tensor
        for name, (layout, tensor) in base_tensors(model).items()
        if not layout and tensor.is_floating_point()
    }


def combined_fingerprint(digests: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """The fingerprint of a base with these `tensor_digests` and `base_settings`."""
    total = hashlib.sha256(settings_text(settings).encode())
    for name, digest in sorted(digests.items()):
        total.update(f"\0{name}\0{digest}".encode())
    return total.hexdigest()


def settings_text(settings: Mapping[str, Any]) -> str:
    """The JSON text that is hashed for settings."""
    # base.json stores it, because other libraries write the same numbers differently (1e-05,
    # 0.00001) or have other defaults
    return json.dumps(settings, sort_keys=True, default=str)


def flat(settings: Any, path: str = "") -> dict[str, str]:
    """Nested settings as text by dotted path."""
    if not (isinstance(settings, Mapping) and settings):
        return {path: settings_text(settings)}
    parts = (flat(value, f"{path}.{key}".strip(".")) for key, value in settings.items())
    return {key: value for part in parts for key, value in part.items()}


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """`path: old -> new` for each value of two `flat` settings that differs."""
    return [
        f"{path}: {old.get(path, 'default')} -> {new.get(path, 'default')}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]


def tensor_digests(model: nn.Module) -> dict[str, str]:
    """The digest of each tensor of the base, by name."""
    return {
        name: tensor_digest(name, layout, tensor)
        for name, (layout, tensor) in base_tensors(model).items()
    }


def tensor_digest(name: str, layout: str, tensor: Tensor) -> str:
    """SHA-256 of one tensor."""
    kind = tensor.dtype
    # bfloat16 and float32 copies of the same numbers then have the same digest
    if tensor.is_floating_point():
        kind = torch.promote_types(kind, torch.float32)
    digest = hashlib.sha256(f"{name}\0{layout}\0{kind}\0{list(tensor.shape)}\0".encode())
    for chunk in tensor.detach().flatten().split(_CHUNK):
        # contiguous, because `view` refuses the strides of slices and expanded vectors
        digest.update(chunk.cpu().to(kind).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def update_digest(digest: Any, things: Iterable[Any]) -> None:
    """Add tensors, by their values, and other objects, by their text, to a hashlib digest."""
    for thing in things:
        text = tensor_digest("", "", thing) if isinstance(thing, Tensor) else thing
        digest.update(f"{text}\0".encode())


def base_settings(model: nn.Module) -> dict[str, Any]:
    """What the computation of `model` depends on besides tensors; see the module."""
    settings: dict[str, Any] = {}
    covered = None  # prefix of the paths inside the last module that has a configuration
    for path, module in base_modules(model):
        if covered is not None and path.startswith(covered):
            continue
        if (part := _configuration(module)) is not None:
            if not path:
                return part
            covered = f"{path}."
        else:
            part = _attributes(module)
        if part:
            settings[path] = part
    return settings


def _configuration(module: nn.Module) -> dict[str, Any] | None:
    # the class too, since a user's own module may have an attribute called config
    if hasattr(type(module), "config_class") and hasattr(vars(module).get("config"), "to_dict"):
        return _numbers(vars(module)["config"])
    if not hasattr(type(module), "register_to_config"):
        return None
    # A key that a library adds in a new version has its default, and changes no fingerprint.
    defaults = inspect.signature(type(module)).parameters
    return {
        key: value
        for key, value in cast(Any, module).config.items()
        if not key.startswith("_") and not (key in defaults and value == defaults[key].default)
    }


def _attributes(module: nn.Module) -> dict[str, Any]:
    # A class of torch.nn says by the arguments of its constructor what it depends on; of a class
    # from elsewhere, all public attributes count.
    kinds = [kind for kind in type(module).__mro__ if not kind.__module__.startswith("qwlora.")]
    kind = next(kind for kind in kinds if kind.__module__.startswith("torch.nn.modules."))
    is_torchs = kinds[0] is kind
    if kind.__module__ == dropout.__name__ and is_torchs:
        return {}
    # `torch.nn.LSTM` takes *args; its constants name the ones that it keeps
    constants = dict.fromkeys(getattr(kind, "__constants__", ()), inspect.Parameter.empty)
    defaults = {name: of.default for name, of in inspect.signature(kind).parameters.items()}
    arguments: dict[str, Any] = constants | defaults
    is_known = kind in _OF_TENSORS or kind.__module__ == container.__name__
    settings: dict[str, Any] = {} if is_known else {"class": kind.__name__}
    left_out = VOLATILE | INERT | set(PACKED_ATTRIBUTES if isinstance(module, PackedLayer) else ())
    left_out |= {"padding_idx"} if kind is nn.Embedding else set()  # its gradient is zero
    for key, value in vars(module).items():
        if key.startswith("_") or key in left_out or (is_torchs and key not in arguments):
            continue
        if isinstance(value, FunctionType | BuiltinFunctionType) and key in arguments:
            value = value.__name__  # an activation function
        elif value is None or not _is_setting(value):
            continue
        default = arguments.get(key)
        if value != getattr(default, "__name__", default):
            settings[key] = value
    return settings


def _is_setting(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_setting(value[key]) for key in value)
    if isinstance(value, list | tuple):
        return all(map(_is_setting, value))
    return value is None or isinstance(value, str | Number)


def _numbers(config: Any) -> dict[str, Any]:
    defaults = config.default_config_fields() if hasattr(config, "default_config_fields") else {}
    numbers = {}
    for key, value in config.to_dict().items():
        if key in VOLATILE:
            continue
        part = config.__dict__.get(key)
        if hasattr(part, "to_dict"):  # of a part, as models of text and images have them
            numbers[key] = _numbers(part)
        elif defaults.get(key) != value:  # fields without a default count as None
            numbers[key] = value
    return numbers


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of everything in the base, without the wrappers of PEFT, torch.compile and
    data parallelism; each module once, the outermost first."""
    yield from _walk(model, "", set())


def _walk(module: nn.Module, path: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(module)
    # by class: a user's own module may have a part called base_layer
    while any(kind.__module__.startswith("peft.") for kind in type(module).__mro__):
        inner = (module._modules.get(name) for name in _WRAPPED)
        wrapped = next((child for child in inner if child is not None), None)
        if wrapped is None:
            break
        module = unwrapped(wrapped)
    if module not in seen:
        seen.add(module)
        yield path, module
        for name, child in module.named_children():
            yield from _walk(child, f"{path}.{name}" if path else name, seen)


def base_tensors(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Layout and tensor of each parameter and persistent buffer of the base, tied ones once."""
    tensors: dict[str, tuple[str, Tensor]] = {}
    seen: set[int] = set()
    for path, module in base_modules(model):
        layout = module.scheme.to_text() if is_packed(module) else ""
        for key, tensor in (module._parameters | module._buffers).items():
            if key in module._non_persistent_buffers_set:
                continue
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                name = f"{path}.{key}" if path else key
                tensors[name] = layout if key in module._buffers else "", tensor
    return tensors
