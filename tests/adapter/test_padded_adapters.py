"""Adapters of different ranks and layers in one shape."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from conftest import tiny_model
from qwlora.adapter.adapter_folder import save_adapter
from qwlora.adapter.padded_adapters import common_ranks, one_rank, padded_adapters
from qwlora.errors import CaptureError

IDS = torch.arange(3, 11)[None]
Q, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qv")


def config(rank: int, *layers: str, dora: bool = False) -> LoraConfig:
    shape = {"r": rank, "lora_alpha": 8, "target_modules": list(layers), "use_dora": dora}
    return LoraConfig(**shape, init_lora_weights=False)  # type: ignore[arg-type]


def test_the_largest_rank_on_every_layer_that_one_of_them_changes() -> None:
    assert one_rank([{Q: 4}, {Q: 16, V: 2}]) == {Q: 16, V: 16}
    assert one_rank([{Q: 4, V: 2}, {Q: 4, V: 2}]) == {}
    model = get_peft_model(tiny_model("llama", layers=1), config(4, "q_proj"), adapter_name="first")
    model.add_adapter("second", config(2, "v_proj"))
    assert common_ranks(model, ["first", "second"]) == {Q: 4, V: 4}
    assert common_ranks(model, ["second"]) == {}
    model.add_adapter("dora", config(2, "q_proj", dora=True))
    assert common_ranks(model, ["first", "dora"]) == {}  # magnitudes are no factors


def test_a_padded_adapter_computes_the_same_and_is_restored(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama", layers=1), config(4, "v_proj")).eval()
    with torch.no_grad():
        expected = model(IDS).logits
    save_adapter(model, tmp_path / "before", "fingerprint")
    before = [(n, id(p), p.requires_grad) for n, p in model.named_parameters()]
    with padded_adapters(model, ["default"], {Q: 6, V: 6}):
        weights = {n: p for n, p in model.named_parameters() if "lora" in n}
        assert len(weights) == 4
        assert all(6 in weight.shape for weight in weights.values())
        assert not any(module.training for module in model.modules())
        scalings = {model.get_submodule(f"base_model.model.{p}").scaling["default"] for p in (Q, V)}
        assert scalings == {2}
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits, expected)
            next(w for n, w in weights.items() if "q_proj.lora_A" in n).fill_(1)
            next(w for n, w in weights.items() if "q_proj.lora_B" in n).fill_(1)
            assert not torch.allclose(model(IDS).logits, expected)
    assert [(n, id(p), p.requires_grad) for n, p in model.named_parameters()] == before
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    save_adapter(model, tmp_path / "after", "fingerprint")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("before", "after")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_only_the_named_layers_are_wrapped() -> None:
    """PEFT would take `1` in a list of names for `0.1`, too."""
    inner = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model = get_peft_model(torch.nn.Sequential(inner, torch.nn.Linear(4, 4)), config(2, "0.0"))  # type: ignore[arg-type]
    with padded_adapters(model, ["default"], {"1": 2}):
        factors = {n.split(".lora")[0] for n, _ in model.named_parameters() if "lora_A" in n}
    assert factors == {"base_model.model.0.0", "base_model.model.1"}
    assert [name for name, _ in model.named_modules() if name.endswith("base_layer")] == [
        "base_model.model.0.0.base_layer"
    ]


def test_a_model_that_is_no_peft_model_has_only_the_layers_that_it_has() -> None:
    model = tiny_model("llama", layers=1)
    inject_adapter_in_model(config(4, "v_proj"), model, "first")
    with (
        pytest.raises(CaptureError, match=rf"{Q}: other adapters have LoRA.*PeftModel"),
        padded_adapters(model, ["first"], {Q: 4, V: 4}),
    ):
        pass


@pytest.mark.parametrize("kind", [torch.nn.Embedding, torch.nn.Conv2d])
def test_factors_of_embeddings_and_convolutions_are_padded(kind: type) -> None:
    layer = kind(8, 6) if kind is torch.nn.Embedding else kind(8, 6, 3, padding=1)
    x = torch.arange(8)[None] if kind is torch.nn.Embedding else torch.randn(1, 8, 4, 4)
    model = get_peft_model(torch.nn.Sequential(layer), config(2, "0")).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        expected = model(x)
        with padded_adapters(model, ["default"], {"0": 5}):
            assert all(5 in p.shape for n, p in model.named_parameters() if "lora" in n)
            torch.testing.assert_close(model(x), expected)
