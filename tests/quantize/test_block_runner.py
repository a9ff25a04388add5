"""Running batches block by block."""

import threading
from typing import Any

import pytest
import torch
from torch import nn

from conftest import tiny_model
from qwlora.quantize.block_runner import BlockRunner


@pytest.mark.parametrize("repeated", [True, False])
def test_blocks_run_in_the_callers_thread_and_the_head_not_at_all(repeated: bool) -> None:
    model = tiny_model("llama")
    ran: list[tuple[str, bool]] = []

    def record(module: nn.Module, *_: Any) -> None:
        ran.append((names[module], threading.current_thread() is threading.main_thread()))

    names = {model.model.embed_tokens: "embed", model.lm_head: "head"}
    names |= {layer.mlp: f"block {i}" for i, layer in enumerate(model.model.layers)}
    for module in names:
        module.register_forward_hook(record)
    batches = [{"input_ids": torch.arange(8).unsqueeze(0)}] * 2
    blocks = [f"model.layers.{i}" for i in range(len(model.model.layers))]
    with BlockRunner(model, blocks, batches) as runner:
        for _ in runner:
            if repeated:
                assert len(list(runner.repeat())) == 2
    assert [name for name, _ in ran if name == "embed"] == ["embed"] * 2
    assert not any(name == "head" for name, _ in ran)
    assert all(is_caller for name, is_caller in ran if name.startswith("block"))
