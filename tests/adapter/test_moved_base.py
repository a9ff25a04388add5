"""`save_adapter` never writes an adapter under the fingerprint of a base that nobody has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import PreTrainedModel

from conftest import byte_tokenizer, packed_model
from qwlora import fingerprint, load_adapter, load_base, save_adapter, save_base
from qwlora.errors import FingerprintError, SourceError

IDS = torch.arange(16).view(2, 8)


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def base() -> PreTrainedModel:
    return packed_model("qwen3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_base(base(), folder, byte_tokenizer(), source="here")
    return folder


def step(model: Any, everything: bool = True) -> None:
    """One step of an optimizer, which was given every parameter, frozen or not."""
    if everything:
        model.requires_grad_(True)
    if everything:
        model.requires_grad_(True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(p for p in model.parameters() if p.requires_grad).step()


def replace_layer(model: Any) -> None:
    model.get_base_model().model.layers[0].mlp.up_proj = nn.Linear(64, 128, bias=False)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an optimizer": (step, r".*lm_head\.weight"),
    "a norm": (lambda m: m.get_base_model().model.norm.weight.data.mul_(2), "model.norm.weight"),
    "a new layer": (replace_layer, "model.layers.0.mlp.up_proj.weight"),
    "casting back": (lambda m: m.to(torch.bfloat16).to(torch.float32), r".*lm_head\.weight"),
}


@pytest.mark.parametrize(
    ("how", "dtype"),
    [
        *((how, None) for how in CHANGES),
        *(("an optimizer", dtype) for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_refuses_a_base_that_was_changed(
    how: str, dtype: torch.dtype | None, folder: Path, tmp_path: Path
) -> None:
    """The base was quantized in this process, or loaded from a folder in a given type."""
    change, names = CHANGES[how]
    model = get_peft_model(load_base(folder, dtype) if dtype else base(), lora())
    save_adapter(model, tmp_path / "before")
    change(model)
    with pytest.raises(FingerprintError, match=rf"of the base changed.*: {names}"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    load_adapter(load_base(folder, dtype or torch.float32), tmp_path / "before")


def test_what_does_not_change_the_base_is_saved(tmp_path: Path) -> None:
    model = get_peft_model(base(), lora())
    compiled = torch.compile(model, backend="eager")
    assert fingerprint(compiled) == fingerprint(base())
    step(model, everything=False)
    save_adapter(compiled, tmp_path / "compiled")
    save_adapter(model.to(torch.bfloat16), tmp_path / "cast")  # type: ignore[arg-type]
    load_adapter(base(), tmp_path / "compiled")


def test_saving_a_changed_base_makes_it_a_new_base(tmp_path: Path) -> None:
    model = base()
    model.model.norm.weight.data.mul_(2)
    save_base(model, tmp_path, byte_tokenizer(), source="here")
    save_adapter(get_peft_model(model, lora()), tmp_path / "adapter")
    load_adapter(load_base(tmp_path), tmp_path / "adapter")


def test_named_injected_adapters_get_separate_folders(tmp_path: Path) -> None:
    model = base()
    with pytest.raises(SourceError, match="Qwen3ForCausalLM has no adapter to save"):
        save_adapter(model, tmp_path)
    inject_adapter_in_model(lora(), model, adapter_name="topics")
    save_adapter(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["topics"]
    loaded = load_adapter(base(), tmp_path / "topics")
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(IDS).logits, model.eval()(IDS).logits)
