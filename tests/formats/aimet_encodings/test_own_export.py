"""Our own exports validate without findings, and what is taken from them is found."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import packed_model
from qwlora import simulate
from qwlora.formats.aimet_encodings import convert, read_encodings, read_graph, validate
from qwlora.targets.onnx.onnx import export_onnx


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    model = packed_model("llama", layers=1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    simulation = simulate(adapted, batch)
    simulation.calibrate([batch])
    export_onnx(simulation.graph(), folder, {})
    return folder


def test_our_own_export_has_no_finding(bundle: Path) -> None:
    """Its graph says what is quantized; what it leaves float (norms, sums, tables) is meant so."""
    assert validate(bundle / "model.encodings", bundle / "model.onnx") == []


def test_a_quantized_tensor_without_its_encoding_is_found(bundle: Path, tmp_path: Path) -> None:
    record = json.loads((bundle / "model.encodings").read_text())
    removed = [record[kind].pop(2)["name"] for kind in ("param_encodings", "activation_encodings")]
    (tmp_path / "less.encodings").write_text(json.dumps(record))
    found = validate(tmp_path / "less.encodings", bundle / "model.onnx")
    assert sorted((f.severity, f.where) for f in found) == [("warning", n) for n in sorted(removed)]


def test_blocks_convert_to_2_x_and_back(bundle: Path) -> None:
    """The order of blocks in 1.0.0 follows from the producer."""
    graph, file = read_graph(bundle / "model.onnx"), read_encodings(bundle / "model.encodings")
    assert file.parameters is not None
    parameters = {name: file.by_name[name] for name in file.parameters}
    assert {e.granularity for e in parameters.values()} >= {"block", "channel"}
    for version in ("2.0.0", "2.1.0"):
        # 2.x has no `excluded_layers` and `quantizer_args`.
        there = convert(file, version, lossy=True, graph=graph)
        # An asymmetric activation may happen to be centered.
        back = convert(there, "1.0.0", lossy=True, graph=graph)
        assert {name: back.by_name[name] for name in parameters} == parameters
