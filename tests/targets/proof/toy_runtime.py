"""A runtime that knows the last token only: the next one's logits are a row of a table."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qwlora.targets.target import Runtime


class TableRuntime(Runtime):
    """Computes what a test wants, and generates from that.

    Args:
        tables: logits [words, words] by name of the adapter; "" without one.

    Attributes:
        state: the adapter that is active.
    """

    switches = True

    def __init__(self, tables: Mapping[str, Tensor]):
        self.tables, self.state = dict(tables), ""

    def switch_to(self, adapter: Path | None) -> None:
        self.state = adapter.name if adapter else ""

    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        return self.tables[self.state][ids]

    def decode(self, ids: Tensor, count: int) -> list[int]:
        tokens = [int(ids[0, -1])]
        for number in range(count):
            tokens.append(self.chosen(self.tables[self.state][tokens[-1]], number))
        return tokens[1:]

    def chosen(self, row: Tensor, number: int) -> int:
        """The token that is decoded as the one with this number."""
        return int(row.argmax())
