"""Dynamic axes of a captured graph's inputs: their names, and inputs of other sizes to test them.

torch.export gives each axis that the model does not fix a symbol, and axes of equal size the same
symbol. Symbols are named

    batch      axis 0 of every input that has as many rows as the first
    tokens     axis 1 of the first integer matrix
    past       axis 2 of cached keys and values
    NAME.AXIS  anything else: `pixel_values.2`

Axes with different symbols may still depend on each other in the model (a mask and its text), so
axes with equal sizes in the example are varied together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor
from torch.export import ExportedProgram

BATCH, TOKENS, PAST = "batch", "tokens", "past"
AxisIndex = tuple[int, int]  # (index of an input, axis)


@dataclass(frozen=True)
class Axes:
    """The dynamic axes of a program's inputs.

    Args:
        names: of the inputs.
        sizes: shape of each example input.
        symbols: the symbol of each dynamic axis.
        labels: the name of each symbol.
    """

    names: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    symbols: Mapping[AxisIndex, str]
    labels: Mapping[str, str]

    @classmethod
    def of(
        cls,
        program: ExportedProgram,
        names: tuple[str, ...],
        tensors: tuple[Tensor, ...],
        cached: Collection[str] = (),
    ) -> Axes:
        """The dynamic axes of a program.

        Args:
            cached: names of the inputs that are cached keys and values.
        """
        values = {
            node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"
        }
        symbols: dict[AxisIndex, str] = {}
        labels: dict[str, str] = {}
        batch = next(t.shape[0] for t in tensors if t.ndim)
        for index, (name, tensor, user_input) in enumerate(
            zip(names, tensors, program.graph_signature.user_inputs, strict=True)
        ):
            for axis, size in enumerate(values[user_input].shape):
                symbol = str(size)
                if symbol.isdigit():  # a SymInt that torch.export resolved to a number
                    continue
                symbols[index, axis] = symbol
                ids = tensor.ndim == 2 and axis == 1 and not tensor.is_floating_point()
                past = name in cached and axis == 2 and PAST not in labels.values()
                label = f"{name}.{axis}"
                if axis == 0 and tensor.shape[0] == batch:
                    label = BATCH
                elif past:
                    label = PAST
                elif ids and TOKENS not in labels.values():
                    label = TOKENS
                labels.setdefault(symbol, label)
        return cls(names, tuple(tuple(t.shape) for t in tensors), symbols, labels)

    def groups(self) -> list[list[AxisIndex]]:
        """Axes that are varied together; the batch first."""
        found: dict[tuple[bool, int], list[AxisIndex]] = {}
        for place, symbol in self.symbols.items():
            found.setdefault(
                (self.labels[symbol] != BATCH, self.sizes[place[0]][place[1]]), []
            ).append(place)
        return [found[key] for key in sorted(found)]

    def smaller(
        self, tensors: tuple[Tensor, ...], places: list[AxisIndex], halved: bool
    ) -> tuple[Tensor, ...]:
        """`tensors` cut along `places` to half their size, or by one; to no less than two tokens or
        one row."""
        cut = list(tensors)
        for index, axis in places:
            size = self.sizes[index][axis]
            least = 1 if self.labels[self.symbols[index, axis]] == BATCH else 2
            cut[index] = cut[index].narrow(axis, 0, max(least, size // 2 if halved else size - 1))
        return tuple(cut)

    def trials(
        self, tensors: tuple[Tensor, ...]
    ) -> Iterator[tuple[list[AxisIndex], tuple[Tensor, ...]]]:
        """Smaller inputs and the axes that were cut: all groups, then each one, then pairs."""
        groups = self.groups()
        choices = [groups] if len(groups) > 1 else []
        choices += [list(chosen) for count in (1, 2) for chosen in combinations(groups, count)]
        for chosen in choices:
            places = [place for group in chosen for place in group]
            for halved in (True, False):
                yield places, self.smaller(tensors, places, halved)

    def shapes(
        self, program: ExportedProgram, outputs: tuple[str, ...], fixed: set[AxisIndex]
    ) -> dict[str, tuple[str | int, ...]]:
        """Shape of every input and output, with names for dynamic axes.

        Args:
            fixed: axes that `check_graph` found to be fixed although they have a symbol.
        """
        found: dict[str, tuple[str | int, ...]] = {}
        closed = {self.symbols[place]: self.sizes[place[0]][place[1]] for place in fixed}
        for index, name in enumerate(self.names):
            found[name] = tuple(
                self._label(index, axis, size, closed)
                for axis, size in enumerate(self.sizes[index])
            )
        (node,) = (n for n in program.graph.nodes if n.op == "output")
        for name, value in zip(outputs, node.args[0], strict=True):
            sizes = [str(size) for size in value.meta["val"].shape]
            found[name] = tuple(
                int(s) if s.isdigit() else closed.get(s, self.labels.get(s, f"{name}.{axis}"))
                for axis, s in enumerate(sizes)
            )
        return found

    def _label(self, index: int, axis: int, size: int, closed: Mapping[str, int]) -> str | int:
        symbol = self.symbols.get((index, axis))
        return size if symbol is None or symbol in closed else self.labels[symbol]
