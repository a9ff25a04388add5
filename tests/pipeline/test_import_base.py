"""`qwlora base import`: other tools' integers become a base folder, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qwlora
from conftest import byte_tokenizer
from qwlora.cli.main import main

MLX = Path(__file__).parents[1] / "formats" / "files" / "mlx-llama"


def qwlora_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr("sys.argv", ["qwlora", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_the_imported_base_computes_what_its_own_tool_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(MLX, tmp_path / "mlx")
    byte_tokenizer().save_pretrained(tmp_path / "mlx")
    out = tmp_path / "base"
    assert qwlora_cli(monkeypatch, "base", "import", tmp_path / "mlx", "--out", out) == 0
    printed = capsys.readouterr().out
    model = qwlora.load_base(out)
    assert qwlora.fingerprint(model) in printed
    expected = load_file(MLX / "expected.safetensors")
    with torch.no_grad():
        logits = model(input_ids=expected["tokens"].long()).logits
    assert float((logits - expected["logits"]).abs().max()) < 1e-5

    before = {file: file.read_bytes() for file in out.iterdir()}
    assert qwlora_cli(monkeypatch, "base", "import", tmp_path / "mlx", "--out", out) == 2
    assert "is not empty" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in out.iterdir()} == before


def test_a_float_model_has_nothing_to_import(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = checkpoints["llama"]
    assert qwlora_cli(monkeypatch, "base", "import", source, "--out", tmp_path / "base") == 2
    assert "no integers to import" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()


def test_a_folder_without_a_tokenizer_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qwlora_cli(monkeypatch, "base", "import", MLX, "--out", tmp_path / "base") == 2
    assert "has no tokenizer" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
