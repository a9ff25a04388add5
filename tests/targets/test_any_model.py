"""Models that are no causal language models, with adapters, to the targets of simulations."""

from pathlib import Path

import onnx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import qwlora
from qwlora.errors import ExportError
from qwlora.targets.npu.qnn import QnnModel
from qwlora.targets.onnx.onnx_runtime import (
    OnnxModel,
    open_session,
    read_session_options,
    run_session,
)
from targets.any_models import batches, simulated

SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("bert", "dit", "unet")]


@pytest.mark.parametrize("kind", ["cnn", *SLOW])
def test_adapters_are_switched_in_one_onnx_session(kind: str, tmp_path: Path) -> None:
    made, tensors = simulated(kind), batches(kind)[0]
    qwlora.export(made, "onnx", tmp_path)
    rows = qwlora.verify(tmp_path, made, batches(kind))
    assert rows
    assert all(row.passed for row in rows)
    model = OnnxModel(tmp_path / "base", switches=True)
    found = []
    for name in ("first", "second", "first"):
        model.use(tmp_path / name)
        found.append(model.run(made[name].bind(tensors))[made[name].graph().interface.primary])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    operators = onnx.load(tmp_path / "base/model.onnx", load_external_data=False).graph.node
    assert "Expand" not in {n.op_type for n in operators if kind == "cnn"}  # zeros as a bias


@pytest.mark.parametrize("kind", ["cnn", "bert", *SLOW[1:]])
def test_qairt_files_of_one_graph(kind: str, tmp_path: Path) -> None:
    made = simulated(kind, "adapter_only")
    with pytest.raises(ExportError, match=r"not a causal language model.*Give `sample`"):
        qwlora.export(made, "qairt", tmp_path / "none")
    qwlora.export(made, "qairt", tmp_path / "files", sample=batches(kind)[0])
    assert (tmp_path / "files/forward_model.onnx").is_file()
    # a mask, token ids and time steps are the host's; the classifier of images has none
    assert (tmp_path / "files/forward_host.onnx").is_file() == (kind != "cnn")
    assert (tmp_path / "files/golden/first/forward/golden.json").is_file()
    rows = qwlora.verify(tmp_path / "files", made, batches(kind))
    assert {row.what.partition(":")[0] for row in rows} == {"first", "second"}
    assert all(row.passed for row in rows)


@pytest.mark.client
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", "bert", "dit", "unet"])
def test_the_htp_runs_the_whole_graph(kind: str, tmp_path: Path) -> None:
    made = simulated(kind, "none")
    qwlora.export(made, "qnn", tmp_path, sample=batches(kind)[0])
    rows = qwlora.verify(tmp_path, made, batches(kind))
    assert any("on the HTP" in row.what for row in rows)
    assert [row.what for row in rows if not row.passed] == []
    model = QnnModel(tmp_path / "base", tmp_path / "first", htp=True)
    inputs, found = made["first"].bind(batches(kind)[0]), []
    for name in ("first", "second", "first"):
        model.use(tmp_path / name)
        found.append(next(iter(model.run(inputs).values())))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


class Shared(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.relu(self.layer(x)))


@pytest.mark.parametrize("target", ["onnx", "qairt"])
def test_an_adapter_of_a_layer_that_is_called_twice(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Shared().eval().requires_grad_(False)
    qwlora.quantize_(model, "w8-channel", solver="rtn")
    lora = LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    batch = {"x": torch.randn(2, 4, 16)}
    made = qwlora.simulate_adapters(get_peft_model(model, lora, "first").eval(), batch)
    made.calibrate([batch])
    qwlora.export(made, target, tmp_path, sample=batch)
    assert all(row.passed for row in qwlora.verify(tmp_path, made, [batch]))


class ConstantBias(nn.Module):
    """A convolution whose bias the model computes from the shape of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 8), nn.Conv2d(3, 4, 1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        weight = self.conv.weight
        bias = torch.full((weight.shape[0],), 0.5)
        return nn.functional.conv2d(self.linear(image), weight, bias)


def test_a_computed_bias_is_kept_and_does_not_overflow(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ConstantBias().eval().requires_grad_(False)
    model.conv.weight *= torch.tensor([1, 1, 0.1, 0.01]).view(4, 1, 1, 1)
    # the convolution has 16 bits per channel, so that 0.5 is more than 2^31 steps of the last ones
    qwlora.quantize_(model, "w8-channel", solver="rtn")
    batch = {"image": torch.randn(1, 3, 8, 8)}
    simulation = qwlora.simulate(model, batch)
    simulation.calibrate([batch])
    qwlora.export(simulation, "onnx_each", tmp_path)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    assert [len(node.input) for node in graph.node if node.op_type == "Conv"] == [3]
    assert all(row.passed for row in qwlora.verify(tmp_path, simulation, [batch]))
    # ONNX Runtime 1.32 alone rounds the bias to int32, where it overflows
    options = {k: v for k, v in read_session_options(tmp_path).items() if "optimizers" not in k}
    (name,) = simulation.graph().interface.outputs
    found = run_session(open_session(tmp_path / "model.onnx", options), batch)[name]
    assert abs(float((found - simulation.outputs(batch)[name]).mean())) > 0.1
