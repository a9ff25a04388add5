"""Write the folder of the `genai` target; see `genai_target.py` and `matmul_nbits.py`.

genai_config.json says `llama` for every architecture: onnxruntime-genai chooses by it how it feeds
a model, and all captured graphs are fed alike: tokens, mask, positions, keys and values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwlora import strict_json
from qwlora.atomic import write_text
from qwlora.errors import ExportError
from qwlora.export.canonical_adapter import CanonicalAdapter
from qwlora.export.onnx.matmul_nbits import (
    empty_factors,
    matmul_nbits,
    switchable_model,
    write_onnx_adapter,
)
from qwlora.export.onnx.onnx_model import DATA_FILE, MODEL_FILE
from qwlora.export.weights.weights_folder import write_settings
from qwlora.system.optional_packages import require

NO_ADAPTER = "none.onnx_adapter"  # switches a running generation back to the base


def write_genai(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Write the base `model`.

    Raises:
        ExportError: a layer's grid does not fit; all are listed. Or an operator has no translation.
        CaptureError: the model has no graph with a cache.
    """
    made = switchable_model(model)
    matmul_nbits(made, model)
    require("onnx_ir", "onnx").save(made, folder / MODEL_FILE, external_data=DATA_FILE)
    nothing = CanonicalAdapter({}, None)
    write_onnx_adapter(nothing, empty_factors(folder / MODEL_FILE), folder / NO_ADAPTER)
    text: Any = model.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:
        raise ExportError(
            f"genai needs a longest sequence, but the configuration of {text.model_type} has no "
            "max_position_embeddings. Set it in config.json, or remove genai from export.targets"
        )
    text.save_pretrained(folder)
    shapes = {value.name: value.shape for value in made.graph.inputs}
    keys = shapes["past_key_values.0.key"]
    layers = sum(name.endswith(".key") for name in shapes)
    config = {
        "model": {
            "type": "llama",
            "context_length": positions,
            "vocab_size": text.vocab_size,
            **_special_tokens(model, tokenizer),
            "decoder": {
                "filename": MODEL_FILE,
                "session_options": {"provider_options": []},
                "num_hidden_layers": layers,
                "num_attention_heads": text.num_attention_heads,
                "num_key_value_heads": keys[1],
                "hidden_size": text.hidden_size,
                "head_size": keys[3],
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": positions,
            "past_present_share_buffer": False,
        },
    }
    write_text(folder / "genai_config.json", strict_json.dumps(config, indent=2) + "\n")
    write_settings(model, tokenizer, folder)


def _special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Any]:
    """Ids of the tokens that begin, end and pad a text. Where none pads, the one that ends does."""
    settings: Any = model.generation_config or model.config.get_text_config()
    own: Any = model.config.get_text_config()
    begin, end, pad = (
        getattr(settings, key, None) if getattr(settings, key, None) is not None else own_id
        for key, own_id in (
            ("bos_token_id", own.bos_token_id),
            ("eos_token_id", own.eos_token_id),
            ("pad_token_id", own.pad_token_id),
        )
    )
    if end is None:
        end = 0 if tokenizer is None else tokenizer.eos_token_id or 0
    first = end[0] if isinstance(end, list) else end
    return {
        "bos_token_id": first if begin is None else begin,
        "eos_token_id": end,
        "pad_token_id": first if pad is None else pad,
    }
