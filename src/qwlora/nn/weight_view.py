"""The float weight of a packed layer as a tensor that has a shape and a dtype, and computes values
only when an operation needs them.

    F.linear(x, view), x @ view.T, F.embedding(i, view), F.conv2d(x, view), grouped_mm(x, view)
                      products that keep codes for backward, never floats
    view[i], view.T   views
    anything else     computed from the unpacked values

So any module's own forward works on a packed weight. Writing to a view raises, because the write
would be lost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from qwlora.errors import MergeError
from qwlora.nn.packed_matmul import GroupedMatmulFunction, LinearFunction, PackedWeight
from qwlora.nn.packed_tensor import compute_dtype


def refuse_write() -> NoReturn:
    """Raise the error for a write to packed integers."""
    raise MergeError(
        "this layer's weight is packed integers, so an adapter cannot be merged into it: most of "
        "the delta is smaller than a step of the grid and would be lost (`qwlora merge-check` "
        "shows how much). Keep the adapter separate (PeftModel.from_pretrained on the base), or "
        "merge it into a float copy of the model. Initializations that change the base's weights "
        "(pissa, olora, loftq ...) are refused for the same reason"
    )


class WeightView(Tensor):
    """A view of a packed weight, or of one expert of it."""

    packed_weight: PackedWeight

    @staticmethod
    def __new__(cls, packed_weight: PackedWeight) -> WeightView:
        device = packed_weight.owner.tensor.parts.packed.device
        view: WeightView = Tensor._make_wrapper_subclass(
            cls,
            packed_weight.shape,
            dtype=packed_weight.owner.compute_dtype,
            device=device,
            requires_grad=False,
        )
        view.packed_weight = packed_weight
        return view

    def unpacked(self) -> Tensor:
        """The values, in the dtype of the view."""
        return self.packed_weight.unpacked(self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightView:
        return WeightView(
            replace(self.packed_weight, owner=copy.deepcopy(self.packed_weight.owner, memo))
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"WeightView({list(self.shape)}, {self.packed_weight.owner.scheme})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        found = handler(*args, **kwargs) if handler else NotImplemented
        if found is not NotImplemented:
            return found
        if _writes(func, args, kwargs):
            refuse_write()
        if _needs_no_values(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map_only(WeightView, WeightView.unpacked, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch declares it as a method of instances
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = tree_map_only(WeightView, WeightView.unpacked, (args, kwargs or {}))
        return func(*args, **kwargs)


_TRANSPOSES = ("T", "mT", "H", "mH")
_METADATA = (
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point"),
    *("is_complex", "is_contiguous", "stride", "get_device", "__len__", "__hash__"),
)


def _property(func: Callable[..., Any], kind: str) -> str:
    """The attribute that `func` gets (or sets); empty if it does neither."""
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
    if _property(func, "__set__"):
        return _property(func, "__set__") == "data"
    in_place = (name.endswith("_") and not name.endswith("__")) or (
        name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    )
    return (
        (in_place or name == "__setitem__") and bool(args) and isinstance(args[0], WeightView)
    ) or isinstance(kwargs.get("out"), WeightView)


def _matrix(weight: Any, *others: Any) -> PackedWeight | None:
    """The packed weight of a 2-D view; None if it is none, or another operand is one too."""
    if any(isinstance(other, WeightView) for other in others):
        return None
    return weight.packed_weight if isinstance(weight, WeightView) and weight.ndim == 2 else None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    packed = _matrix(weight, x, bias)
    return NotImplemented if packed is None else LinearFunction.apply(x, bias, packed)


def _matmul(x: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
    packed = _matrix(weight, x)
    if packed is None or kwargs or x.ndim < 2:
        return NotImplemented
    return LinearFunction.apply(x, None, packed.transpose())


def _embedding(
    index: Tensor,
    weight: Tensor,
    padding_idx: Any = None,
    max_norm: float | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    packed = _matrix(weight)
    if packed is None or packed.transposed or packed.index is not None or max_norm is not None:
        return NotImplemented
    return packed.owner.tensor.dequantize(weight.dtype, index)


def _grouped(
    x: Tensor,
    weight: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if not isinstance(weight, WeightView) or isinstance(x, WeightView):
        return NotImplemented
    if weight.ndim != 3 or weight.packed_weight.index is not None or x.ndim != 2 or offs is None:
        return NotImplemented
    if bias is not None or out_dtype is not None:
        return NotImplemented
    return GroupedMatmulFunction.apply(x, offs, weight.packed_weight)


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def convolve(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if not isinstance(weight, WeightView) or isinstance(x, WeightView):
            return NotImplemented

        def run(x: Tensor, bias: Tensor | None) -> Tensor:
            values = weight.packed_weight.unpacked(compute_dtype(x))
            return function(x, values, bias, *args, **kwargs)

        if not torch.is_grad_enabled():
            return run(x, bias)
        # backward computes the product again, so that autograd does not keep the values
        result: Tensor = checkpoint(run, x, bias, use_reentrant=False, preserve_rng_state=False)
        return result

    return convolve


def _select(view: Tensor, index: Any) -> Tensor:
    """An expert by its number, or several experts by a tensor of numbers."""
    if not isinstance(view, WeightView) or view.ndim != 3 or view.packed_weight.index is not None:
        return NotImplemented
    is_tensor = isinstance(index, Tensor) and not isinstance(index, WeightView)
    if is_tensor and index.ndim and index.dtype in (torch.int32, torch.int64):
        values = view.packed_weight.owner.tensor.dequantize(view.dtype, index)
        return values.mT if view.packed_weight.transposed else values
    is_number = isinstance(index, int) and not isinstance(index, bool)
    if is_tensor and not index.ndim:
        is_number = not index.is_floating_point() and index.dtype != torch.bool
    return WeightView(view.packed_weight.expert(index)) if is_number else NotImplemented


def _transpose(view: Tensor, first: int = -2, second: int = -1) -> Tensor:
    if not isinstance(view, WeightView) or view.ndim not in (2, 3):
        return NotImplemented
    if {first % view.ndim, second % view.ndim} != {view.ndim - 2, view.ndim - 1}:
        return NotImplemented
    return WeightView(view.packed_weight.transpose())


def _transpose_matrix(view: Tensor) -> Tensor:
    return _transpose(view) if view.ndim == 2 else NotImplemented


def _itself(view: Tensor, *_: Any, **__: Any) -> Tensor:
    return view


def _set(view: Tensor, source: Any = None, *_: Any, **__: Any) -> Tensor:
    return view if source is view else refuse_write()


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul),
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
    **dict.fromkeys((Tensor.detach, torch.detach, Tensor.requires_grad_), _itself),
    Tensor.data.__get__: _itself,  # type: ignore[attr-defined]
    Tensor.set_: _set,
}
