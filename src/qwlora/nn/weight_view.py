"""A packed weight W: its products, and a tensor that shows it to code that knows floats only.

    LinearFunction          y = x W^T + b            dL/dx = dL/dy W
    LinearAddFunction       y += x W^T + b, in place
    GroupedMatmulFunction   y[s_e : s_e+1] = x[s_e : s_e+1] W_e
                            one expert is unpacked at a time; experts without rows are skipped

Autograd keeps the layer instead of the float weight; backward unpacks the codes again. The weight
is frozen: it gets no gradient.

`WeightView` has a shape and a dtype, and computes values only when an operation needs them:

    F.linear(x, view), x @ view.T, F.embedding(i, view), F.conv2d(x, view), grouped_mm(x, view)
                      the products above
    view[i], view.T   views
    anything else     computed from the unpacked values

So any module's own forward works on a packed weight. Writing to a view raises.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from qwlora.errors import MergeError
from qwlora.grid.scheme import Scheme
from qwlora.nn.packed_tensor import PackedTensor, compute_dtype


class PackedWeightOwner(nn.Module):
    """What products need of a module with a packed weight; `PackedLayer` is the rest."""

    scheme: Scheme
    compute_dtype: torch.dtype

    @property
    @abstractmethod
    def tensor(self) -> PackedTensor:
        """The packed weight; read for each product, because moving the module replaces it."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed weight of the layer `owner`, or with `index` one expert of it, with values of shape
    `shape`: as stored, or `transposed`, with the last two axes exchanged."""

    owner: PackedWeightOwner
    shape: tuple[int, ...]
    index: Tensor | int | None = None
    transposed: bool = False

    def unpacked_for(self, x: Tensor) -> Tensor:
        """The float values for a product with `x`."""
        # in the dtype that a float weight would have, so that torch refuses an `x` of another dtype
        return self.unpacked(compute_dtype(x, self.owner.compute_dtype))

    @property
    def is_folded(self) -> bool:
        """Whether the codes have fewer axes than the weight, as in a convolution."""
        return len(self.owner.tensor.shape) != len(self.shape) + (self.index is not None)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The float values."""
        values = self.owner.tensor.dequantize(dtype, self.index)
        return values.mT if self.transposed else values.view(self.shape)

    def transpose(self) -> PackedWeight:
        """The same weight with its last two axes exchanged."""
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return replace(self, shape=shape, transposed=not self.transposed)

    def expert(self, index: Tensor | int) -> PackedWeight:
        """One entry of the first axis."""
        return PackedWeight(self.owner, self.shape[1:], index, self.transposed)


class LinearFunction(torch.autograd.Function):
    """`F.linear` with a weight [out, in]."""

    # The weight is a plain handle: a tensor subclass as an argument costs 100 us more per layer and
    # step (docs/log/grid.md, unpacking codes).
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: PackedWeight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.unpacked_for(x), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return *_gradients(gradient, ctx.weight, *ctx.needs_input_grad[:2]), None


class LinearAddFunction(torch.autograd.Function):
    """`y += F.linear(x, weight, bias)`, in place; x and y have one dtype, used for the product."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, bias: Tensor | None, weight: PackedWeight
    ) -> Tensor:
        ctx.weight = weight
        ctx.mark_dirty(y)
        rows = y.view(-1, y.shape[-1])
        rows.addmm_(x.reshape(-1, x.shape[-1]), weight.unpacked(x.dtype).T)
        if bias is not None:
            rows += bias
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        return gradient, *_gradients(gradient, ctx.weight, *ctx.needs_input_grad[1:3]), None


class GroupedMatmulFunction(torch.autograd.Function):
    """`F.grouped_mm`: rows `offs[e - 1]` to `offs[e]` of `x` belong to expert `e`, whose weight is
    [in, out]. Rows after the last offset give zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offs: Tensor, weight: PackedWeight) -> Tensor:
        ctx.weight, ctx.ends = weight, offs.tolist()
        return _by_group(x.to(compute_dtype(x)), ctx.ends, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _by_group(gradient, ctx.ends, ctx.weight.transpose()), None, None


def _gradients(
    gradient: Tensor, weight: PackedWeight, of_x: bool, of_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    grad_x = gradient @ weight.unpacked(gradient.dtype) if of_x else None
    return grad_x, gradient.reshape(-1, gradient.shape[-1]).sum(0) if of_bias else None


def _by_group(x: Tensor, ends: list[int], weight: PackedWeight) -> Tensor:
    y = x.new_zeros((len(x), weight.shape[-1]))
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if end > start:
            torch.mm(x[start:end], weight.expert(expert).unpacked(x.dtype), out=y[start:end])
    return y


def refuse_write() -> NoReturn:
    """Refuse a write to packed integers, which would be lost."""
    raise MergeError(
        "An adapter cannot be merged into packed integers: most of it is smaller than a step of "
        "the grid (`qwlora merge JOB NAME` measures it). Keep the adapter separate, or merge it "
        "into a float copy of the model. Initializations that change the base's weights (pissa, "
        "olora, loftq ...) are refused for the same reason"
    )


class WeightView(Tensor):
    """A view of a packed weight, or of one expert of it."""

    packed_weight: PackedWeight
    # transformers 5 initializes what a checkpoint does not have, unless it is marked
    _is_hf_initialized = True

    @staticmethod
    def __new__(cls, packed_weight: PackedWeight) -> WeightView:
        device = packed_weight.owner.tensor.parts.packed.device
        options: Any = {"dtype": packed_weight.owner.compute_dtype, "device": device}
        view: WeightView = Tensor._make_wrapper_subclass(cls, packed_weight.shape, **options)
        view.packed_weight = packed_weight
        return view

    def unpacked(self) -> Tensor:
        """The values, in the dtype of the view."""
        return self.packed_weight.unpacked(self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightView:
        owner = copy.deepcopy(self.packed_weight.owner, memo)
        return WeightView(replace(self.packed_weight, owner=owner))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"WeightView({list(self.shape)}, {self.packed_weight.owner.scheme})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        result = handler(*args, **kwargs) if handler else NotImplemented
        if result is not NotImplemented:
            return result
        if _writes(func, args, kwargs):
            refuse_write()
        if _needs_no_values(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map_only(WeightView, WeightView.unpacked, (args, kwargs))
        return func(*args, **kwargs)

    # torch declares it as a method of instances
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(WeightView, WeightView.unpacked, (args, kwargs or {}))
        return func(*args, **kwargs)


_TRANSPOSES = ("T", "mT", "H", "mH")
_METADATA = (
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point"),
    *("is_complex", "is_contiguous", "stride", "get_device", "__len__", "__hash__"),
)


def _property(func: Callable[..., Any], kind: str) -> str:
    # torch passes the getter of `x.shape` as `Tensor.shape.__get__`
    if getattr(func, "__name__", "") != kind:
        return ""
    return func.__self__.__name__  # type: ignore[attr-defined]


def _needs_no_values(func: Callable[..., Any]) -> bool:
    """Whether the result depends on shape, dtype and device alone."""
    return (
        _property(func, "__get__") not in ("", *_TRANSPOSES, "real", "imag")
        or getattr(func, "__name__", "") in _METADATA
    )


def _writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    # `grad` and `requires_grad` may be set
    if _property(func, "__set__"):
        return _property(func, "__set__") == "data"
    in_place = (name.endswith("_") and not name.endswith("__")) or (
        name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    )
    written = args[0] if args and (in_place or name == "__setitem__") else kwargs.get("out")
    return isinstance(written, WeightView)


def _matrix(weight: Any, *others: Any) -> PackedWeight | None:
    """The packed weight of a 2-D view; None if it is none, or another operand is one too."""
    if any(isinstance(other, WeightView) for other in others):
        return None
    return weight.packed_weight if isinstance(weight, WeightView) and weight.ndim == 2 else None


# Handlers have torch's parameter names, so that calls by keyword work.


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    packed = _matrix(weight, input, bias)
    return NotImplemented if packed is None else LinearFunction.apply(input, bias, packed)


def _matmul(input: Tensor, other: Tensor, **kwargs: Any) -> Tensor:
    packed = _matrix(other, input)
    if packed is None or kwargs or input.ndim < 2:
        return NotImplemented
    return LinearFunction.apply(input, None, packed.transpose())


def _mm(input: Tensor, mat2: Tensor, **kwargs: Any) -> Tensor:
    return _matmul(input, mat2, **kwargs) if input.ndim == 2 else NotImplemented


def _embedding(
    input: Tensor, weight: Tensor, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
) -> Tensor:
    packed = _matrix(weight)
    if packed is None or packed.transposed or packed.index is not None or max_norm is not None:
        return NotImplemented
    return packed.owner.tensor.embedding(input, weight.dtype, padding_idx)


def _grouped(
    x: Tensor, weight: Tensor, *, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Tensor:
    if not isinstance(weight, WeightView) or isinstance(x, WeightView):
        return NotImplemented
    if weight.ndim != 3 or weight.packed_weight.index is not None or x.ndim != 2 or offs is None:
        return NotImplemented
    # torch refuses an `x` of another dtype, in its own words
    is_refused = compute_dtype(x) != compute_dtype(x, weight.dtype)
    if is_refused or bias is not None or out_dtype is not None:
        return NotImplemented
    return GroupedMatmulFunction.apply(x, offs, weight.packed_weight)


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def convolve(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not isinstance(weight, WeightView) or isinstance(input, WeightView):
            return NotImplemented

        def run(x: Tensor, bias: Tensor | None) -> Tensor:
            return function(x, weight.packed_weight.unpacked_for(x), bias, *args, **kwargs)

        if not torch.is_grad_enabled():
            return run(input, bias)
        # backward computes the product again, so that autograd does not keep the values
        result: Tensor = checkpoint(run, input, bias, use_reentrant=False, preserve_rng_state=False)
        return result

    return convolve


def _select(view: Tensor, index: Any) -> Tensor:
    """An expert by its number, or several experts by a tensor of numbers."""
    if not isinstance(view, WeightView) or view.ndim != 3 or view.packed_weight.is_folded:
        return NotImplemented
    is_tensor = isinstance(index, Tensor) and not isinstance(index, WeightView)
    if is_tensor and index.ndim and index.dtype in (torch.int32, torch.int64):
        values = view.packed_weight.owner.tensor.dequantize(view.dtype, index)
        return values.mT if view.packed_weight.transposed else values
    is_number = isinstance(index, int) and not isinstance(index, bool)
    if is_number and not -len(view) <= index < len(view):
        return NotImplemented
    # uint8 and bool are masks
    if is_tensor and not index.ndim:
        is_number = not index.is_floating_point() and index.dtype not in (torch.uint8, torch.bool)
    return WeightView(view.packed_weight.expert(index)) if is_number else NotImplemented


def _transpose(input: Tensor, dim0: int = -2, dim1: int = -1) -> Tensor:
    if not isinstance(input, WeightView) or input.packed_weight.is_folded:
        return NotImplemented
    if {dim0, dim1} not in ({-2, -1}, {input.ndim - 2, input.ndim - 1}):
        return NotImplemented
    return WeightView(input.packed_weight.transpose())


def _transpose_matrix(input: Tensor) -> Tensor:
    return _transpose(input) if input.ndim == 2 else NotImplemented


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.mm, Tensor.mm), _mm),
    F.embedding: _embedding,
    # F.grouped_mm calls it, and only this one goes through __torch_function__
    torch._grouped_mm: _grouped,
    F.conv1d: _convolution(F.conv1d),
    F.conv2d: _convolution(F.conv2d),
    Tensor.__getitem__: _select,
    **dict.fromkeys((torch.transpose, Tensor.transpose), _transpose),
    Tensor.mT.__get__: _transpose,  # type: ignore[attr-defined]
    Tensor.T.__get__: _transpose_matrix,  # type: ignore[attr-defined]
    **dict.fromkeys((Tensor.t, torch.t), _transpose_matrix),
    **dict.fromkeys(
        (Tensor.detach, torch.detach, Tensor.requires_grad_, Tensor.data.__get__),  # type: ignore[attr-defined]
        lambda view, *_, **__: view,
    ),
    Tensor.set_: lambda view, source=None, *_, **__: view if source is view else refuse_write(),
}
