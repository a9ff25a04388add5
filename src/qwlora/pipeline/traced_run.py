"""What a computation allocates and computes, without computing it: torch runs its operators on
tensors that have shapes but no data.

    peak       most bytes alive at one time, of tensors that the computation itself makes
    products   (rows, inner, out) of each matrix product, and how often
    moved      bytes that the other operators read and write
    operators  how many operators run
    outputs    bytes of all their results together

So the figures follow from the code of the model and of transformers, whatever the architecture. The
caller makes model and inputs within `FakeTensorMode`.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_MATRIX = {
    _aten.mm.default: 0,
    _aten.addmm.default: 1,
    _aten.addmm_.default: 1,
}  # where the first factor is
_BATCHED = {_aten.bmm.default: 0, _aten.baddbmm.default: 1}
_ATTENTION = {  # products of [tokens, width] with [width, tokens] in each head
    _aten._scaled_dot_product_flash_attention_for_cpu.default: 2,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 5,
}


@dataclass
class TracedRun:
    """See the module's docstring."""

    peak: int = 0
    products: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    moved: int = 0
    operators: int = 0
    outputs: int = 0


def traced_run(call: Callable[[], Any]) -> TracedRun:
    """Run `call`, which must not read the value of any tensor."""
    mode = _Counting()
    with mode:
        call()
    return mode.run


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.run = TracedRun()
        self._alive: dict[int, int] = {}
        self._bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args, **(kwargs or {}))
        given = list(_tensors((args, kwargs)))
        known = {id(t.untyped_storage()) for t in given}
        result = func(*args, **(kwargs or {}))
        made = list(_tensors(result))
        self.run.operators += 1
        is_view = (
            all(id(t.untyped_storage()) in known for t in made) and not func._schema.is_mutable
        )
        if func in _MATRIX:
            first, second = args[_MATRIX[func]], args[_MATRIX[func] + 1]
            self.run.products[first.shape[0], first.shape[1], second.shape[1]] += 1
        elif func in _BATCHED:
            first, second = args[_BATCHED[func]], args[_BATCHED[func] + 1]
            shape = first.shape[1], first.shape[2], second.shape[2]
            self.run.products[shape] += first.shape[0]
        elif func in _ATTENTION:
            query = next(t for t in given if t.ndim == 4)
            batch, heads, tokens, width = query.shape
            self.run.products[tokens, width, tokens] += _ATTENTION[func] * batch * heads
        elif not is_view:
            self.run.moved += sum(t.nbytes for t in (*given, *made))
        if not is_view:
            self.run.outputs += sum(t.nbytes for t in made)
        for tensor in made:
            if id(tensor.untyped_storage()) not in known:  # else a view, perhaps of a weight
                self._keep(tensor)
        return result

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self._bytes += storage.nbytes()
        self.run.peak = max(self.run.peak, self._bytes)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self._bytes -= self._alive.pop(key, 0)


def _tensors(values: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            yield leaf


def product_flops(run: TracedRun) -> float:
    """Multiplications and additions of all products."""
    return sum(2.0 * math.prod(shape) * count for shape, count in run.products.items())
