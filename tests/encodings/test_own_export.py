"""Our own exports validate without errors; warnings are only about tensors that stay float."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx.shape_inference import infer_shapes
from peft import LoraConfig, get_peft_model

from conftest import tiny_model
from qwlora import export_onnx, quantize_, simulate
from qwlora.encodings import Finding, convert, read, read_graph, validate

# Ops that stay float: norms, residual adds, rotary tables, masked scores, the product in SiLU.
COMPUTED = {"Add", "Mul", "Pow", "ReduceMean", "Sqrt", "Reciprocal", "Cos", "Sin", "Sigmoid"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    model = tiny_model("llama")
    quantize_(model, "w4-block32")
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    simulation = simulate(adapted, batch)
    simulation.calibrate([batch])
    export_onnx(simulation.graph(), folder, {})
    return folder


@pytest.fixture(scope="module")
def findings(bundle: Path) -> list[Finding]:
    return validate(bundle / "model.encodings", bundle / "model.onnx")


def test_every_warning_is_about_a_computed_float_tensor(
    bundle: Path, findings: list[Finding]
) -> None:
    model = infer_shapes(onnx.load(bundle / "model.onnx"))
    ops = {name: node.op_type for node in model.graph.node for name in node.output}
    kinds = {
        v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)
    }
    assert {f.severity for f in findings} == {"warning"}
    stored = {f.where for f in findings if f.where not in ops}
    assert all(name.endswith("inv_freq") for name in stored)
    computed = {f.where for f in findings} - stored
    assert {ops[name] for name in computed} <= COMPUTED
    assert {kinds[name] for name in computed} == {onnx.TensorProto.FLOAT}
    norms = 2 * 2 + 1
    assert sum(ops[name] == "ReduceMean" for name in computed) == norms
    assert len(findings) < 60


def test_blocks_convert_to_2_x_and_back(bundle: Path) -> None:
    """The order of blocks in 1.0.0 follows from the producer."""
    graph, file = read_graph(bundle / "model.onnx"), read(bundle / "model.encodings")
    assert file.parameters is not None
    parameters = {name: file.by_name[name] for name in file.parameters}
    assert {e.granularity for e in parameters.values()} >= {"block", "channel"}
    for version in ("2.0.0", "2.1.0"):
        # 2.x has no `excluded_layers` and `quantizer_args`.
        there = convert(file, version, lossy=True, graph=graph)
        # An asymmetric activation may happen to be centered.
        back = convert(there, "1.0.0", lossy=True, graph=graph)
        assert {name: back.by_name[name] for name in parameters} == parameters
