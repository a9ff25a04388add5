"""Exported files with the interface of a transformers model: what their runtime reads."""

from typing import Any

import torch
from torch import Tensor

from conftest import tiny_model
from qwlora.pipeline.commands.open_job import runtime_model
from qwlora.targets.target import Runtime


class OneCache(Runtime):
    """A runtime with one cache, which `logits` empties."""

    def __init__(self) -> None:
        self.held, self.read = list[int](), list[list[int]]()

    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        self.held = ids[0].tolist()
        return torch.zeros(1, ids.shape[1], 5)

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        self.held = [*(self.held if past else ()), *ids[0].tolist()]
        self.read.append(ids[0].tolist())
        return torch.zeros(1, 1, 5), "held"


def test_only_new_tokens_are_read_and_another_text_is_read_whole() -> None:
    runtime = OneCache()
    model = runtime_model(runtime, tiny_model("llama", layers=1))

    def read(*ids: int, keep: int = 1) -> list[int]:
        model(input_ids=torch.tensor([ids]), logits_to_keep=keep)
        assert runtime.held == [*ids]
        return runtime.read[-1]

    assert read(1, 2, 3) == [1, 2, 3]
    assert read(1, 2, 3, 4) == [4]
    assert read(1, 2, 3, 4, 5, 6) == [5, 6]  # the next turn of a conversation
    assert read(1, 2, 9) == [1, 2, 9]
    assert read(1, 2, 9) == [1, 2, 9]
    read(7, 8, keep=0)  # scores need all logits
    assert read(1, 2, 9, 3) == [1, 2, 9, 3]
