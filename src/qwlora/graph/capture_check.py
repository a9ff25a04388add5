"""Check that a captured graph returns the outputs of its module, bit for bit, at several shapes.

At the example's shape they must agree. At another shape

    the module raises                                        the axis is fixed
    the module runs, the graph agrees                        the axis is dynamic
    the module runs, torch.export's assumptions don't hold   the axis is fixed
    the module runs, they hold, the graph differs            CaptureError
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from qwlora.errors import CaptureError
from qwlora.graph.dynamic_shapes import Axes, AxisIndex
from qwlora.graph.graph_parameters import module_stack


def check_graph(
    program: ExportedProgram,
    module: nn.Module,
    tensors: tuple[Tensor, ...],
    axes: Axes,
    outputs: Sequence[str],
) -> set[AxisIndex]:
    """Compare the graph of `module(*tensors)` with the module.

    Returns:
        The axes that have the example's size only.

    Raises:
        CaptureError: an output differs. The message names the first module whose output differs.
    """
    graph = program.module(check_guards=False)
    if difference := _difference(module(*tensors), graph(*tensors), outputs):
        _refuse(program, module, tensors, difference)
    fixed = set(axes.symbols)
    for places, smaller in axes.trials(tensors):
        if not fixed:
            break
        if not fixed.intersection(places):
            continue
        try:
            expected = module(*smaller)
        except Exception:  # models raise anything for a size they do not support
            continue
        try:
            difference = _difference(expected, graph(*smaller), outputs)
        except Exception as error:  # so do the graph's operators
            difference = f"the graph fails with {type(error).__name__}: {error}"
        if not difference:
            fixed.difference_update(places)
        elif _assumed(program, smaller):
            _refuse(program, module, smaller, difference)
    return fixed


def _difference(expected: Sequence[Tensor], found: Sequence[Tensor], names: Sequence[str]) -> str:
    """The first difference in words; empty if all outputs are equal."""
    for name, one, other in zip(names, expected, found, strict=True):
        if one.shape != other.shape:
            return f"output {name} has shape {list(other.shape)} instead of {list(one.shape)}"
        if not _same(one, other):
            largest = f"by {float((one.double() - other.double()).abs().nan_to_num().max()):.3g}"
            return f"output {name} differs {largest}"
    return ""


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _assumed(program: ExportedProgram, tensors: tuple[Tensor, ...]) -> bool:
    """Whether torch.export's assumptions (guards) hold for `tensors`."""
    try:
        program.module()(*tensors)
    except Exception:  # guards and operators raise many types
        return False
    return True


def _refuse(
    program: ExportedProgram, module: nn.Module, tensors: tuple[Tensor, ...], difference: str
) -> None:
    shapes = [list(t.shape) for t in tensors]
    raise CaptureError(
        f"the captured graph differs from the module at input shapes {shapes}: {difference}. "
        f"{first_difference(program, module, tensors)}. Look there for randomness, for state that "
        "changes between calls, or for branches on values or shapes"
    )


def first_difference(
    program: ExportedProgram, module: nn.Module, tensors: tuple[Tensor, ...]
) -> str:
    """A sentence that names the first module, in order of completion, whose output differs."""
    values: dict[str, Tensor] = {}
    recorder = _Recorder(program.module(check_guards=False), values)
    try:
        recorder.run(*tensors)
    except Exception as error:  # from an operator; earlier values are known
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
            name = path.removeprefix("model.") or "the model"
            return f"The first module whose output differs is {name} ({kind}){stopped}"
    return (
        "Every module that can be compared has the same output; the difference arises between "
        f"modules{stopped}"
    )


def _module_outputs(
    module: nn.Module, tensors: tuple[Tensor, ...]
) -> list[tuple[str, str, Tensor]]:
    """(path, class, first output tensor) of each module's first call, in order of completion."""
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
    if isinstance(output, Mapping):
        return list(output.values())
    return list(output) if isinstance(output, tuple | list) else []


def _leaving(program: ExportedProgram) -> dict[str, list[str]]:
    """By module path, the nodes of its first call that are read outside of it."""
    found: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            for key, path in _calls(node).items():
                if any(key not in _calls(user) for user in node.users):
                    found.setdefault(path, []).append(node.name)
    return found


def _calls(node: Node) -> dict[str, str]:
    """Module path by call; only the first call of a module counts."""
    return {key: path for key, (path, _) in module_stack(node).items() if "@" not in path}


class _Recorder(Interpreter):
    """Runs a graph and records every tensor."""

    def __init__(self, graph: torch.fx.GraphModule, values: dict[str, Tensor]):
        super().__init__(graph)
        self.values = values

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.values[n.name] = result.detach().clone()
        return result
