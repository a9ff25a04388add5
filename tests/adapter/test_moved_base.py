"""`save_adapter` never writes an adapter under the fingerprint of a base that nobody has."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
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


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def step_over_all(model: PeftModel) -> None:
    """One step of an optimizer that was given every parameter, frozen or not."""
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("made", ["quantized", "loaded", "loaded in bfloat16"])
def test_refuses_a_base_that_an_optimizer_changed(made: str, folder: Path, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if made == "loaded in bfloat16" else torch.float32
    model = get_peft_model(base() if made == "quantized" else load_base(folder, dtype), lora())
    save_adapter(model, tmp_path / "before")
    step_over_all(model)
    with pytest.raises(FingerprintError, match=r"of the base changed.*lm_head\.weight"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    load_adapter(load_base(folder, dtype), tmp_path / "before")


def changed_norm(model: PeftModel) -> None:
    model.get_base_model().model.norm.weight.data.mul_(2)


def replaced_layer(model: PeftModel) -> None:
    model.get_base_model().model.layers[0].mlp.up_proj = nn.Linear(64, 128, bias=False)


@pytest.mark.parametrize(
    ("change", "name"),
    [(changed_norm, "model.norm.weight"), (replaced_layer, "model.layers.0.mlp.up_proj.weight")],
)
def test_names_the_changed_tensors(
    change: Callable[[PeftModel], None], name: str, tmp_path: Path
) -> None:
    model = get_peft_model(base(), lora())
    change(model)
    with pytest.raises(
        FingerprintError, match=rf"1 float tensors or settings of the base changed.*: {name}"
    ):
        save_adapter(model, tmp_path / "adapter")


def test_saving_a_changed_base_makes_it_a_new_base(tmp_path: Path) -> None:
    model = base()
    model.model.norm.weight.data.mul_(2)
    save_base(model, tmp_path, byte_tokenizer(), source="here")
    save_adapter(get_peft_model(model, lora()), tmp_path / "adapter")
    load_adapter(load_base(tmp_path), tmp_path / "adapter")


def test_casting_the_base_is_no_change_but_casting_back_is(tmp_path: Path) -> None:
    model = get_peft_model(base(), lora())
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.AdamW(p for p in model.parameters() if p.requires_grad).step()
    save_adapter(model, tmp_path / "first")
    save_adapter(model.to(torch.bfloat16), tmp_path / "second")  # type: ignore[arg-type]
    with pytest.raises(FingerprintError, match=r"changed.*lm_head\.weight"):
        save_adapter(model.to(torch.float32), tmp_path / "third")  # type: ignore[arg-type]


def test_named_injected_adapters_get_separate_folders(tmp_path: Path) -> None:
    model = base()
    inject_adapter_in_model(lora(), model, adapter_name="topics")
    save_adapter(model, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    loaded = load_adapter(base(), tmp_path / "topics")
    torch.testing.assert_close(logits(loaded), logits(model))


def test_compiled_model_has_the_same_fingerprint(tmp_path: Path) -> None:
    model = get_peft_model(base(), lora())
    compiled = torch.compile(model, backend="eager")
    assert fingerprint(compiled) == fingerprint(base())
    save_adapter(compiled, tmp_path)
    load_adapter(base(), tmp_path)


def test_refuses_to_save_a_model_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="Qwen3ForCausalLM has no adapter to save"):
        save_adapter(base(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
