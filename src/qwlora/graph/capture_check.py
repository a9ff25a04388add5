"""Check that a captured graph returns the outputs of its module, bit for bit, at several shapes.

At the example's shape they must agree. At another shape

    the module raises                    the axis is fixed
    the module runs, the graph agrees    the axis is dynamic
    the module runs, the graph raises    the axis is fixed, unless another size is proven
    the module runs, the graph differs   CaptureError

torch.export gives each axis that the model does not fix a symbol, and axes of equal size the same
symbol. Symbols are named

    batch      axis 0 of every input that has as many rows as the first
    tokens     axis 1 of the first integer matrix
    past       axis 2 of cached keys and values
    NAME.AXIS  anything else: `pixel_values.2`

Where the model branches on a size, torch.export follows the example's branch and notes which sizes
take it (`x.size()[1] <= 10`). Each note is tested at the nearest smaller and larger sizes that
violate it. If module and graph both run there but differ, or if the test is too expensive, the axis
is fixed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.numbers import int_oo

from qwlora.errors import CaptureError
from qwlora.graph.nodes import module_stack
from qwlora.graph.quantized_graph import rebuilt

BATCH, TOKENS, PAST = "batch", "tokens", "past"
Tensors = tuple[Tensor, ...]
AxisIndex = tuple[int, int]  # (index of an input, axis)
_SIZES = 4096  # largest size tried to break a note, besides the numbers in it
_SIZE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
# In a trial, an axis may grow by this factor, or by more if (number of values) * (size of the axis)
# stays below _WORK: the cost of attention grows with both.
_GROWTH, _WORK = 4, 2**24


@dataclass(frozen=True)
class Axes:
    """The dynamic axes of a program's inputs, with sizes of the example and names of symbols."""

    names: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    symbols: Mapping[AxisIndex, str]
    labels: Mapping[str, str]

    @classmethod
    def of(
        cls,
        program: ExportedProgram,
        names: tuple[str, ...],
        tensors: Tensors,
        cached: Collection[str] = (),
    ) -> Axes:
        """The dynamic axes of a program; `cached` inputs are cached keys and values."""
        values = {n.name: n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"}
        symbols: dict[AxisIndex, str] = {}
        labels: dict[str, str] = {}
        batch = next(t.shape[0] for t in tensors if t.ndim)
        inputs = zip(names, tensors, program.graph_signature.user_inputs, strict=True)
        for index, (name, tensor, placeholder) in enumerate(inputs):
            for axis, size in enumerate(values[placeholder].shape):
                symbol = str(size)
                if symbol.isdigit():  # a SymInt that torch.export resolved to a number
                    continue
                symbols[index, axis] = symbol
                is_ids = tensor.ndim == 2 and axis == 1 and not tensor.is_floating_point()
                label = f"{name}.{axis}"
                if axis == 0 and tensor.shape[0] == batch:
                    label = BATCH
                elif name in cached and axis == 2 and PAST not in labels.values():
                    label = PAST
                elif is_ids and TOKENS not in labels.values():
                    label = TOKENS
                labels.setdefault(symbol, label)
        return cls(names, tuple(tuple(t.shape) for t in tensors), symbols, labels)

    def trials(self, tensors: Tensors) -> Iterator[tuple[list[AxisIndex], list[Tensors]]]:
        """Axes, and two inputs in which these are half as long or shorter by one. First all groups
        of axes, then each group, then pairs of groups."""
        # Axes with different symbols may still depend on each other in the model (a mask and its
        # text), so axes of equal size are varied together, the batch first.
        by_size: dict[tuple[bool, int], list[AxisIndex]] = {}
        for (index, axis), symbol in self.symbols.items():
            key = self.labels[symbol] != BATCH, self.sizes[index][axis]
            by_size.setdefault(key, []).append((index, axis))
        groups = [by_size[key] for key in sorted(by_size)]
        choices = [groups] if len(groups) > 1 else []
        choices += [list(chosen) for count in (1, 2) for chosen in combinations(groups, count)]
        for chosen in choices:
            places, smaller_inputs = [place for group in chosen for place in group], []
            for halved in (True, False):
                cut = list(tensors)
                for index, axis in places:
                    size = self.sizes[index][axis]
                    least = 1 if self.labels[self.symbols[index, axis]] == BATCH else 2
                    smaller = max(least, size // 2 if halved else size - 1)
                    cut[index] = cut[index].narrow(axis, 0, smaller)
                smaller_inputs.append(tuple(cut))
            yield places, smaller_inputs

    def breaking(self, notes: Sequence[str], places: Sequence[AxisIndex]) -> list[int]:
        """The nearest smaller and larger sizes that violate a torch.export note on these axes."""

        def written(match: re.Match[str]) -> str:
            index, axis = map(int, match.groups())
            return "n" if (index, axis) in places else str(self.sizes[index][axis])

        size, nearest = self.sizes[places[0][0]][places[0][1]], set[int]()
        for note in {_SIZE.sub(written, note) for note in notes}:
            if not re.search(r"\bn\b", note):
                continue
            # torch.export evaluates its notes in the same way, with the same names
            holds = eval(f"lambda n: {note}", {**SYMPY_INTERP})
            named = {int(n) + more for n in re.findall(r"\b\d+", note) for more in (0, 1, 2)}
            wrong = list[int]()
            for n in sorted({*range(1, _SIZES), *named} - {0}):
                with suppress(ZeroDivisionError):
                    wrong += [] if holds(n) else [n]
            nearest.update([n for n in wrong if n < size][-2:], [n for n in wrong if n > size][:2])
        return sorted(nearest)

    def shapes(
        self, program: ExportedProgram, outputs: tuple[str, ...], fixed: set[AxisIndex]
    ) -> dict[str, tuple[str | int, ...]]:
        """Shape of every input and output, with names for the dynamic axes that are not `fixed`."""
        # torch.export gives an axis a symbol even if the model fixes it
        closed = {self.symbols[place]: self.sizes[place[0]][place[1]] for place in fixed}
        shapes: dict[str, tuple[str | int, ...]] = {}
        for index, name in enumerate(self.names):
            symbols = [self.symbols.get((index, axis)) for axis in range(len(self.sizes[index]))]
            shapes[name] = tuple(
                size if symbol is None or symbol in closed else self.labels[symbol]
                for symbol, size in zip(symbols, self.sizes[index], strict=True)
            )
        for name, node in zip(outputs, program.graph.output_node().args[0], strict=True):
            shapes[name] = tuple(
                int(s) if s.isdigit() else closed.get(s, self.labels.get(s, f"{name}.{axis}"))
                for axis, s in enumerate(map(str, node.meta["val"].shape))
            )
        return shapes


def check_graph(
    program: ExportedProgram,
    module: nn.Module,
    tensors: Tensors,
    axes: Axes,
    outputs: Sequence[str],
) -> set[AxisIndex]:
    """Compare the graph of `module(*tensors)` with the module. Returns the axes whose size is
    fixed."""
    graph = program.module(check_guards=False)
    if difference := _difference(module(*tensors), graph(*tensors), outputs):
        raise _refusal(program, module, tensors, difference)
    fixed = set(axes.symbols)
    for places, smaller_inputs in axes.trials(tensors):
        # all of them if one axis is not proven yet: a model may compute odd sizes otherwise
        for smaller in () if fixed.isdisjoint(places) else smaller_inputs:
            # models raise any error for a size that they do not support; graphs, too, if an
            # assumption of torch.export is violated or an operator fails
            try:
                difference = _difference(module(*smaller), graph(*smaller), outputs)
            except Exception:
                continue
            if difference:
                raise _refusal(program, module, smaller, difference)
            fixed.difference_update(places)
    return fixed


def limited_axes(
    exported: ExportedProgram,
    program: ExportedProgram,
    module: nn.Module,
    tensors: Tensors,
    axes: Axes,
    outputs: Sequence[str],
) -> set[AxisIndex]:
    """The axes to fix at the example's size, because module and graph differ at another size.
    `exported` is the result of torch.export, with its notes, `program` the cleaned one."""
    # remove the ranges, because torch would refuse the sizes to try
    graph = rebuilt(program, range_constraints={}).module(check_guards=False)
    most = {str(symbol): known.upper for symbol, known in exported.range_constraints.items()}
    limited, by_label = set[AxisIndex](), dict[str, list[AxisIndex]]()
    for place, symbol in axes.symbols.items():
        by_label.setdefault(axes.labels[symbol], []).append(place)
    # most notes concern strides and change nothing, so each is tried
    for label, places in by_label.items():
        for size in axes.breaking(exported._guards_code, places):
            inputs, work = [*tensors], 0.0
            for index, axis in places:
                before = tensors[index]
                growth = size / before.shape[axis]
                work += growth * before.numel() * size if growth > _GROWTH else 0
                if work <= _WORK:
                    rows = torch.arange(size, device=before.device) % before.shape[axis]
                    inputs[index] = before.index_select(axis, rows)
            if work > _WORK:
                # In every model tested, a limit on the batch concerned strides only.
                is_same = label == BATCH or size <= most.get(axes.symbols[places[0]], int_oo)
            else:
                is_same = True
                with suppress(Exception):  # models and graphs may raise anything at some sizes
                    is_same = not _difference(module(*inputs), graph(*inputs), outputs)
            if not is_same:
                limited.update(places)
                break
    return limited


def _difference(expected: Sequence[Tensor], actual: Sequence[Tensor], names: Sequence[str]) -> str:
    """A description of the first difference; empty if all outputs are equal."""
    for name, x, y in zip(names, expected, actual, strict=True):
        if x.shape != y.shape:
            return f"output {name} has shape {list(y.shape)} instead of {list(x.shape)}"
        if not _same(x, y):
            largest = float((x.double() - y.double()).abs().nan_to_num().max())
            return f"output {name} differs by {largest:.3g}"
    return ""


def _same(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and bool(((x == y) | (x.isnan() & y.isnan())).all())


def _refusal(
    program: ExportedProgram, module: nn.Module, tensors: Tensors, difference: str
) -> CaptureError:
    return CaptureError(
        f"the captured graph differs from the module at input shapes "
        f"{[list(t.shape) for t in tensors]}: {difference}. "
        f"{_first_difference(program, module, tensors)}. Look there for randomness, for state that "
        "changes between calls, or for branches on values or shapes"
    )


def _first_difference(program: ExportedProgram, module: nn.Module, tensors: Tensors) -> str:
    """A sentence that names the first module, in order of completion, whose output differs."""
    recorder = _Recorder(program.module(check_guards=False))
    # an operator may raise any error; the values before it are known
    with suppress(Exception):
        recorder.run(*tensors)
    differing: list[str] = []

    def compare(path: str, called: nn.Module, _: Any, output: Any) -> None:
        first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        # only the first call of a module is recorded
        values = recorder.values.pop(path, [])
        same_shape = [v for v in values if first is not None and v.shape == first.shape]
        if first is not None and same_shape and not any(_same(first, v) for v in same_shape):
            name = path.removeprefix("model.") or "the model"
            differing.append(f"{name} ({type(called).__name__})")

    with ExitStack() as stack:
        for path, inner in module.named_modules():
            stack.enter_context(inner.register_forward_hook(partial(compare, path)))
        module(*tensors)
    if differing:
        return f"The first module whose output differs is {differing[0]}"
    return "Every module that can be compared has the same output"


class _Recorder(Interpreter):
    """Runs a graph and records the tensors that the first call of each module computes, by path."""

    def __init__(self, graph: torch.fx.GraphModule):
        super().__init__(graph)
        self.values: defaultdict[str, list[Tensor]] = defaultdict(list)

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and n.op == "call_function":
            # a copy, because later operators may overwrite it
            kept = result.detach().clone()
            # later calls have other keys: PATH@1 ...
            for path, _ in module_stack(n).values():
                self.values[path].append(kept)
        return result
