"""The fingerprint of a base: SHA-256 over everything in it that changes a number.

    fingerprint = sha256(numbers of the configuration, then name and digest of each tensor by name)
    digest      = sha256(name, its scheme as JSON if it is packed, kind and shape, its values)

Tensors are all parameters and persistent buffers, under names without what an adapter library adds.
Floats are hashed as float32 values, so bfloat16 and float32 copies of the same numbers have the
same digest. Buffers that are not persistent (rotary frequencies, masks) follow from the
configuration. That is hashed without keys that do not change logits (`VOLATILE`) and without values
that equal the default of their class, so that a new key in a library version does not change the
fingerprint.

So two bases have the same fingerprint exactly if they have the same codes, scales, offsets,
remaining floats and configuration under the same names. Adapters and devices do not change it. A
base that was loaded in a dtype that cannot hold its floats keeps its fingerprint
(`keep_fingerprint_`) until it is changed.

Limitation: token ids of padding, start and end are volatile, because trainers set them to the
tokenizer's. In the few encoders that count positions from the padding id they would matter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwlora.nn.packed_layer import is_packed, unwrapped
from qwlora.system.parameter_names import adapter_of, canonical_name, is_adapter_name

VOLATILE = frozenset(
    (
        *("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"),
        "_model_name_or_path",  # a GGUF file's general.name
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states"),
        *("quantization_config", "transformers_weights"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
        *("id2label", "label2id", "problem_type"),
        *("initializer_range", "init_std"),  # of randomly initialized weights
    )
)
_CHUNK = 2**24
_KEPT = "_kept_fingerprint"
_FLOATS = "_float_digests"


def fingerprint(model: nn.Module) -> str:
    """Hex digest of the base inside `model`, which may carry adapters."""
    return fingerprint_of(tensor_digests(model), model)


def fingerprint_of(digests: Mapping[str, str], model: nn.Module) -> str:
    """`fingerprint` of `model`, whose tensors have these digests (see `tensor_digests`)."""
    now = combined_fingerprint(digests, config_numbers(model))
    kept = _remembered(model, _KEPT)
    return kept[1] if kept is not None and kept[0] == now else now


def adapter_fingerprint(model: nn.Module, adapters: Collection[str] | None = None) -> str | None:
    """SHA-256 over these adapters of `model` (default: the active ones): each weight by name,
    without the adapter's name, and the scaling of each branch. None without an adapter."""
    if not hasattr(model, "peft_config"):
        return None
    if adapters is None:
        if any(getattr(module, "disable_adapters", False) is True for module in model.modules()):
            return None
        # transformers 5.24 has a method of this name that refuses every released PEFT: layers are
        # asked
        stated = (getattr(module, "active_adapters", None) for module in model.modules())
        adapters = {name for names in stated if isinstance(names, list) for name in names}
    active = set(adapters)
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
    floats were cast. Any later change ends that."""
    model.__dict__[_KEPT] = (now, identity)


def remember_floats_(model: nn.Module, digests: Mapping[str, str] | None = None) -> None:
    """Store digests of the float tensors of `model`, so that `changed_floats` finds those that
    change; `digests` of all tensors, if they are known. Packed layers need none: nothing trains
    integers."""
    inner = unwrapped(model)
    inner = getattr(inner, "get_base_model", lambda: inner)()
    inner.__dict__[_FLOATS] = {
        name: (digests[name] if digests else tensor_digest(name, "", tensor), tensor.dtype)
        for name, tensor in _float_tensors(model).items()
    }


def changed_floats(model: nn.Module, digests: Mapping[str, str]) -> list[str]:
    """Names of the float tensors whose digests, now `digests`, changed since `remember_floats_`;
    empty if that was never called. Tensors that were cast to a narrower dtype since are omitted:
    their previous values are unknown."""
    before = _remembered(model, _FLOATS)
    if before is None:
        return []
    now = _float_tensors(model)
    changed = now.keys() - before.keys()
    for name, (digest, dtype) in before.items():
        is_narrower = name in now and now[name].dtype.itemsize < dtype.itemsize
        if digests.get(name) != digest and not is_narrower:
            changed.add(name)
    return sorted(changed)


def _float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the base that are not packed, by name."""
    return {
        name: tensor
        for name, (layout, tensor) in base_tensors(model).items()
        if not layout and tensor.is_floating_point()
    }


def _remembered(model: nn.Module, key: str) -> Any:
    """The attribute that a module of `model` remembers under `key`; None if none does."""
    states = (vars(module) for module in model.modules())
    return next((state[key] for state in states if key in state), None)


def combined_fingerprint(digests: Mapping[str, str], numbers: Mapping[str, Any]) -> str:
    """The fingerprint of a base with these digests of tensors (see `tensor_digests`) and these
    numbers (see `config_numbers`)."""
    total = hashlib.sha256(numbers_text(numbers).encode())
    for name, digest in sorted(digests.items()):
        total.update(f"\0{name}\0{digest}".encode())
    return total.hexdigest()


def numbers_text(numbers: Mapping[str, Any]) -> str:
    """The JSON text of a configuration's numbers that is hashed. base.json holds it, because other
    libraries write the same numbers in other ways (1e-05, 0.00001) or have other defaults."""
    return json.dumps(numbers, sort_keys=True, default=str)


def tensor_digests(model: nn.Module) -> dict[str, str]:
    """The digest of each tensor of the base, by name."""
    return {
        name: tensor_digest(name, layout, tensor)
        for name, (layout, tensor) in base_tensors(model).items()
    }


def tensor_digest(name: str, layout: str, tensor: Tensor) -> str:
    """SHA-256 of one tensor; floats narrower than float32 by their float32 values."""
    kind = tensor.dtype
    if tensor.is_floating_point():
        kind = torch.promote_types(kind, torch.float32)
    digest = hashlib.sha256(f"{name}\0{layout}\0{kind}\0{list(tensor.shape)}\0".encode())
    for chunk in tensor.detach().flatten().split(_CHUNK):
        digest.update(chunk.cpu().to(kind).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def update_digest(digest: Any, things: Iterable[Any]) -> None:
    """Add tensors, by their values, and other objects, by their text, to a hashlib digest."""
    for thing in things:
        digest.update(
            f"{tensor_digest('', '', thing) if isinstance(thing, Tensor) else thing}\0".encode()
        )


def config_numbers(model: nn.Module) -> dict[str, Any]:
    """What the configuration of `model` says about its computation; empty if it has none."""
    configs = (module.__dict__.get("config") for module in model.modules())
    return next((_numbers(config) for config in configs if hasattr(config, "to_dict")), {})


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


def base_tensors(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Layout and tensor of each parameter and persistent buffer of the base; a tensor shared by two
    modules is listed once."""
    tensors: dict[str, tuple[str, Tensor]] = {}
    seen: set[int] = set()
    for path, module in unwrapped(model).named_modules():
        layout = module.scheme.to_text() if is_packed(module) else ""
        for key, tensor in (module._parameters | module._buffers).items():
            name = f"{path}.{key}" if path else key
            if key in module._non_persistent_buffers_set or is_adapter_name(name):
                continue
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[canonical_name(name)] = layout if key in module._buffers else "", tensor
    return tensors
