"""Packed layers: the tensors of a `PackedTensor` as buffers, and a view of the weight; and how
float modules are replaced by them.

    PackedLinear       y = x W_hat^T + b
    PackedEmbedding    only the rows that are looked up are unpacked
    PackedConv1d, 2d   the weight as [out, in * kernel], blocks along that row

A tied layer has no buffers; it reads those of the layer it is tied to, also after copies and moves.

A packed 3-D parameter, the fused experts of a mixture, is in any module:

    pack_parameter_(experts, "gate_up_proj", tensor)     codes [experts, out, in]

The module becomes an instance of a generated subclass and keeps its forward. Where it reads the
parameter it gets a view, which unpacks one expert at a time; the codes are in
`experts.packed_parameters.gate_up_proj`. PEFT's `target_parameters` finds the parameter and adds
its delta to it, which needs all experts as floats during the layer's forward and, without gradient
checkpointing, until its backward. PEFT does the same with float experts.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, Self, TypeGuard, cast

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from jaxtyping import Float, Integer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qwlora.errors import GridError
from qwlora.grid.encoding import Encoding, QuantizedTensor
from qwlora.grid.scheme import Scheme
from qwlora.nn.custom_ops import dequantize, gather, linear
from qwlora.nn.packed_tensor import PackedTensor, Parts
from qwlora.nn.weight_view import (
    LinearAddFunction,
    LinearFunction,
    PackedWeight,
    PackedWeightOwner,
    WeightView,
    refuse_write,
)
from qwlora.system.machine import memory_limit_bytes
from qwlora.system.parameter_names import FOLDER, canonical_name, parameter_name

_FLOATS = ("scale", "minimum")
_HOOK, _HOOKED_FORWARD = "_hf_hook", "_old_forward"  # attributes that accelerate sets


def traced() -> bool:
    """Whether torch.compile or torch.export traces: then a layer uses custom operators."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


class PackedLayer(PackedWeightOwner):
    """A module with a packed weight.

    Buffers: those of `packed`, `scale`, `block_scale`, `zero_point` and `minimum` that the scheme
    has (see `nn/packed_tensor.py`). `weight` is a `WeightView`; writing to it raises.
    """

    scheme: Scheme
    # dtype of the float weight, changed by `to`; products use the dtype of their input
    compute_dtype: torch.dtype
    weight_shape: tuple[int, ...]  # of the float weight, as the layer's class has it
    count: int
    layout: str  # the scheme, as custom operators take it
    was_conv1d = False  # whether it replaces a GPT-2 Conv1D, whose weight is [in, out]
    # in a tuple: torch would register a bare module as a submodule, and list its buffers twice
    _owner: tuple[PackedLayer] | None

    @classmethod
    def from_layer(cls, module: nn.Module, source: PackedTensor | PackedLayer) -> Self:
        """A layer with the attributes of `module`, on a packed tensor or tied to a packed layer."""
        if taken := [name for name in ("tensor", *PACKED_ATTRIBUTES) if hasattr(module, name)]:
            raise GridError(
                f"{type(module).__name__} already has an attribute {taken[0]!r}, where a packed "
                "layer stores its codes"
            )
        layer = cls.__new__(cls)
        layer.__dict__.update(_state(module))
        weight = cast(Tensor, layer._parameters.pop("weight"))
        return layer._take(source, tuple(weight.shape), weight.dtype)

    def to_layer(self, weight: nn.Parameter, kind: type[nn.Module] | None = None) -> nn.Module:
        """Undo `from_layer`: a layer of the float class, or of class `kind`."""
        plain = (k for k in type(self).__mro__ if not issubclass(k, PackedWeightOwner))
        kind = kind or next(k for k in plain if issubclass(k, nn.Module))
        module = kind.__new__(kind)
        module.__dict__.update(_state(self))
        for name in ("weight", *PACKED_ATTRIBUTES):
            module._buffers.pop(name, None)
            module.__dict__.pop(name, None)
        module._parameters = {"weight": weight, **module._parameters}
        return module

    def _take(
        self, source: PackedTensor | PackedLayer, weight_shape: tuple[int, ...], dtype: torch.dtype
    ) -> Self:
        tensor = source.tensor if isinstance(source, PackedLayer) else source
        self.scheme, self.count, self.layout = tensor.scheme, tensor.count, tensor.scheme.to_text()
        self.weight_shape, self.compute_dtype = weight_shape, dtype
        self._owner = (source,) if isinstance(source, PackedLayer) else None
        if isinstance(source, PackedTensor):
            for name, part in source.parts._asdict().items():
                self.register_buffer(name, part)
        # Libraries look for "weight" among parameters and buffers. The property below gives it.
        self._buffers["weight"] = None
        return self

    @property
    def tensor(self) -> PackedTensor:
        """The packed tensor: the layer's own, or that of the layer it is tied to."""
        if self._owner is not None:
            return self._owner[0].tensor
        parts: Any = map(self._buffers.get, Parts._fields)
        return PackedTensor(self.scheme, self.count, Parts(*parts))

    @property
    def encoding(self) -> Encoding:
        """The grid of the weight."""
        return self.tensor.encoding

    @property
    def codes(self) -> Tensor:
        """The unpacked codes, uint8 [out, in]."""
        return self.tensor.codes

    @property
    def quantized(self) -> QuantizedTensor:
        """Codes and encoding."""
        return self.tensor.quantized

    @property
    def is_tied(self) -> bool:
        """Whether the codes are another layer's."""
        return self._owner is not None

    @property
    def weight(self) -> Tensor:
        """A view of the float weight."""
        if not is_packed(self):
            raise AttributeError(f"{type(self).__name__} has no weight yet")
        if traced():
            return dequantize(*self.operands).to(self.compute_dtype).view(self.weight_shape)
        return WeightView(self.packed_weight)

    @property
    def packed_weight(self) -> PackedWeight:
        """The whole weight, for products."""
        return PackedWeight(self, self.weight_shape)

    @property
    def operands(self) -> tuple[Any, ...]:
        """The weight as arguments of the operators in `nn/custom_ops.py`."""
        tensor = self.tensor
        return *tensor.parts, tensor.count, self.layout

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and is_packed(self):
            # `model.tie_weights()` sets the same weight again
            owner = value.packed_weight.owner if isinstance(value, WeightView) else None
            if owner is None or owner.tensor.parts.packed is not self.tensor.parts.packed:
                refuse_write()
            return
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.to(bfloat16)` changes the dtype in which a layer computes, never its grid: bfloat16
        # would round the scales.
        before = {name: self._buffers.get(name) for name in _FLOATS}
        device = self.tensor.parts.packed.device
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and new.dtype != old.dtype:
                moved = torch.empty_like(old, device=new.device) if old.is_meta else old
                self._buffers[name] = moved.to(new.device)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=device)).dtype
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in _FLOATS:
            new, old = state_dict.get(prefix + name), self._buffers.get(name)
            # torch copies into the buffer that is there, which would round to its dtype
            if isinstance(new, Tensor) and old is not None and new.dtype != old.dtype:
                self._buffers[name] = torch.empty_like(old, dtype=new.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme}" + (", tied" if self.is_tied else "")


PACKED_ATTRIBUTES = (
    *Parts._fields,
    *("scheme", "count", "layout", "weight_shape", "compute_dtype", "was_conv1d"),
    "_owner",
)


def is_packed(module: nn.Module) -> TypeGuard[PackedLayer]:
    """Whether `module` has packed codes, its own or those of the layer it is tied to."""
    return isinstance(module, PackedLayer) and "scheme" in module.__dict__


def instance_calls(module: nn.Module) -> list[str]:
    """Attributes of the instance that change what a call of `module` computes."""
    # accelerate's hook around the class's own forward does not
    hooked = ("forward",) if accelerate_hook(module) is not None else ()
    calls = ("forward", "_compiled_call_impl")
    return [n for n in calls if n not in hooked and module.__dict__.get(n) is not None]


def accelerate_hook(module: nn.Module) -> ModelHook | None:
    """The accelerate hook around the class's own forward of `module`; None if it has none."""
    hook, inner = (module.__dict__.get(key) for key in (_HOOK, _HOOKED_FORWARD))
    if not isinstance(hook, ModelHook) or not isinstance(inner, types.MethodType):
        return None
    return hook if inner.__self__ is module and inner.__func__ is type(module).forward else None


def _state(module: nn.Module) -> dict[str, Any]:
    # accelerate's forward is bound to the old module, and would call it
    hooked = (_HOOK, _HOOKED_FORWARD, "forward") if accelerate_hook(module) is not None else ()
    return {
        key: value.copy() if isinstance(value, dict | set) else value
        for key, value in module.__dict__.items()
        if key not in hooked
    }


def with_tensor(layer: PackedLayer, tensor: PackedTensor) -> PackedLayer:
    """A layer with other codes, not tied to any; it shares all else, bias and hooks too."""
    other = type(layer).__new__(type(layer))
    other.__dict__.update(_state(layer))
    return other._take(tensor, layer.weight_shape, layer.compute_dtype)


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[override] # the weight is a property
    """Linear layer on packed codes [out, in]."""

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        # in a captured graph, exporters look for torch's own product of a dequantized weight
        if torch.compiler.is_exporting():
            weight = dequantize(*self.operands).to(self.compute_dtype)
            return nn.functional.linear(x, weight, self.bias)
        if traced():
            y = linear(x, *self.operands)
            return y if self.bias is None else y + self.bias
        return LinearFunction.apply(x, self.bias, self.packed_weight)

    def add_to(
        self, y: Float[Tensor, "*batch out"], x: Float[Tensor, "*batch in"]
    ) -> Float[Tensor, "*batch out"]:
        """y += x W_hat^T + b, in place."""
        return LinearAddFunction.apply(y, x, self.bias, self.packed_weight)

    @property
    def is_plain(self) -> bool:
        """Whether a call computes the product alone, without a subclass's forward or a hook."""
        is_own = type(self).forward is PackedLinear.forward and "forward" not in self.__dict__
        return is_own and not (self._forward_hooks or self._forward_pre_hooks)


class PackedEmbedding(PackedLayer, nn.Embedding):  # type: ignore[override] # weight: a property
    """Embedding on packed codes [rows, width]."""

    def forward(self, index: Integer[Tensor, "*batch"]) -> Float[Tensor, "*batch width"]:
        if torch.compiler.is_exporting():
            weight = dequantize(*self.operands).to(self.compute_dtype)
            return nn.functional.embedding(index, weight, self.padding_idx)
        if traced():
            return gather(index, *self.operands).to(self.compute_dtype)
        return self.tensor.embedding(index, self.compute_dtype)


class _PackedConv(PackedLayer):
    """Convolution on packed codes [out, in / groups * kernel]."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # PEFT builds a LoRA's convolutions by `type(base_layer)(...)`
        plain = nn.Conv1d if issubclass(cls, nn.Conv1d) else nn.Conv2d
        return plain(*args, **kwargs) if args or kwargs else super().__new__(cls)


class PackedConv1d(_PackedConv, nn.Conv1d):  # type: ignore[override] # the weight is a property
    """Packed Conv1d."""


class PackedConv2d(_PackedConv, nn.Conv2d):  # type: ignore[override] # the weight is a property
    """Packed Conv2d."""


KINDS: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    Conv1D: PackedLinear,  # as the linear layer that computes the same
    nn.Embedding: PackedEmbedding,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
}


def packed_class(kind: type[nn.Module]) -> type[PackedLayer] | None:
    """The packed class of modules of class `kind`; None if there is none."""
    # The class of a subclass has the subclass first: its forward is kept, and where it calls its
    # parent's forward, it calls that of the packed layer.
    if kind not in KINDS:
        parent = next((packed for plain, packed in KINDS.items() if issubclass(kind, plain)), None)
        if parent is None or issubclass(kind, Conv1D):
            return parent
        members = {"__reduce__": lambda self: (_empty, (packed_class, kind), self.__getstate__())}
        KINDS[kind] = type(f"Packed{kind.__name__}", (kind, parent), members)
    return KINDS[kind]


# for pickle, which finds no generated class by its name: it is made again
def _empty(make: Callable[..., Any], *arguments: Any) -> Any:
    kind = make(*arguments)
    return kind.__new__(kind)


def packed_layers(model: nn.Module, every_path: bool = False) -> dict[str, PackedLayer]:
    """Every packed layer of `model`, tied ones included, by canonical path. A module with several
    paths is listed under the first, or under each with `every_path`."""
    return {
        canonical_name(path): module
        for path, module in unwrapped(model).named_modules(remove_duplicate=not every_path)
        if is_packed(module)
    }


def packed_weights(model: nn.Module, every_path: bool = False) -> dict[str, PackedLayer]:
    """`packed_layers` by the canonical names of their float tensors."""
    return {parameter_name(path): layer for path, layer in packed_layers(model, every_path).items()}


def unwrapped(model: nn.Module) -> nn.Module:
    """`model` without wrappers of torch.compile, `DataParallel` and `DistributedDataParallel`."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    # it is slow to import, and without it nothing is compiled
    if "torch._dynamo" in sys.modules:
        from torch._dynamo import OptimizedModule

        if isinstance(model, OptimizedModule):
            return unwrapped(model._orig_mod)
    return model


class PackedParameter(PackedLayer):
    """The codes of one parameter; `transposed` if the module stores it as [experts, in, out]."""

    def __init__(self, tensor: PackedTensor, transposed: bool, dtype: torch.dtype):
        super().__init__()
        self.transposed = transposed
        experts, rows, columns = tensor.shape
        self._take(tensor, (experts, columns, rows) if transposed else tensor.shape, dtype)

    @property
    def weight(self) -> Tensor:
        if traced():
            values = dequantize(*self.operands).to(self.compute_dtype)
            return values.mT if self.transposed else values
        return WeightView(PackedWeight(self, self.weight_shape, transposed=self.transposed))


class _WithPackedParameters(nn.Module):
    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        for name, parameter in self._modules[FOLDER]._modules.items():  # type: ignore[union-attr]
            # PEFT asks this module itself. A whole model lists only its float parameters.
            if name in self._buffers:
                path = f"{prefix}.{name}" if prefix else name
                yield path, parameter.weight  # type: ignore[misc, union-attr]

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        # torch registers the original again after a parametrization for one forward
        if isinstance(tensor, WeightView):
            self._buffers[name] = None
        else:
            super().register_buffer(name, tensor, persistent)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and name in self.__dict__["_modules"].get(FOLDER, {}):
            refuse_write()
        super().__setattr__(name, value)


def parameter_out_in(module: nn.Module, name: str) -> Tensor:
    """A 3-D parameter as [experts, out, in]."""
    # transformers and PEFT set `is_transposed` on modules that store it as [experts, in, out]
    parameter = module._parameters.get(name)
    if parameter is None or parameter.ndim != 3 or not parameter.is_floating_point():
        raise GridError(f"{type(module).__name__} has no float parameter {name!r} with three axes")
    return parameter.mT if getattr(module, "is_transposed", False) else parameter


def pack_parameter_(module: nn.Module, name: str, tensor: PackedTensor) -> PackedParameter:
    """Replace the parameter `name` by packed codes [experts, out, in]; returns the module that has
    them."""
    expected = parameter_out_in(module, name)
    if tensor.shape != tuple(expected.shape):
        raise GridError(
            f"the codes have shape {list(tensor.shape)}, but {name} of {type(module).__name__} has "
            f"{list(expected.shape)}"
        )
    is_transposed = bool(getattr(module, "is_transposed", False))
    packed = PackedParameter(tensor, is_transposed, expected.dtype).train(module.training)
    if FOLDER not in module._modules:
        module.add_module(FOLDER, nn.ModuleDict().train(module.training))
    folder = cast(nn.ModuleDict, module._modules[FOLDER])._modules
    folder[name] = packed
    del module._parameters[name]
    # libraries look for the name among parameters and buffers; the class's property gives it
    module._buffers[name] = None
    plain: Any = next(
        kind for kind in type(module).__mro__ if not issubclass(kind, _WithPackedParameters)
    )
    module.__class__ = _class_with(plain, tuple(folder))
    return packed


# cached, so that all layers of a model have one class
@cache
def _class_with(kind: Any, names: tuple[str, ...]) -> type[nn.Module]:
    def read(module: nn.Module, name: str) -> Tensor:
        # While torch parametrizes it, the name must not exist.
        if name not in module._buffers:
            raise AttributeError(f"{type(module).__name__} has no attribute {name!r}")
        folder: Any = module._modules[FOLDER]
        return cast(Tensor, folder._modules[name].weight)

    members: dict[str, Any] = {name: property(partial(read, name=name)) for name in names}
    members["__reduce__"] = lambda m: (_empty, (_class_with, kind, names), m.__getstate__())
    return type(f"Packed{kind.__name__}", (_WithPackedParameters, kind), members)


def is_packable(module: nn.Module) -> bool:
    """Whether `pack_module` accepts `module`: a float Linear, Conv1D, Embedding, Conv1d, Conv2d or
    a subclass, whose weight is its own parameter."""
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.is_floating_point()
        # an embedding with it writes to its weight in each forward
        and getattr(module, "max_norm", None) is None
        and packed_class(type(module)) is not None
    )


def has_computed_weight(module: nn.Module) -> bool:
    """Whether `module` computes the weight that `pack_module` would take in each forward."""
    # weight_norm, spectral_norm, pruning, any parametrization
    weight = module._parameters.get("weight")
    return weight is None and not is_packed(module) and packed_class(type(module)) is not None


def replacement_problem(module: nn.Module) -> str | None:
    """Why another module cannot replace `module`; None if one can."""
    # a forward that was set on the instance would keep computing the float weight
    if has_computed_weight(module):
        return (
            "computes its weight in each forward (weight_norm or another parametrization, or "
            "pruning). Make the result permanent first: torch.nn.utils.parametrize."
            "remove_parametrizations(layer, 'weight'), remove_weight_norm or prune.remove"
        )
    match instance_calls(module):
        case ["forward", *_]:
            return (
                "has a 'forward' that was set on the instance and would keep computing the old "
                "weight. Delete it (`del layer.forward`) first, and set it again afterwards"
            )
        case [_, *_]:
            return "was compiled by module.compile(); quantize first, then compile"
    hook = accelerate_hook(module)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    if any(isinstance(part, AlignDevicesHook) and part.offload for part in hooks):
        return (
            "is offloaded by accelerate, so its weight is not in memory. Load the model without "
            "offloading, or quantize it from its folder (`qwlora run`, `open_checkpoint`)"
        )
    return None


def weight_out_in(module: nn.Module) -> Tensor:
    """The weight as [out, in], blocks along `in`: Conv1D transposed, a kernel flattened, an
    embedding's rows as they are; float32 if packed."""
    if is_packed(module):
        return module.tensor.dequantize()
    if not is_packable(module):
        raise GridError(
            f"{type(module).__name__} has no weight that can be packed. Linear, Conv1D, Embedding, "
            "Conv1d and Conv2d have one."
        )
    weight = cast(Tensor, module.weight)
    return weight.T if isinstance(module, Conv1D) else weight.flatten(1)


def tensor_out_in(model: nn.Module, name: str) -> Tensor:
    """The float tensor `name` as [out, in], or [experts, out, in]."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    is_weight = key == "weight" and is_packable(module)
    return weight_out_in(module) if is_weight else parameter_out_in(module, key)


def pack_module(
    module: nn.Module, source: QuantizedTensor | PackedTensor | PackedLayer
) -> PackedLayer:
    """A packed layer with all other attributes of `module`, on these codes [out, in] or tied to a
    packed layer (an output head that reads the codes of the embedding)."""
    if isinstance(source, QuantizedTensor):
        source = PackedTensor.from_quantized(source)
    weight = weight_out_in(module)
    shape = source.shape if isinstance(source, PackedTensor) else source.tensor.shape
    if is_packed(module) or shape != tuple(weight.shape):
        raise GridError(
            f"the codes have shape {list(shape)}, but the weight of {module} has "
            f"{list(weight.shape)}"
        )
    if problem := replacement_problem(module):
        raise GridError(f"this {type(module).__name__} {problem}")
    was_conv1d, hook = isinstance(module, Conv1D), accelerate_hook(module)
    if isinstance(module, Conv1D):
        linear = nn.Linear(module.nx, module.nf, bias=False, device="meta", dtype=weight.dtype)
        linear.bias = module.bias
        module = linear.train(module.training)
    kind = packed_class(type(module))
    assert kind is not None
    layer = kind.from_layer(module, source)
    layer.was_conv1d = was_conv1d
    if hook:
        add_hook_to_module(layer, hook)
    return layer


def pack_at_(model: nn.Module, name: str, quantized: QuantizedTensor) -> PackedLayer:
    """Pack the tensor `name` of `model`: a module's `weight`, or a 3-D parameter. Modules that
    share the weight (a tied output head) become layers on the same codes."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if not (key == "weight" and is_packable(module)):
        return pack_parameter_(module, key, PackedTensor.from_quantized(quantized))
    weight = module._parameters["weight"]
    readers = [
        (other, reader)
        for other, reader in model.named_modules(remove_duplicate=False)
        if reader._parameters.get("weight") is weight
    ]
    # under every path: a shared module is packed once, a module that shares the weight is tied
    layer = pack_module(module, quantized)
    for other, reader in readers:
        model.set_submodule(other, layer if reader is module else pack_module(reader, layer))
    return layer


def unpack_linears_(model: nn.Module) -> None:
    """Let linear layers on the CPU hold the floats that their codes stand for, if they fit twice
    into its memory. A forward of one token then takes half the time, with the same results."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, PackedLinear)}
    count, limit = sum(math.prod(m.weight_shape) for m in layers.values()), memory_limit_bytes()
    if 2 * 4 * count > (limit or math.inf):
        return
    for path, layer in layers.items():
        # A mergeable adapter reads the codes.
        of_variant = vars(model.get_submodule(path.rpartition(".")[0])).get("lora_variant")
        if not of_variant and layer.tensor.parts.packed.device.type == "cpu":
            weight = layer.packed_weight.unpacked(layer.compute_dtype)
            model.set_submodule(path, layer.to_layer(nn.Parameter(weight, requires_grad=False)))


def place_empty_(model: nn.Module, path: str, scheme: Scheme) -> PackedLayer:
    """Put a packed layer without values at `path`, its module path in a packed model."""
    # on the meta device, to load with `load_state_dict(assign=True)`
    module_path, is_expert, name = f".{path}".rpartition(f".{FOLDER}.")
    module = model.get_submodule(module_path.strip(".") if is_expert else path)
    weight = parameter_out_in(module, name) if is_expert else weight_out_in(module)
    tensor = PackedTensor.empty(scheme, tuple(weight.shape))
    if is_expert:
        return pack_parameter_(module, name, tensor)
    layer = pack_module(module, tensor)
    for other, same in list(model.named_modules(remove_duplicate=False)):
        if same is module:
            model.set_submodule(other, layer)
    return layer


def tie_weights_(model: PreTrainedModel) -> None:
    """`model.tie_weights()` for models with packed layers."""
    # a layer that the model's class ties to a packed weight becomes one on the same codes
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if not (target.endswith(".weight") and source.endswith(".weight")):
            continue
        path = target.removesuffix(".weight")
        reader = model.get_submodule(path)
        owner = model.get_submodule(source.removesuffix(".weight"))
        if is_packed(owner) and not is_packed(reader):
            model.set_submodule(path, pack_module(reader, owner))
    model.tie_weights()


def forget_ties_(model: PreTrainedModel) -> None:
    """Let the model's configuration say that no weights are tied, once layers have their own."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
