"""A look at the float weight of a packed layer: a tensor with a shape and a type, and no values until an operation asks for them.

    F.linear(x, look), x @ look.T, F.embedding(i, look), F.conv2d(x, look, ...), grouped_mm(x, look, ...)     products that keep codes, never floats
    look[i], look.T                                                                                          looks
    anything else                                                                                            computed from the unpacked values

So a module's own forward, whatever it is, works on a packed weight. Writing to a look is refused: the write would be lost.
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

from qwlora.errors import MergeError
from qwlora.nn.packed_matmul import Convolution, GroupedProduct, Part, Product


def refuse_write() -> NoReturn:
    """Raises: nothing writes to packed integers."""
    raise MergeError(
        "this layer's weight is packed integers: an adapter cannot be merged into it, because most of its delta is smaller than a step of the grid "
        "and would be lost; `qwlora merge-check` shows how much. Keep the adapter separate (PeftModel.from_pretrained on the base), or merge it into a "
        "float copy of the model. Starts that change the base's weights (pissa, olora, loftq ...) are refused for the same reason"
    )


class Look(Tensor):
    """A look at a part of a packed weight."""

    part: Part

    @staticmethod
    def __new__(cls, part: Part) -> Look:
        device = part.owner.tensor.parts.packed.device
        look: Look = Tensor._make_wrapper_subclass(
            cls, part.shape, dtype=part.owner.compute_dtype, device=device, requires_grad=False
        )
        look.part = part
        return look

    def unpacked(self) -> Tensor:
        """The values, in the type of the look."""
        return self.part.unpacked(self.dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Look:
        return Look(replace(self.part, owner=copy.deepcopy(self.part.owner, memo)))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Look({list(self.shape)}, {self.part.owner.scheme})"

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
        if _is_about(func):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map_only(Look, Look.unpacked, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch declares it as a method of instances
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = tree_map_only(Look, Look.unpacked, (args, kwargs or {}))
        return func(*args, **kwargs)


_TURNERS = ("T", "mT", "H", "mH")
_ABOUT = frozenset(
    [
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "element_size",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "stride",
        "get_device",
        "__len__",
        "__hash__",
    ]
)


def _property(func: Callable[..., Any], kind: str) -> str:
    """The attribute that `func` gets (or sets), or nothing."""
    return func.__self__.__name__ if getattr(func, "__name__", "") == kind else ""  # type: ignore[attr-defined]


def _is_about(func: Callable[..., Any]) -> bool:
    """Whether the answer follows from shape, type and device alone."""
    return (
        _property(func, "__get__") not in ("", *_TURNERS, "real", "imag")
        or getattr(func, "__name__", "") in _ABOUT
    )


def _writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if _property(func, "__set__"):
        return _property(func, "__set__") == "data"
    in_place = (name.endswith("_") and not name.endswith("__")) or (
        name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    )
    return (
        (in_place or name == "__setitem__") and bool(args) and isinstance(args[0], Look)
    ) or isinstance(kwargs.get("out"), Look)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if (
        not isinstance(weight, Look)
        or isinstance(x, Look)
        or isinstance(bias, Look)
        or weight.ndim != 2
    ):
        return NotImplemented
    return Product.apply(x, bias, weight.part)


def _matmul(x: Tensor, weight: Tensor, **kwargs: Any) -> Tensor:
    if (
        kwargs
        or not isinstance(weight, Look)
        or isinstance(x, Look)
        or weight.ndim != 2
        or x.ndim < 2
    ):
        return NotImplemented
    return Product.apply(x, None, weight.part.turn())


def _embedding(
    index: Tensor,
    weight: Tensor,
    padding_idx: Any = None,
    max_norm: float | None = None,
    *_: Any,
    **__: Any,
) -> Tensor:
    if (
        not isinstance(weight, Look)
        or weight.part.turned
        or weight.part.which is not None
        or max_norm is not None
    ):
        return NotImplemented
    return weight.part.owner.tensor.dequantize(weight.dtype, index)


def _grouped(
    x: Tensor,
    weight: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if (
        not isinstance(weight, Look)
        or isinstance(x, Look)
        or weight.ndim != 3
        or weight.part.which is not None
        or x.ndim != 2
        or offs is None
    ):
        return NotImplemented
    return (
        GroupedProduct.apply(x, offs, weight.part)
        if bias is None and out_dtype is None
        else NotImplemented
    )


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def convolve(
        x: Tensor,
        weight: Tensor,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if not isinstance(weight, Look) or isinstance(x, Look):
            return NotImplemented
        if isinstance(padding, str):
            x, padding = _padded(x, weight, padding, dilation), 0
        return Convolution.apply(
            x, bias, weight.part, function, (stride, padding, dilation, groups)
        )

    return convolve


def _padded(x: Tensor, weight: Tensor, padding: str, dilation: Any) -> Tensor:
    """`x` with the padding that "same" asks for on it; "valid" asks for none."""
    if padding == "valid":
        return x
    kernel = weight.shape[2:]
    dilations = dilation if isinstance(dilation, tuple) else (dilation,) * len(kernel)
    widths = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    return F.pad(
        x, [side for width in reversed(widths) for side in (width // 2, width - width // 2)]
    )


def _select(look: Tensor, index: Any) -> Tensor:
    if not isinstance(look, Look) or look.part.which is not None or isinstance(index, Look):
        return NotImplemented
    whole = isinstance(index, int) and not isinstance(index, bool)
    if look.ndim == 3 and (
        whole
        or (
            isinstance(index, Tensor)
            and index.ndim == 0
            and not index.is_floating_point()
            and index.dtype != torch.bool
        )
    ):
        return Look(look.part.one(index))
    if look.ndim == 3 and isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64):
        values = look.part.owner.tensor.dequantize(look.dtype, index)
        return values.mT if look.part.turned else values
    return NotImplemented


def _transpose(look: Tensor, first: int, second: int) -> Tensor:
    axes = {first % look.ndim, second % look.ndim}
    return (
        Look(look.part.turn())
        if isinstance(look, Look) and look.ndim in (2, 3) and axes == {look.ndim - 2, look.ndim - 1}
        else NotImplemented
    )


def _turn(look: Look) -> Tensor:
    return Look(look.part.turn()) if look.ndim == 2 or (look.ndim == 3) else NotImplemented


def _turn_matrix(look: Look) -> Tensor:
    return Look(look.part.turn()) if look.ndim == 2 else NotImplemented


def _itself(look: Tensor, *_: Any, **__: Any) -> Tensor:
    return look


def _set(look: Tensor, source: Any = None, *_: Any, **__: Any) -> Tensor:
    return look if source is look else refuse_write()


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul),
    F.embedding: _embedding,
    torch._grouped_mm: _grouped,  # what F.grouped_mm calls, and the one of the two that a tensor may answer for itself
    F.conv1d: _convolution(F.conv1d),
    F.conv2d: _convolution(F.conv2d),
    Tensor.__getitem__: _select,
    **dict.fromkeys((torch.transpose, Tensor.transpose), _transpose),
    Tensor.mT.__get__: _turn,  # type: ignore[attr-defined]
    **dict.fromkeys((Tensor.T.__get__, Tensor.t, torch.t), _turn_matrix),  # type: ignore[attr-defined]
    **dict.fromkeys((Tensor.detach, torch.detach, Tensor.requires_grad_), _itself),
    Tensor.data.__get__: _itself,  # type: ignore[attr-defined]
    Tensor.set_: _set,
}
