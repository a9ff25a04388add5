import pytest

from qwlora.system.parameter_names import (
    adapter_of,
    canonical_name,
    is_adapter_name,
    is_factor_name,
)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("", ""),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("base_model.model.model.h.0.fc.base_layer.weight", "model.h.0.fc.weight"),
        ("base_model.model.model.h.0.fc.lora_A.topics.weight", "model.h.0.fc.lora_A.weight"),
        ("base_model.model.embed.lora_embedding_B.default", "embed.lora_embedding_B"),
        ("base_model.model.base_model.model.fc.base_layer.base_layer.bias", "fc.bias"),
        ("base_model.model.experts.base_layer.lora_A.x.weight", "experts.base_layer.lora_A.weight"),
        ("base_model.model.experts.base_layer.base_layer.gate_up_proj", "experts.gate_up_proj"),
        ("base_model.model.lm_head.original_module.weight", "lm_head.weight"),
        ("base_model.model.c.modules_to_save.topics.weight", "c.modules_to_save.weight"),
        ("base_model.model.classifier.modules_to_save.topics", "classifier.modules_to_save"),
        ("fc.lora_B.lora_A.weight", "fc.lora_B.weight"),
        ("base_model.encoder.weight", "base_model.encoder.weight"),
    ],
)
def test_wrappers_are_taken_out(path, name):
    assert canonical_name(path) == name
    if "lora_" not in path and "modules_to_save" not in path:
        assert canonical_name(name) == name


@pytest.mark.parametrize(
    ("is_one", "name", "expected"),
    [
        (is_adapter_name, "fc.lora_A.default.weight", True),
        (is_adapter_name, "fc.lora_magnitude_vector.default", True),
        (is_adapter_name, "lm_head.modules_to_save.default.weight", True),
        (is_adapter_name, "fc.base_layer.weight", False),
        (is_adapter_name, "lm_head.original_module.weight", False),
        (is_adapter_name, "explora.weight", False),
        (is_factor_name, "fc.lora_A.weight", True),
        (is_factor_name, "fc.lora_B.bias", False),
        (is_factor_name, "embed.lora_embedding_B", True),
        (is_factor_name, "fc.lora_magnitude_vector", False),
        (is_factor_name, "classifier.modules_to_save.weight", False),
        (is_factor_name, "lora_A.fc.weight", False),
    ],
)
def test_names_of_adapters_and_factors(is_one, name, expected):
    assert is_one(name) is expected


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model.layers.0.up_proj.lora_A.1.weight", "1"),
        ("model.layers.0.up_proj.lora_magnitude_vector.0.weight", "0"),
        ("embed.lora_embedding_B.topics", "topics"),
        ("lm_head.modules_to_save.lora_A.weight", "lora_A"),
        ("model.layers.0.up_proj.base_layer.weight", None),
        ("fc.lora_A", None),
    ],
)
def test_whose_a_tensor_is(path, name):
    assert adapter_of(path) == name
