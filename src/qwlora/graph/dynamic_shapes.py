"""The axes of a captured graph's inputs: which may have any size, what they are called, and inputs of other sizes to prove it with.

torch.export gives each axis that the model does not fix a symbol, and equal symbols to axes that must agree. Symbols are called

    batch      axis 0 of every input that has as many rows as the first
    tokens     axis 1 of the first matrix of integers
    past       axis 2 of keys and values of earlier tokens
    NAME.AXIS  whatever else: `pixel_values.2`

Axes of different symbols may still belong together in ways that only the model knows (a mask as long as its text, the rows of a position table): those with
equal sizes in the example are made smaller together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor
from torch.export import ExportedProgram

BATCH, TOKENS, PAST = "batch", "tokens", "past"
Place = tuple[int, int]  # (index of an input, axis)


@dataclass(frozen=True)
class Axes:
    """The dynamic axes of a program's inputs.

    Args:
        names: of the inputs.
        sizes: of the example's inputs.
        symbols: symbol by place, for the axes that the program leaves open.
        called: the name of each symbol.
    """

    names: tuple[str, ...]
    sizes: tuple[tuple[int, ...], ...]
    symbols: Mapping[Place, str]
    called: Mapping[str, str]

    @classmethod
    def of(
        cls,
        program: ExportedProgram,
        names: tuple[str, ...],
        tensors: tuple[Tensor, ...],
        cached: Collection[str] = (),
    ) -> Axes:
        """Read them from the program.

        Args:
            cached: names of the inputs that are keys and values of earlier tokens.
        """
        values = {
            node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"
        }
        symbols: dict[Place, str] = {}
        called: dict[str, str] = {}
        batch = next(t.shape[0] for t in tensors if t.ndim)
        for index, (name, tensor, user_input) in enumerate(
            zip(names, tensors, program.graph_signature.user_inputs, strict=True)
        ):
            for axis, size in enumerate(values[user_input].shape):
                symbol = str(size)
                if (
                    symbol.isdigit()
                ):  # a symbol that torch.export found to be a number still has a symbol's type
                    continue
                symbols[index, axis] = symbol
                ids = tensor.ndim == 2 and axis == 1 and not tensor.is_floating_point()
                past = name in cached and axis == 2 and PAST not in called.values()
                fallback = (
                    PAST
                    if past
                    else TOKENS
                    if ids and TOKENS not in called.values()
                    else f"{name}.{axis}"
                )
                called.setdefault(
                    symbol, BATCH if axis == 0 and tensor.shape[0] == batch else fallback
                )
        return cls(names, tuple(tuple(t.shape) for t in tensors), symbols, called)

    def groups(self) -> list[list[Place]]:
        """Axes that are made smaller together; the batch first."""
        found: dict[tuple[bool, int], list[Place]] = {}
        for place, symbol in self.symbols.items():
            found.setdefault(
                (self.called[symbol] != BATCH, self.sizes[place[0]][place[1]]), []
            ).append(place)
        return [found[key] for key in sorted(found)]

    def smaller(
        self, tensors: tuple[Tensor, ...], places: list[Place], halved: bool
    ) -> tuple[Tensor, ...]:
        """`tensors` cut at `places`, to half their size (but two, of a batch one) or by one."""
        cut = list(tensors)
        for index, axis in places:
            size = self.sizes[index][axis]
            least = 1 if self.called[self.symbols[index, axis]] == BATCH else 2
            cut[index] = cut[index].narrow(axis, 0, max(least, size // 2 if halved else size - 1))
        return tuple(cut)

    def trials(
        self, tensors: tuple[Tensor, ...]
    ) -> Iterator[tuple[list[Place], tuple[Tensor, ...]]]:
        """Other inputs and the places where they are smaller: all groups at once, then each alone, then pairs of groups."""
        groups = self.groups()
        choices = [groups] if len(groups) > 1 else []
        choices += [list(chosen) for count in (1, 2) for chosen in combinations(groups, count)]
        for chosen in choices:
            places = [place for group in chosen for place in group]
            for halved in (True, False):
                yield places, self.smaller(tensors, places, halved)

    def shapes(
        self, program: ExportedProgram, outputs: tuple[str, ...], fixed: set[Place]
    ) -> dict[str, tuple[str | int, ...]]:
        """Shape of every input and output, names for the axes that are open; those in `fixed` are not, whatever torch.export thought."""
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
                int(s) if s.isdigit() else closed.get(s, self.called.get(s, f"{name}.{axis}"))
                for axis, s in enumerate(sizes)
            )
        return found

    def _label(self, index: int, axis: int, size: int, closed: Mapping[str, int]) -> str | int:
        symbol = self.symbols.get((index, axis))
        return size if symbol is None or symbol in closed else self.called[symbol]
