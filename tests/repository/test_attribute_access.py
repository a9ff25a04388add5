"""No attribute of our own types is looked up by name: `isinstance` on an imported type instead."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "qwlora"
# Attributes that `getattr` and `hasattr` may name, by who defines them.
FOREIGN = {
    "python": "__func__ __name__ __notes__ _fields errno keys strerror values",
    "operating systems": "malloc_trim sched_getaffinity setitimer",
    "torch": "__constants__ _schema groups max_memory_allocated max_norm num_embeddings",
    "peft": "active_adapters base_layer disable_adapters get_base_model peft_config scaling",
    "click": "format_message",
    "mlx-lm": "sanitize",
    "diffusers": "register_to_config save_config save_pretrained",
    "yaml": "CSafeDumper",
    "transformers": "_hf_peft_config_loaded _name_or_path activation_checkpointing backend_tokenizer config config_class default_config_fields dim distributed_config "
    "eos_token_id generation_config hf_device_map is_encoder_decoder is_transposed layers logits max_position_embeddings offset output_router_logits "
    "quantization_config quantization_method register_quantization_config rope_parameters to_dict vocab_size "
    "final_logit_softcapping get_input_embeddings lm_head_multiplier logit_scale logits_scaling "
    "head_dim layer_types num_attention_heads num_hidden_layers num_key_value_heads pad_token_id "
    "sliding_window",
}
ALLOWED = {name for names in FOREIGN.values() for name in names.split()}


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
