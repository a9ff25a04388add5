"""Rotate a float model so that its weights and activations are easier to quantize; its outputs stay
the same (QuaRot, https://arxiv.org/abs/2404.00456; SpinQuant, https://arxiv.org/abs/2405.16406).

Let h [width] be a token's residual stream and Q [width, width] orthogonal. A root mean square norm
commutes with Q once its gain g is moved into the layers that read it:

    embedding                E <- E Q
    layers that read h       W <- W diag(g) Q, g <- 1
    layers that write to h   W <- Q^T W, b <- Q^T b
    within each head         value W <- P^T W, b <- P^T b; output W <- W P

Q is a random diagonal of signs times `H (x) O`. H is a Hadamard matrix whose size is the largest
power of two that divides the width, and O a random orthogonal matrix. P is the same for the width
of a head. Q spreads outliers of a few channels over all of them. Nothing is added at run time.

The captured graph shows which layers read and write the stream; no architecture is known by name.
These modules are refused, and the message names their path:

- LayerNorm, which subtracts the mean of channels
- a norm between a layer and the sum that it writes to (Gemma 2 and 3, OLMo 2): its gain stays there
- experts in one tensor, convolutions and other readers of the stream that are not linear layers
- weights that the example does not reach, such as a vision tower: they may write to the stream
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from transformers import PreTrainedModel

from qwlora.errors import CaptureError, listed
from qwlora.graph.capturable_model import HALF
from qwlora.graph.capture import Captured, FlatModel, capture
from qwlora.graph.nodes import (
    MOVES_DATA,
    SOFTMAXES,
    calls,
    module_of,
    moved_from,
    operation,
    origin,
    parameter_names,
    place_of,
    used_placeholders,
)
from qwlora.graph.rewrites import rewritten
from qwlora.nn import packed_weights
from qwlora.nn.packed_layer import forget_ties_
from qwlora.quantize.tuned_parameters import gain_constant
from qwlora.system.device import device_of, moved

# Data movement that leaves the last axis as it is, if its size stays the same.
_OTHER_AXES = """view reshape _unsafe_view slice select index index_select expand squeeze unsqueeze
clone contiguous alias detach to _to_copy"""
_KEEPS_LAST_AXIS = MOVES_DATA & frozenset(_OTHER_AXES.split())
LARGEST_DIFFERENCE = 1e-3  # relative to the largest output; wrong outputs differ by about 1
_ROWS = 4096  # rows of a weight that are in float64 at a time


@dataclass(frozen=True)
class Rotation:
    """`x Q` along the last axis of a tensor [..., width], or [..., heads * width] in each head."""

    signs: Tensor
    orthogonal: Tensor

    @classmethod
    def random(cls, width: int, seed: int) -> Rotation:
        """A random rotation, which depends only on the seed and on the build of torch."""
        generator = torch.Generator().manual_seed(seed)
        # `width & -width` is the largest power of two that divides the width.
        odd = width // (width & -width)
        signs = torch.randint(2, (width,), generator=generator, dtype=torch.float64) * 2 - 1
        square = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
        return cls(signs, torch.linalg.qr(square)[0])

    def __call__(self, x: Tensor) -> Tensor:
        """`x Q`, computed in float64 and returned in the dtype of x."""
        rows = x.reshape(-1, len(self.signs))
        out = torch.empty_like(rows)
        for start in range(0, len(rows), _ROWS):
            out[start : start + _ROWS] = self._rotated(rows[start : start + _ROWS].double())
        return out.view(x.shape)

    def _rotated(self, rows: Tensor) -> Tensor:
        odd = len(self.orthogonal)
        spread = (rows * self.signs.to(rows.device)).view(len(rows), -1, odd)
        size = spread.shape[1]
        step = 1
        while step < size:  # the fast Walsh-Hadamard transform
            pairs = spread.view(len(rows), size // (2 * step), 2, step, odd)
            first, second = pairs.unbind(2)
            spread = torch.stack((first + second, first - second), 2).view(len(rows), size, odd)
            step *= 2
        spread = spread @ self.orthogonal.to(rows.device) / math.sqrt(size)
        return spread.reshape(len(rows), -1)


@dataclass(frozen=True)
class RotationReport:
    """The rotated layers, and the largest change of the outputs on the example."""

    width: int
    readers: tuple[str, ...]  # layers that read the residual stream
    writers: tuple[str, ...]
    heads: tuple[tuple[str, str], ...]  # pairs of a value and an output layer, rotated in each head
    untied: tuple[str, ...]  # layers that were tied and now have their own weight
    difference: float  # largest change of an output, relative to the largest output


@dataclass
class _Plan:
    width: int
    readers: dict[str, str | None] = field(default_factory=dict)  # and their norms
    writers: dict[str, None] = field(default_factory=dict)
    heads: dict[tuple[str, str], int] = field(default_factory=dict)  # width of a head


@torch.no_grad()
def rotate_(model: nn.Module, example_inputs: Mapping[str, Any], seed: int = 0) -> RotationReport:
    """Rotate the residual stream and the heads of a float model in place, before quantization.

    Args:
        model: the float model.
        example_inputs: as for `simulate`. Every weight must affect the outputs.
        seed: seed of the random rotation.

    Returns:
        The rotated layers, and the largest change of the outputs.

    Raises:
        CaptureError: the model cannot be captured, or a module that cannot be rotated reads or
            writes the residual stream (the model is unchanged), or the outputs differ.

    If it is interrupted, or the outputs differ, the model is only partly rotated: load it again.
    """
    if packed := list(packed_weights(model)):
        raise _cannot(f"{packed[0]} holds integers already. Rotate before quantize_")
    if halves := [name for name, p in model.named_parameters() if p.dtype in HALF]:
        raise _cannot(f"{halves[0]} would be rounded again. Call model.float() first")
    captured = capture(model, example_inputs, static=True)
    plan = _planned(captured, model)
    inputs = moved(captured.bind(example_inputs), device_of(model))
    flat = FlatModel(model, captured.arguments)
    before = flat(*inputs)
    untied = _untie_(model, plan)
    _apply_(model, plan, seed)
    after = flat(*inputs)
    difference = max(
        ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item()
        for a, b in zip(before, after, strict=True)
        if a.is_floating_point()
    )
    if not difference <= LARGEST_DIFFERENCE:
        raise CaptureError(
            f"the rotated {type(model).__name__} computes something else: outputs differ by "
            f"{difference:.2g} of the largest one (at most {LARGEST_DIFFERENCE:g} is rounding). "
            "Load the model again and use it without a rotation; please report this"
        )
    return RotationReport(
        plan.width, tuple(plan.readers), tuple(plan.writers), tuple(plan.heads), untied, difference
    )


def _planned(captured: Captured, model: nn.Module) -> _Plan:
    program = rewritten(captured.program)
    used, names = used_placeholders(program), parameter_names(program)
    if unused := sorted(set(names.values()) - {names[name] for name in names if name in used}):
        raise _cannot(
            f"the example inputs do not reach {listed(unused)}, which may write to the residual "
            "stream too. Give inputs that use every part, or load that part alone"
        )
    nodes = calls(program)
    tables = [node for node in nodes if operation(node) == "embedding"]
    if not tables:
        raise _cannot("the graph has no embedding, at which its residual stream would begin")
    plan = _Plan(int(tables[0].meta["val"].shape[-1]))
    _Stream(model, plan).follow(tables[0])
    if not any(plan.readers.values()):
        raise _cannot("no root mean square norm reads the residual stream")
    for node in nodes:
        _find_heads(node, model, plan)
    return plan


class _Stream:
    """The values of the residual stream, and the nodes that read and write them."""

    def __init__(self, model: nn.Module, plan: _Plan):
        self.model, self.plan = model, plan
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.seen: set[Node] = set()

    def follow(self, start: Node) -> None:
        """Add `start` and all values that belong to the stream because of it."""
        waiting = [start]
        while waiting:
            node = waiting.pop()
            if node not in self.seen:
                self.seen.add(node)
                waiting += [*self._before(node), *self._after(node)]

    def _before(self, node: Node) -> Iterator[Node]:
        """Values of the stream that `node` is computed from."""
        name = operation(node)
        match name:
            case "embedding" | "linear":
                self.plan.writers[self._layer(node)] = None
            case "add" | "sub":
                for term in node.args[:2]:
                    if not isinstance(term, Node):
                        raise _cannot(f"{place_of(node)} adds a number to the residual stream")
                    yield term
            case "mul" | "div":
                yield self._scaled(node)
            case _ if self._keeps_last_axis(node):
                yield node.args[0]  # type: ignore[misc]
            case "rms_norm":
                raise _cannot(
                    f"the norm {place_of(node)} is between a layer and the residual stream, and "
                    "its gain cannot be moved elsewhere"
                )
            case _:
                raise _cannot(f"{name} of {place_of(node)} writes to the residual stream")

    def _after(self, node: Node) -> Iterator[Node]:
        """Values of the stream that are computed from `node`."""
        for user in node.users:
            name = operation(user)
            if user.op == "output":
                raise _cannot(f"the model returns its residual stream (of {place_of(node)})")
            if name == "rms_norm":
                norm = module_of(user)[0]
                if "@" in norm or gain_constant(self.model.get_submodule(norm)) is None:
                    raise _cannot(f"the gain of {place_of(user)} cannot be moved to another layer")
                self._read_norm(user, norm)
            elif name == "linear" and user.args[0] is node:
                self._read(user, None)
            elif (
                name in ("add", "sub")
                or (name in ("mul", "div") and self._scaled(user) is node)
                or self._keeps_last_axis(user)
            ):
                yield user
            elif name == "layer_norm":
                raise _cannot(f"{place_of(user)} is a LayerNorm, which subtracts the mean")
            elif "norm" in name or name in ("pow", "mean", "var_mean"):
                raise _cannot(f"{place_of(user)} is not a root mean square norm with a gain")
            elif not name.startswith("sym_size"):
                raise _cannot(f"{name} of {place_of(user)} reads the residual stream")

    def _scaled(self, node: Node) -> Any:
        """The factor of a product whose other factor is one number, or one number per token."""
        first, second = node.args[:2]
        if _is_one_number(second):
            return first
        if operation(node) == "mul" and _is_one_number(first):
            return second
        raise _cannot(
            f"{operation(node)} of {place_of(node)} multiplies each channel of the residual "
            "stream by another number"
        )

    def _keeps_last_axis(self, node: Node) -> bool:
        value = node.meta.get("val")
        return (
            operation(node) in _KEEPS_LAST_AXIS
            and isinstance(value, Tensor)
            and value.ndim > 0
            and value.shape[-1] == self.plan.width
        )

    def _read_norm(self, node: Node, norm: str) -> None:
        for user in node.users:
            if operation(user) == "linear" and user.args[0] is node:
                self._read(user, norm)
            elif self._keeps_last_axis(user):
                self._read_norm(user, norm)
            else:
                raise _cannot(
                    f"{operation(user) or 'the result'} of {place_of(user)} reads the norm {norm}, "
                    "and only linear layers may"
                )

    def _read(self, node: Node, norm: str | None) -> None:
        path = self._layer(node)
        if self.plan.readers.setdefault(path, norm) != norm:
            raise _cannot(f"{path} reads two norms")

    def _layer(self, node: Node) -> str:
        path = module_of(node)[0]
        weight: Any = node.args[1 if operation(node) == "linear" else 0]  # embedding(table, ids)
        module = self.modules.get(path)
        stored: Any = None if module is None else module._parameters.get("weight")
        is_plain = stored is not None and isinstance(weight, Node) and weight.op == "placeholder"
        # "@" is in the path of a module that runs more than once.
        if "@" in path or not is_plain or stored.shape != weight.meta["val"].shape:
            raise _cannot(
                f"{place_of(node)} ({type(module).__name__}) reads or writes the residual stream, "
                "and is not a plain layer with one weight that runs once"
            )
        return path


def _is_one_number(argument: Any) -> bool:
    if isinstance(argument, Node):
        shape = argument.meta["val"].shape
        return not shape or shape[-1] == 1
    return isinstance(argument, int | float)


def _find_heads(node: Node, model: nn.Module, plan: _Plan) -> None:
    """Add an attention's value layer and output layer to the plan, if both are plain."""
    arguments: Any = node.args
    match operation(node):
        case "scaled_dot_product_attention":
            values = arguments[2]
        case "matmul" | "bmm" if operation(origin(arguments[0])) in SOFTMAXES:
            values = arguments[1]
        case _:
            return
    width, source, target = int(values.meta["val"].shape[-1]), values, node
    while (before := moved_from(source)) is not None:
        # In Phi-3, for example, one layer also computes queries and keys.
        if source.meta["val"].numel() < before.meta["val"].numel():
            return
        source = before
    while len(target.users) == 1 and operation(next(iter(target.users))) in MOVES_DATA:
        target = next(iter(target.users))
    readers = list(target.users)
    if len(readers) != 1 or {operation(source), operation(readers[0])} != {"linear"}:
        return
    pair = module_of(source)[0], module_of(readers[0])[0]
    value, out = map(dict(model.named_modules(remove_duplicate=False)).get, pair)
    if not (isinstance(value, nn.Linear) and isinstance(out, nn.Linear)):
        return
    if value.out_features % width == 0 == out.in_features % width:
        plan.heads[pair] = width


def _untie_(model: nn.Module, plan: _Plan) -> tuple[str, ...]:
    # A weight that both reads and writes, such as a tied head, becomes two different weights.
    first: dict[int, tuple[bool, str | None]] = {}
    untied = []
    for path in (*plan.writers, *plan.readers):
        layer: Any = model.get_submodule(path)
        role = path in plan.writers, plan.readers.get(path)
        if first.setdefault(id(layer.weight), role) != role:
            layer.weight = nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)
            untied.append(path)
    if untied and isinstance(model, PreTrainedModel):
        forget_ties_(model)
    return tuple(untied)


def _apply_(model: nn.Module, plan: _Plan, seed: int) -> None:
    stream = Rotation.random(plan.width, seed)
    for layer, norm in _once(model, plan.readers):
        if norm is not None:
            module: Any = model.get_submodule(norm)
            layer.weight.mul_(gain_constant(module) + module.weight)
        layer.weight.copy_(stream(layer.weight))
    for norm in {norm for norm in plan.readers.values() if norm is not None}:
        module = model.get_submodule(norm)
        module.weight.fill_(1 - (gain_constant(module) or 0))
    for layer, _ in _once(model, plan.writers):
        if isinstance(layer, nn.Embedding):
            layer.weight.copy_(stream(layer.weight))
        else:
            _rotate_outputs_(layer, stream)
    for (value, out), width in plan.heads.items():
        rotate = Rotation.random(width, seed)
        _rotate_outputs_(model.get_submodule(value), rotate)
        after: Any = model.get_submodule(out)
        after.weight.copy_(rotate(after.weight))


def _once(model: nn.Module, paths: Mapping[str, str | None]) -> Iterator[tuple[Any, str | None]]:
    # A weight that two layers share is rotated once.
    seen = set[int]()
    for path, norm in paths.items():
        layer: Any = model.get_submodule(path)
        if id(layer.weight) not in seen:
            seen.add(id(layer.weight))
            yield layer, norm


def _rotate_outputs_(layer: Any, rotation: Rotation) -> None:
    layer.weight.copy_(rotation(layer.weight.mT.contiguous()).mT)
    if layer.bias is not None:
        layer.bias.copy_(rotation(layer.bias))


def _cannot(why: str) -> CaptureError:
    return CaptureError(f"the model cannot be rotated: {why}")
