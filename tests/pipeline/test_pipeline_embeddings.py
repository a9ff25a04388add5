"""A vision-language model by recipe: its language model takes embeddings, in files of every layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import byte_tokenizer, write_recipe
from qwlora.pipeline.run import run
from qwlora.recipe import load_recipe
from simulation.tiny_architectures import VISION_LANGUAGE, with_large_weights

RECIPE: Any = {
    "base": {
        "weights": "w8-channel",
        "solver": "rtn",
        "rules": [{"match": "model.visual*", "keep": "float"}],
    },
    "adapters": [
        {
            "name": "first",
            "rank": 2,
            "steps": 2,
            "warmup_steps": 1,
            "target_modules": r".*language_model.*\.[qv]_proj",
        }
    ],
    "simulation": {
        "inputs": "embeddings",
        "residual_adds": "quantize",
        "symmetric_matmul_second_input": True,
        "key_value_bitwidth": 8,
    },
    "export": {
        "targets": ["onnx", "aimet", "qairt", "hf"],
        "graphs": {"tokens": [8, 1], "context": [32]},
    },
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A Qwen2-VL of one block that knows all bytes."""
    torch.manual_seed(0)
    model = with_large_weights(VISION_LANGUAGE["Qwen2-VL"]())
    del model.get_decoder().layers[1:]
    text = model.config.get_text_config()
    text.num_hidden_layers, text.layer_types = 1, text.layer_types[:1]
    model.resize_token_embeddings(260, mean_resizing=False)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_the_language_model_of_a_vision_language_model(
    checkpoint: Path, corpus: Path, tmp_path: Path
) -> None:
    path, out = write_recipe(tmp_path, checkpoint, corpus, **RECIPE), tmp_path / "out"
    results = run(load_recipe(path), out, say=lambda line: None)
    assert results["parity"].keys() == {"onnx", "aimet", "qairt", "hf"}
    for card in (out / "export/hf/README.md", out / "adapters/first/README.md"):
        assert "Qwen2VLForConditionalGeneration.from_pretrained" in card.read_text()
    folders = ("onnx/base", "aimet/first", "qairt")
    tables = [
        load_file(out / "export" / folder / "token_embeddings.safetensors") for folder in folders
    ]
    for table in tables:
        assert table["inputs_embeds"].shape == (260, 64)
