"""No attribute of our own types is looked up by name: `isinstance` on an imported type instead."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "qwlora"
# Attributes of other libraries, which `getattr` and `hasattr` may name.
FOREIGN = """
    CSafeDumper __constants__ __func__ __name__ __notes__ _fields _hf_peft_config_loaded _name_or_path _schema activation_checkpointing
    active_adapters backend_tokenizer base_layer config config_class default_config_fields dim disable_adapters distributed_config eos_token_id errno
    final_logit_softcapping format_message generation_config get_base_model get_input_embeddings groups head_dim hf_device_map is_encoder_decoder
    is_transposed keys layer_types layers lm_head_multiplier logit_scale logits logits_scaling malloc_trim max_memory_allocated max_norm
    max_position_embeddings num_attention_heads num_embeddings num_hidden_layers num_key_value_heads offset output_router_logits pad_token_id
    peft_config quantization_config quantization_method register_quantization_config register_to_config rope_parameters sanitize save_config
    save_pretrained scaling sched_getaffinity setitimer sliding_window strerror to_dict values vocab_size
    """
ALLOWED = set(FOREIGN.split())


def looked_up(code: str) -> Iterator[str]:
    """The constant names given to `getattr` and `hasattr`."""
    for node in ast.walk(ast.parse(code)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "hasattr")
            and isinstance(node.args[1], ast.Constant)
        ):
            yield node.args[1].value


def test_only_attributes_of_other_libraries_are_looked_up_by_name() -> None:
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in PACKAGE.rglob("*.py")
        if (names := set(looked_up(path.read_text())) - ALLOWED)
    }
    assert found == {}


def test_a_planted_lookup_of_an_attribute_of_ours_is_found() -> None:
    assert set(looked_up("x = getattr(layer, 'scheme', None)")) - ALLOWED == {"scheme"}
