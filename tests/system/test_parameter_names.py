import pytest

from qwlora.system.parameter_names import (
    adapter_of,
    canonical_name,
    is_adapter_name,
    is_factor_name,
)


@pytest.mark.parametrize(
    ("path", "name", "adapter"),
    [
        ("", "", None),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight", None),
        ("base_model.model.model.h.0.fc.base_layer.weight", "model.h.0.fc.weight", None),
        ("base_model.model.model.h.fc.lora_A.a.weight", "model.h.fc.lora_A.weight", "a"),
        ("base_model.model.embed.lora_embedding_B.default", "embed.lora_embedding_B", "default"),
        ("base_model.model.base_model.model.fc.base_layer.base_layer.bias", "fc.bias", None),
        ("base_model.model.e.base_layer.lora_A.x.weight", "e.base_layer.lora_A.weight", "x"),
        ("base_model.model.e.base_layer.base_layer.gate_up_proj", "e.gate_up_proj", None),
        ("base_model.model.lm_head.original_module.weight", "lm_head.weight", None),
        ("base_model.model.c.modules_to_save.topics.weight", "c.modules_to_save.weight", "topics"),
        ("base_model.model.c.modules_to_save.1", "c.modules_to_save", "1"),
        ("fc.lora_B.lora_A.weight", "fc.lora_B.weight", "lora_A"),
        ("fc.lora_magnitude_vector.0.weight", "fc.lora_magnitude_vector.weight", "0"),
        ("explora.weight", "explora.weight", None),
        ("base_model.encoder.weight", "base_model.encoder.weight", None),
        ("fc.lora_A", "fc.lora_A", None),  # no adapter is named
    ],
)
def test_wrappers_are_taken_out_and_the_adapter_is_named(path, name, adapter) -> None:
    assert canonical_name(path) == name
    assert adapter_of(path) == adapter
    assert is_adapter_name(path) is (adapter is not None or path == "fc.lora_A")
    if adapter is None:
        assert canonical_name(name) == name


@pytest.mark.parametrize(
    ("name", "is_factor"),
    [
        ("fc.lora_A.weight", True),
        ("fc.lora_B.bias", False),
        ("embed.lora_embedding_B", True),
        ("fc.lora_magnitude_vector", False),
        ("classifier.modules_to_save.weight", False),
        ("lora_A.fc.weight", False),
    ],
)
def test_names_of_factors(name: str, is_factor: bool) -> None:
    assert is_factor_name(name) is is_factor
