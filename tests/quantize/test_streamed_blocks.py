"""Quantizing from a checkpoint: the base that quantizing in memory makes, with a block in memory at
a time where GPTQ needs whole ones."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from conftest import byte_tokenizer, tiny_model
from formats.models import logits
from formats.test_precomputed import KINDS, Held, model_of
from qwlora import fingerprint, load_base, quantize_
from qwlora.errors import GridError, SourceError
from qwlora.formats.base_files import BaseWriter
from qwlora.formats.checkpoint import LazyModel
from qwlora.grid.scheme import parse_scheme
from qwlora.quantize.layer_rules import LayerRule
from qwlora.quantize.quantize_model import InFiles, QuantizeReport, quantize_checkpoint


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 250, (3, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", ["rtn", "gptq"])
def test_the_same_base_as_in_memory(kind: str, solver: str, tmp_path: Path, tokens: Tensor) -> None:
    rules = [
        LayerRule("*embed_tokens", parse_scheme("w4-block16"), "search"),
        LayerRule("*.layers.0.mlp.down_proj", None),
        LayerRule("*.down_proj", parse_scheme("w8-channel")),
    ]
    how: dict[str, Any] = {"rules": rules if kind in ("llama", "qwen3") else []}
    of_files: dict[str, Any] = {"shard_bytes": 30_000, "solver": solver, **how}
    if solver == "gptq":
        how |= {"calibration": tokens}
        of_files |= how
    model = model_of(kind)
    report = quantize_(model, "w4-block32", solver, **how)
    result = from_files(Held(model_of(kind)), tmp_path / "base", **of_files)
    assert result == (fingerprint(model), report)
    loaded = load_base(tmp_path / "base")
    assert torch.equal(logits(loaded), logits(model))


def from_files(
    checkpoint: Held, folder: Path, solver: str = "gptq", **options: Any
) -> tuple[str, QuantizeReport]:
    folder.mkdir(exist_ok=True)
    tokenizer, scheme = byte_tokenizer(), "w4-block32"
    return quantize_checkpoint(checkpoint, tokenizer, folder, "x", scheme, solver, **options)


def deep() -> PreTrainedModel:
    """Eight blocks, each larger than what is outside of them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8}
    ids = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
    config = LlamaConfig(**sizes, **ids, num_attention_heads=4, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def test_two_blocks_at_most_are_there(
    tmp_path: Path, tokens: Tensor, loaded_at_finish: list[str]
) -> None:
    gc.collect()
    model = deep()
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    outside = model.model.embed_tokens.weight.nbytes + model.model.norm.weight.nbytes
    checkpoint = Held(model)
    from_files(checkpoint, tmp_path, calibration=tokens, shard_bytes=10_000)
    assert [name for name in loaded_at_finish if not name.startswith("model.layers.7.")] == [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert checkpoint.most_alive <= outside + 2 * block + 20_000
    assert checkpoint.most_alive < sum(p.nbytes for p in model.parameters()) / 2


def test_goes_on_after_the_last_finished_part(tmp_path: Path, tokens: Tensor) -> None:
    def stopped(items: Any, description: str, total: int | None = None) -> Any:
        for number, item in enumerate(items):
            if number == 1:
                raise KeyboardInterrupt
            yield item

    base, work = tmp_path / "base", tmp_path / "work"
    ask: dict[str, Any] = {"calibration": tokens, "work": work}
    with pytest.raises(KeyboardInterrupt):
        from_files(Held(tiny_model("llama")), base, track=stopped, **ask)
    assert [file.name for file in work.iterdir()] == ["model.layers.0.safetensors"]
    with pytest.raises(SourceError, match="is not a QWLoRA base"):
        load_base(base)
    identity, _ = from_files(Held(tiny_model("llama")), base, **ask)
    model = tiny_model("llama")
    quantize_(model, "w4-block32", "gptq", calibration=tokens)
    assert identity == fingerprint(model) == fingerprint(load_base(base))


def test_a_part_that_runs_again_is_refused(tmp_path: Path) -> None:
    lazy = LazyModel(Held(tiny_model("llama")))
    first, second = "model.layers.0", "model.layers.1"
    for path in (first, second):
        lazy.model.get_submodule(path).forward = lambda: None  # type: ignore[method-assign]
    with InFiles(lazy, BaseWriter(tmp_path)).blocks({first: [], second: []}, 1):
        lazy.model.get_submodule(first)()
        lazy.model.get_submodule(second)()
        with pytest.raises(GridError, match=r"model\.layers\.0 runs again after a later block"):
            lazy.model.get_submodule(first)()
