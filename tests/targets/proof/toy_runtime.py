"""A runtime and a trained model that know the last token only: the next one's logits are a row of a
table."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from qwlora.targets.target import Runtime


class TableRuntime(Runtime):
    """Computes by `tables`: logits [words, words] by name of the adapter; "" without one, as in
    `state`, which is active."""

    switches = True

    def __init__(self, tables: Mapping[str, Tensor]):
        self.tables, self.state = dict(tables), ""

    def switch_to(self, adapter: Path | None) -> None:
        self.state = adapter.name if adapter else ""

    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        return self.tables[self.state][ids]

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.logits(tensors["input_ids"])}

    def decode(self, ids: Tensor, count: int) -> list[int]:
        tokens = [int(ids[0, -1])]
        for number in range(count):
            tokens.append(self.chosen(self.tables[self.state][tokens[-1]], number))
        return tokens[1:]

    def chosen(self, row: Tensor, number: int) -> int:
        return int(row.argmax())


class Trained:
    """The trained model, in the parts of PeftModel that a reference is made with."""

    def __init__(self, base: Tensor, adapted: Tensor):
        self.base, self.adapted, self.table = base, adapted, adapted

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.table = self.base
        yield
        self.table = self.adapted

    def __call__(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])
