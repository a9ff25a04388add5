"""The proof that a captured graph computes what its module computes: every output, bit for bit, at the example's shape and at others.

Where another shape is concerned there are three cases. The module itself refuses it: that axis is not open. The module takes it, and so does the graph: they
must agree. The module takes it on a path that the graph does not have (the conditions that torch.export assumed do not hold): that axis is not open either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from qwlora.errors import CaptureError
from qwlora.graph.dynamic_shapes import Axes, Place
from qwlora.graph.graph_parameters import module_stack


def prove(
    program: ExportedProgram,
    module: nn.Module,
    tensors: tuple[Tensor, ...],
    axes: Axes,
    outputs: Sequence[str],
) -> set[Place]:
    """Compare the graph of `module(*tensors)` with the module.

    Returns:
        The axes of which no other size could be proved: the module fixes their size.

    Raises:
        CaptureError: an output differs; the message names the first module whose own output does.
    """
    graph = program.module(check_guards=False)
    if difference := _difference(module(*tensors), graph(*tensors), outputs):
        _refuse(program, module, tensors, difference)
    unproved = set(axes.symbols)
    for places, smaller in axes.trials(tensors):
        if not unproved:
            break
        if not unproved.intersection(places):
            continue
        try:
            expected = module(*smaller)
        except Exception:  # whatever a model raises for a size that it does not take
            continue
        try:
            difference = _difference(expected, graph(*smaller), outputs)
        except Exception as error:  # likewise the graph's operators
            difference = f"the graph fails with {type(error).__name__}: {error}"
        if not difference:
            unproved.difference_update(places)
        elif _assumed(program, smaller):
            _refuse(program, module, smaller, difference)
    return unproved


def _difference(expected: Sequence[Tensor], found: Sequence[Tensor], names: Sequence[str]) -> str:
    """What the first output that is not the same says; nothing if all are."""
    for name, one, other in zip(names, expected, found, strict=True):
        if one.shape != other.shape:
            return f"output {name} has shape {list(other.shape)}, not {list(one.shape)}"
        if not _same(one, other):
            largest = f"by {float((one.double() - other.double()).abs().nan_to_num().max()):.3g}"
            return f"output {name} differs {largest}"
    return ""


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _assumed(program: ExportedProgram, tensors: tuple[Tensor, ...]) -> bool:
    """Whether the conditions hold under which the graph was made."""
    try:
        program.module()(*tensors)
    except Exception:  # a guard's own kinds, or what the graph's operators raise for a shape
        return False
    return True


def _refuse(
    program: ExportedProgram, module: nn.Module, tensors: tuple[Tensor, ...], difference: str
) -> None:
    shapes = [list(t.shape) for t in tensors]
    raise CaptureError(
        f"the captured graph does not compute what the module computes at input shapes {shapes}: {difference}. {first_difference(program, module, tensors)}. "
        "Look there for randomness, for state that changes between calls, or for branches on values or shapes"
    )


def first_difference(
    program: ExportedProgram, module: nn.Module, tensors: tuple[Tensor, ...]
) -> str:
    """A sentence about the first module, in the order in which they finish, whose output is not what leaves it in the graph."""
    values: dict[str, Tensor] = {}
    recorder = _Recorder(program.module(check_guards=False), values)
    try:
        recorder.run(*tensors)
    except Exception as error:  # the graph's operators; what came before is known
        stopped = f", after which the graph stops with {type(error).__name__}"
    else:
        stopped = ""
    leaving = _leaving(program)
    for path, kind, output in _module_outputs(module, tensors):
        candidates = [
            values[name]
            for name in leaving.get(path, ())
            if name in values and values[name].shape == output.shape
        ]
        if candidates and not any(_same(output, value) for value in candidates):
            return f"The first module whose output differs is {path.removeprefix('model.') or 'the model'} ({kind}){stopped}"
    return (
        f"Every module that can be compared has the same output; they part between modules{stopped}"
    )


def _module_outputs(
    module: nn.Module, tensors: tuple[Tensor, ...]
) -> list[tuple[str, str, Tensor]]:
    """(path, class name, first tensor of the output) of each module's first call, in the order in which they finish."""
    found: dict[str, tuple[str, str, Tensor]] = {}

    def recorder(path: str) -> Any:
        def record(called: nn.Module, _: Any, output: Any) -> None:
            first = (
                output
                if isinstance(output, Tensor)
                else next((o for o in _values(output) if isinstance(o, Tensor)), None)
            )
            if first is not None:
                found.setdefault(path, (path, type(called).__name__, first.detach().clone()))

        return record

    hooks = [
        inner.register_forward_hook(recorder(path))
        for path, inner in module.named_modules()
        if path
    ]
    try:
        module(*tensors)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def _values(output: Any) -> list[Any]:
    return (
        list(output.values())
        if hasattr(output, "values")
        else list(output)
        if isinstance(output, tuple | list)
        else []
    )


def _leaving(program: ExportedProgram) -> dict[str, list[str]]:
    """By module path, the nodes of its first call that something outside it reads."""
    found: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            for key, path in _calls(node).items():
                if any(key not in _calls(user) for user in node.users):
                    found.setdefault(path, []).append(node.name)
    return found


def _calls(node: Node) -> dict[str, str]:
    """Module path by call; of a module that is called again only the first call counts."""
    return {key: path for key, (path, _) in module_stack(node).items() if "@" not in path}


class _Recorder(Interpreter):
    """Runs a graph and keeps every tensor."""

    def __init__(self, graph: torch.fx.GraphModule, values: dict[str, Tensor]):
        super().__init__(graph)
        self.values = values

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.values[n.name] = result.detach().clone()
        return result
