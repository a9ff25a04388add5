"""`qwlora import-base`: other tools' integers become a base folder, bit for bit."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

import qwlora
from cli.command_line import answered, refused
from conftest import byte_tokenizer

MLX = Path(__file__).parents[1] / "formats" / "files" / "mlx-llama"


def test_the_imported_base_computes_what_its_own_tool_does(tmp_path: Path) -> None:
    shutil.copytree(MLX, tmp_path / "mlx")
    byte_tokenizer().save_pretrained(tmp_path / "mlx")
    out = tmp_path / "base"
    said = answered("import-base", tmp_path / "mlx", "--out", out)
    model = qwlora.load_base(out)
    assert qwlora.fingerprint(model) in said
    expected = load_file(MLX / "expected.safetensors")
    with torch.no_grad():
        logits = model(input_ids=expected["tokens"].long()).logits
    assert float((logits - expected["logits"]).abs().max()) < 1e-5

    before = {file: file.read_bytes() for file in out.iterdir()}
    assert "is not empty" in refused("import-base", tmp_path / "mlx", "--out", out)
    assert {file: file.read_bytes() for file in out.iterdir()} == before


def test_a_float_model_has_nothing_to_import(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    said = refused("import-base", checkpoints["llama"], "--out", tmp_path / "base")
    assert "no integers to import" in said
    assert not (tmp_path / "base").exists()


def test_a_folder_without_a_tokenizer_leaves_nothing(tmp_path: Path) -> None:
    assert "has no tokenizer" in refused("import-base", MLX, "--out", tmp_path / "base")
    assert list(tmp_path.iterdir()) == []
