"""Running batches block by block."""

import threading
from typing import Any

import pytest
import torch
from torch import nn

from conftest import tiny_model
from qwlora import quantize_
from qwlora.quantize.block_runner import BlockRunner

IDS = torch.arange(24).view(3, 1, 8)


@pytest.mark.parametrize("repeated", [True, False])
def test_batches_pause_before_each_block_and_leave_no_trace(repeated: bool) -> None:
    """Blocks run in the caller's thread, the head not at all."""
    model = tiny_model("qwen3")
    expected = model(IDS[0]).logits
    ran, order = [], []
    names = {model.model.embed_tokens: "embed", model.lm_head: "head"}
    names |= {layer.mlp: "block" for layer in model.model.layers}

    def record(module: nn.Module, *_: Any) -> None:
        is_caller = threading.current_thread() is threading.main_thread()
        ran.append((names[module], is_caller))

    hooks = [module.register_forward_hook(record) for module in names]
    blocks = ["lm_head", "model.layers.1", "model.layers.0"]
    with BlockRunner(model, blocks, [{"input_ids": ids} for ids in IDS]) as runner:
        for block in runner:
            order.append(block)
            if repeated and block != "lm_head":
                assert [output.shape for output in runner.repeat()] == [(1, 8, 64)] * 3
    assert order == ["model.layers.0", "model.layers.1", "lm_head"]
    counts = {name: [n for n, _ in ran].count(name) for name in ("embed", "block", "head")}
    assert counts == {"embed": 3, "block": 12 if repeated else 6, "head": 0}
    assert all(is_caller for name, is_caller in ran if name == "block")
    for hook in hooks:
        hook.remove()
    assert "forward" not in model.lm_head.__dict__
    assert torch.equal(model(IDS[0]).logits, expected)


def test_an_error_inside_the_model_reaches_the_caller() -> None:
    model = tiny_model("llama")
    batch = {"input_ids": IDS[0], "position_ids": torch.tensor([1, 2])}
    with pytest.raises(RuntimeError, match="must match the size"):
        quantize_(model, "w4-block32", "gptq", calibration=[batch])
    assert "forward" not in model.model.layers[0].__dict__
