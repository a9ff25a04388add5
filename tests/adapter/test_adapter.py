"""Training touches the adapter and nothing else; an adapter knows its base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from conftest import tiny_model
from qwlora import fingerprint, load_adapter, quantize_, save_adapter
from qwlora.adapter.train import TrainingSettings, attach, check_trainable, last_checkpoint, train_adapter
from qwlora.errors import SourceError, TrainingError

SETTINGS = TrainingSettings(steps=6, learning_rate=5e-3, batch_sequences=2, warmup_steps=1, schedule="constant", checkpoint_steps=2, seed=0)


def base() -> PreTrainedModel:
    model = tiny_model("llama")
    quantize_(model, "w4-block32")
    return model.requires_grad_(False)


def test_training_moves_the_adapter_only(tmp_path: Path) -> None:
    model = attach(base(), rank=4, alpha=8, dropout=0.0, target_modules="all-linear", seed=0)
    before, identity = {n: p.detach().clone() for n, p in model.named_parameters()}, fingerprint(model)
    report = train_adapter(model, torch.arange(256).view(8, 32), SETTINGS, tmp_path)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if ".lora_A." in n or ".lora_B." in n}
    assert fingerprint(model) == identity
    assert report.losses[-1] < report.losses[0]
    assert len(report.losses) == report.steps == 6
    assert report.trainable_parameters == sum(before[n].numel() for n in moved)


def test_training_anything_else_is_refused() -> None:
    model = attach(base(), 4, 8, 0.0, "all-linear", 0)
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"training would move .*embed_tokens.weight; only lora_A and lora_B"):
        check_trainable(model)
    with pytest.raises(TrainingError, match="no trainable parameter"):
        check_trainable(base())
    with pytest.raises(TrainingError, match="LoRA cannot be attached to target_modules"):
        attach(base(), 4, 8, 0.0, ["no_such_layer"], 0)


def test_loss_that_is_no_number_stops_with_the_step(tmp_path: Path) -> None:
    model = attach(base(), 4, 8, 0.0, "all-linear", 0)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).fill_(torch.inf)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 1; lower the learning rate"):
        train_adapter(model, torch.arange(256).view(8, 32), SETTINGS, tmp_path)


def test_half_written_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    for step, state in ((2, '{"global_step": 2}'), (4, '{"global'), (6, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2"]
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_adapter_without_a_fingerprint_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(base(), LoraConfig(r=2, target_modules="all-linear"))
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "qwlora.json").read_text())["base_fingerprint"] == fingerprint(model)
    (tmp_path / "qwlora.json").unlink()
    with pytest.raises(SourceError, match=r"does not say which base it belongs to.*Save it with qwlora.save_adapter"):
        load_adapter(base(), tmp_path)


def test_saved_adapter_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = get_peft_model(base(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    save_adapter(model, tmp_path)
    loaded = load_adapter(base(), tmp_path).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
