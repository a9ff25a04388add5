"""Models that are no causal language models, with adapters, to the targets of simulations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import qwlora
from qwlora import LayerRule, Scheme, Schemes
from qwlora.errors import ExportError
from qwlora.grid.scheme import parse_scheme
from qwlora.simulation.adapter_simulations import AdapterSimulations
from qwlora.targets.npu.qnn import QnnModel
from qwlora.targets.onnx.onnx_runtime import OnnxModel
from simulation.tiny_architectures import make

HTP = Schemes(
    quantize_residual_adds=True, symmetric_matmul_second_input=True, adapter_weights=Scheme(8)
)


class Cnn(nn.Module):
    """A classifier of images; one convolution has no bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 16, 3, stride=2, bias=False)
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(image))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def batches(kind: str) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    if kind == "cnn":
        return [{"image": torch.randn(1, 3, 12, 12, generator=g)} for _ in range(3)]
    ids = [torch.randint(3, 99, (1, 12), generator=g) for _ in range(3)]
    return [{"input_ids": own, "attention_mask": torch.ones_like(own)} for own in ids]


def simulated(kind: str, mode: Any = "all") -> AdapterSimulations:
    base: Any = Cnn().eval() if kind == "cnn" else make("BERT, classification")
    rules = [LayerRule("*_embeddings", Scheme(8))]
    if kind == "cnn":
        rules = [LayerRule(name, parse_scheme("w8-channel")) for name in ("first", "second")]
    qwlora.quantize_(base, "w4-channel", solver="rtn", rules=rules)
    layers = ["first", "second", "head"] if kind == "cnn" else ["query", "value"]
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=layers, init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(base, lora, "first")
    model.add_adapter("second", lora)
    made = qwlora.simulate_adapters(model.eval(), batches(kind)[0], HTP, mode)
    made.calibrate(batches(kind))
    return made


@pytest.mark.parametrize("kind", ["cnn", "bert"])
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


@pytest.mark.parametrize("kind", ["cnn", "bert"])
def test_qairt_files_of_one_graph(kind: str, tmp_path: Path) -> None:
    made = simulated(kind, "adapter_only")
    with pytest.raises(ExportError, match=r"no causal language model.*Give `sample`"):
        qwlora.export(made, "qairt", tmp_path / "none")
    qwlora.export(made, "qairt", tmp_path / "files", sample=batches(kind)[0])
    assert (tmp_path / "files/forward_model.onnx").is_file()
    # a mask and token ids are the host's; the classifier of images has none
    assert (tmp_path / "files/forward_host.onnx").is_file() == (kind == "bert")
    assert (tmp_path / "files/golden/first/forward/golden.json").is_file()
    rows = qwlora.verify(tmp_path / "files", made, batches(kind))
    assert {row.what.partition(":")[0] for row in rows} == {"first", "second"}
    assert all(row.passed for row in rows)


@pytest.mark.client
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cnn", "bert"])
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


class ConstantBias(nn.Module):
    """A convolution whose bias the model computes from the shape of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 8), nn.Conv2d(3, 4, 1, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        weight = self.conv.weight
        bias = torch.full((weight.shape[0],), 0.5)
        return nn.functional.conv2d(self.linear(image), weight, bias)


def test_only_a_bias_of_zeros_is_removed(tmp_path: Path) -> None:
    model = ConstantBias().eval()
    qwlora.quantize_(model, "w8-channel", solver="rtn")
    batch = {"image": torch.randn(1, 3, 8, 8)}
    simulation = qwlora.simulate(model, batch)
    simulation.calibrate([batch])
    qwlora.export(simulation, "onnx_each", tmp_path)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    assert [len(node.input) for node in graph.node if node.op_type == "Conv"] == [3]
