"""Graphs of one structure are translated once, and the files are those of separate translations."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from qwlora import Scheme, Schemes, Simulation, quantize_, simulate
from qwlora.targets.onnx import onnx_model
from qwlora.targets.onnx.onnx import export_onnx

BATCH = {"input": torch.randn(8, 32, generator=torch.Generator().manual_seed(3))}


def simulation(seed: int, width: int = 32, activations: int = 16) -> Simulation:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 32)).eval()
    quantize_(model, "w4-block32", solver="rtn")
    made = simulate(model, BATCH, Schemes(Scheme(activations, symmetric=False)))
    made.calibrate([BATCH])
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_model_of_a_structure_is_not_translated_and_gets_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, object] = {}
    monkeypatch.setattr(onnx_model, "_translations_by_structure", kept)
    first, second = simulation(0), simulation(1, activations=8)
    with mock.patch("torch.onnx.export", side_effect=torch.onnx.export) as translations:
        export_onnx(first.graph(), tmp_path / "first")
        export_onnx(second.graph(), tmp_path / "second")
        assert translations.call_count == 1
        kept.clear()
        export_onnx(second.graph(), tmp_path / "again")
        assert translations.call_count == 2
    assert files(tmp_path / "second") == files(tmp_path / "again")
    assert files(tmp_path / "second") != files(tmp_path / "first")
    for name, content in files(tmp_path / "first").items():
        # torch.onnx gives every node the stack trace of its call
        assert b"stack_trace" not in content, name
        assert str(Path(onnx_model.__file__).parents[3]).encode() not in content, name


def test_another_structure_is_translated_anew_and_the_oldest_translation_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_model, "_translations_by_structure", {})
    monkeypatch.setattr(onnx_model, "TRANSLATIONS_KEPT", 1)
    first, wider = simulation(0).graph(), simulation(0, width=64).graph()
    with mock.patch("torch.onnx.export", side_effect=torch.onnx.export) as translations:
        for graph in (first, wider, first):
            export_onnx(graph, tmp_path)
    assert translations.call_count == 3
