"""What a model's source may be: whatever is incomplete or no float model is refused, never filled with random numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import byte_tokenizer, tiny_model
from qwlora import quantize_, save_base
from qwlora.base.source import load_model, load_tokenizer, locate
from qwlora.errors import SourceError

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / "model.safetensors"), name: value}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_whole_checkpoint_is_loaded(folder: Path) -> None:
    assert torch.equal(load_model(str(folder)).get_parameter(DOWN), tiny_model("llama").get_parameter(DOWN))


def test_what_is_missing_is_not_made_up(folder: Path) -> None:
    change(folder, DOWN, None)
    with pytest.raises(SourceError, match=rf"do not hold, or hold in another shape, {DOWN} of LlamaForCausalLM\. Download it again"):
        load_model(str(folder))
    change(folder, "model.layers.1.mlp.down.weight", torch.ones(2))
    with pytest.raises(SourceError, match=r"LlamaForCausalLM; the files hold model.layers.1.mlp.down.weight, which it does not have\."):
        load_model(str(folder))


def test_what_has_another_shape_is_not_made_up(folder: Path) -> None:
    change(folder, DOWN, torch.ones(3, 3))
    with pytest.raises(SourceError, match=r"cannot be loaded|in another shape"):
        load_model(str(folder))


def test_integers_are_not_loaded_as_floats(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model, base = tiny_model("llama"), tmp_path_factory.mktemp("base")
    quantize_(model, "w4-block32", "rtn")
    save_base(model, byte_tokenizer(), base, "somewhere")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    for source in (folder, base):
        assert not locate(str(source)).holds_floats
        with pytest.raises(SourceError, match=r"holds integers; they can be kept \(base.solver: keep\)"):
            load_model(str(source))


def test_a_folder_without_a_tokenizer_says_so(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"has no tokenizer: its files \(tokenizer.json and the like\) belong beside the weights"):
        load_tokenizer(str(folder))
    byte_tokenizer().save_pretrained(folder)
    assert load_tokenizer(str(folder))("a")["input_ids"]


def test_a_folder_of_gguf_files_names_them(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(SourceError, match=r"has no config.json; give one of its files: a.gguf, b.gguf$"):
        locate(str(tmp_path))
