"""Exports of models other than language models, and the limits of their proof."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from qwlora import Scheme, Schemes, Simulation, export, quantize_, simulate, verify
from qwlora.errors import ExportError, VerificationError
from qwlora.formats.aimet_encodings import read_encodings
from qwlora.targets.onnx.onnx_runtime import OnnxModel, read_session_options
from qwlora.targets.proof.compare import compare_layers
from simulation.tiny_architectures import inputs, make
from targets.proofs import check_parity, verify_onnx_outputs

NAME = "ViT, classification"
BATCHES = [inputs(NAME, seed) for seed in range(2)]


Bundle = tuple[Path, Simulation]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = make(NAME)
    quantize_(model, "w4-block32", "rtn")
    simulation = simulate(model, BATCHES[0], Schemes(Scheme(8, symmetric=False)))
    simulation.calibrate(BATCHES)
    folder = tmp_path_factory.mktemp("image")
    export(simulation, "onnx_each", folder)
    return folder, simulation


def test_an_exported_image_model_computes_what_was_simulated(bundle: Bundle) -> None:
    folder, simulation = bundle
    parity = verify_onnx_outputs(folder, simulation, BATCHES)
    check_parity(parity, NAME)
    assert parity.figures["sqnr"]["logits"] > 60
    assert parity.figures["layers"] == sum(m.kind == "activation" for m in simulation.marks)
    rows = verify(folder, simulation, BATCHES)
    assert rows == list(parity.checks)
    assert {row.what for row in rows} >= {"signal to noise of output logits"}
    assert read_session_options(folder)["session.disable_quant_qdq"] == "1"  # no integer kernels
    with pytest.raises(VerificationError, match="at least one batch"):
        verify(*bundle, [])
    with pytest.raises(ExportError, match="pixel_values was not given"):
        OnnxModel(folder).run({})


class Outputs(nn.Module):
    """Outputs: an input, a parameter, one tensor twice, one named `mean`; values set in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(8, 8), nn.Parameter(torch.tensor([2.0]))

    def forward(self, add: Tensor, ids: Tensor, unused: Tensor) -> dict[str, Tensor]:
        y = self.first(add + 1)
        both = torch.zeros(*y.shape[:-1], 16)
        both[..., ::2], both[..., 1::2] = y, 2 * y
        scaled = y * self.scale.exp()
        result = {"mean": scaled.mean(1), "y": y, "same": y, "both": both, "ids": ids}
        return {**result, "scale": self.scale}


@pytest.mark.parametrize("target", ["onnx_each", "aimet"])
def test_every_output_is_in_the_files_under_its_name(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Outputs().eval().requires_grad_(False)
    quantize_(model, "w8-channel", "rtn")
    floats = {"add": torch.randn(2, 4, 8), "unused": torch.randn(2, 4)}
    batch = {**floats, "ids": torch.randint(0, 9, (2, 4))}
    simulation = simulate(model, batch)
    assert "unused" not in {value.name for value in simulation.placement.values}
    simulation.calibrate([batch])
    if target == "aimet":
        with pytest.raises(ExportError, match="Give `sample`"):
            export(simulation, target, tmp_path)
    export(simulation, target, tmp_path, sample=batch)
    rows = verify(tmp_path, simulation, [batch])
    assert all(row.passed for row in rows)
    outputs = [row.what.rpartition(" ")[2] for row in rows if "of output" in row.what]
    assert outputs == ["mean", "y", "same", "both", "out_ids", "out_scale"]
    (path,) = tmp_path.rglob("model.onnx")
    graph = onnx.load(path).graph
    names = {output for node in graph.node for output in node.output}
    names |= {value.name for value in (*graph.input, *graph.initializer)}
    assert read_encodings(path.with_name("model.encodings")).by_name.keys() <= names


def test_inputs_and_outputs_have_names_and_shapes_of_any_rank(bundle: Bundle) -> None:
    folder, simulation = bundle
    file = onnx.load(folder / "model.onnx", load_external_data=False)
    shapes = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in [*file.graph.input, *file.graph.output]
    }
    assert shapes == {"pixel_values": ["batch", 3, 16, 16], "logits": ["batch", 5]}
    assert "pixel_values" in simulation.encodings
    tensors = {o for node in file.graph.node for o in node.output}
    assert {"pixel_values.codes", "pixel_values.dequantized"} <= tensors
    entries = json.loads((folder / "model.encodings").read_text())["activation_encodings"]
    assert "pixel_values" in {entry["name"] for entry in entries}


def test_a_changed_scale_fails_the_proof(bundle: Bundle, tmp_path: Path) -> None:
    folder, simulation = bundle
    file = onnx.load(folder / "model.onnx")
    (scale,) = (i for i in file.graph.initializer if i.name == "classifier.weight.scale")
    larger = onnx.numpy_helper.to_array(scale) * np.float32(1.1)
    scale.CopyFrom(onnx.numpy_helper.from_array(larger, scale.name))
    onnx.save(file, tmp_path / "model.onnx")
    (tmp_path / "session_options.json").write_text((folder / "session_options.json").read_text())
    facts = r"(?s)output logits: .* dB \(limit: at least .*layer .* steps \(limit: at most 2 steps"
    with pytest.raises(VerificationError, match=facts):
        verify_onnx_outputs(tmp_path, simulation, BATCHES)


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_few_steps_in_a_small_layer_are_chance(bundle: Bundle, share: float) -> None:
    folder, simulation = bundle
    values, encodings = simulation.values(BATCHES[0]), simulation.graph().encodings
    sizes = {name: value.numel() for name, value in values.items() if name in encodings}
    small = min((n for n in sizes if sizes[n] > 60), key=lambda name: sizes[name])

    class OneStepOff(OnnxModel):
        def run_layers(
            self, values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
        ) -> dict[str, Tensor]:
            found = super().run_layers(values, tensors)
            wrong = values[small].flatten().clone()
            wrong[: max(1, int(share * len(wrong)))] += encodings[small].scale
            return {**found, small: wrong.view_as(values[small])}

    parity = compare_layers(OneStepOff(folder), simulation, BATCHES[0])
    assert bool(parity.problems) == (share == 1.0)
