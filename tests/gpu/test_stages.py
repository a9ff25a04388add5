"""Every stage on a device computes what it computes on the CPU, with data that is on the CPU.

Integers are equal. Floats differ by what the order of a sum changes: relative to the largest of a
tensor, 1e-5 on the pretend device, whose products may see other strides, and 1e-3 on a GPU.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import qwlora
from conftest import ARCHITECTURES, byte_tokenizer, tiny_model
from gpu.pretend_device import COUNTS, CPU, NAME, reset_counts
from qwlora.analysis.generate_text import Sampling, generate_text, sample_sequences
from qwlora.analysis.quantization_costs import layer_sqnr, sensitivities
from qwlora.analysis.token_scores import logits_of, score_tokens
from qwlora.nn.packed_layer import packed_weights
from qwlora.quantize.gptq import GptqSettings
from qwlora.system.device import device_of, moved
from simulation.tiny_architectures import make

pytestmark = pytest.mark.usefixtures("shared_captures")

IDS = torch.randint(0, 250, (4, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


class Layers(nn.Module):
    """The smallest model that reads tokens and gives logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.head = (
            nn.Embedding(260, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 260),
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.first(self.embed(input_ids)).relu())


@functools.cache
def _built(architecture: str) -> Any:
    """A float model; attention and experts without fused kernels, which depend on the device."""
    torch.manual_seed(0)
    if architecture == "layers":
        return Layers().eval()
    is_small = architecture in ARCHITECTURES
    model: Any = tiny_model(architecture, layers=1) if is_small else make(architecture)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    return model


def built(device: torch.device, architecture: str = "llama") -> Any:
    return copy.deepcopy(_built(architecture)).to(device)


def base(device: torch.device, architecture: str = "llama") -> Any:
    model = built(device, architecture)
    qwlora.quantize_(model, "w4-block32", "rtn")
    return model


def adapted(device: torch.device, architecture: str = "llama") -> Any:
    layers = ["q_proj", "o_proj"] if architecture == "Mixtral" else "all-linear"
    config = LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    model = base(CPU, architecture)
    torch.manual_seed(0)
    return get_peft_model(model, config).eval().to(device)


def assert_same(measured: Any, expected: Any, device: torch.device) -> None:
    """Tensors, numbers and texts, in dicts and lists, on `device` and on the CPU."""
    relative = 1e-5 if device.type == NAME else 1e-3
    for found, wanted in zip(tree_leaves(measured), tree_leaves(expected), strict=True):
        if not isinstance(wanted, Tensor | float):
            assert found == wanted
            continue
        found, wanted = torch.as_tensor(found).detach().cpu(), torch.as_tensor(wanted).detach()
        off = relative * float(wanted.abs().max()) if wanted.is_floating_point() else 0
        torch.testing.assert_close(found, wanted, rtol=relative, atol=off)


def compare(compute: Callable[[torch.device], Any], device: torch.device) -> None:
    """What `compute` gives for `device` and for the CPU."""
    assert_same(compute(device), compute(CPU), device)


def grids(model: nn.Module) -> dict[str, Any]:
    return {
        name: (layer.codes.int(), layer.encoding.scale, layer.encoding.low_end)
        for name, layer in packed_weights(model).items()
    }


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return logits_of(model)(IDS)


GRIDS = "w4-block32 w4-signed32 w2-block32-asymmetric w4-channel w4-lpbq32 w3-channel-asymmetric"


@pytest.mark.parametrize(
    ("scheme", "solver", "options"),
    [
        *((scheme, "rtn", {}) for scheme in [*GRIDS.split(), "w8-tensor"]),
        ("w4-signed32", "search", {}),
        ("w2-block32-asymmetric", "sqnr", {}),
        ("w4-block32", "gptq", {"settings": {"gptq": GptqSettings(sweeps=1)}}),
    ],
)
def test_grids_and_solvers(scheme: str, solver: str, options: Any, device: torch.device) -> None:
    def compute(place: torch.device) -> Any:
        model = built(place, "layers")
        qwlora.quantize_(model, scheme, solver, calibration=IDS, **options)
        assert {tensor.device for tensor in model.state_dict().values()} == {place}
        if place == CPU and scheme in ("w4-lpbq32", "w3-channel-asymmetric"):
            assert torch._dynamo.explain(model)(IDS).graph_break_count == 0
        return grids(model), model(IDS.to(place))

    compare(compute, device)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "Gemma 3", "Phi-3", "Mixtral"])
def test_architectures(architecture: str, device: torch.device) -> None:
    """Loss and gradients of an adapter on a packed base, with the losses that training uses."""

    labels = IDS.clone()
    labels[:, :4] = -100

    def compute(place: torch.device) -> Any:
        model, batch = adapted(place, architecture), moved({**BATCH, "labels": labels}, place)
        with qwlora.memory_saving(model):
            reset_counts()
            loss = model(**batch).loss
            loss.backward()
        if architecture != "Mixtral":  # whose experts are chosen on the CPU
            assert COUNTS.synchronizations <= 1, "the host waits for the device once a step"
        return loss, [p.grad for p in model.parameters() if p.requires_grad]

    compare(compute, device)


def test_tuning_moments_starts_and_budget(device: torch.device) -> None:
    floats = built(CPU)

    def compute(place: torch.device) -> Any:
        model, peft = base(place), adapted(place)
        settings = qwlora.TuningSettings(steps=2, compute="float32")
        report = qwlora.tune_(model, built(place), IDS, settings)
        moments = dict(qwlora.observe_moments(model, IDS))
        starts = qwlora.initialize_(peft, "qera", floats, moments)
        errors = [(start.before, start.after) for start in starts.values()]
        budgeted, options = built(place), {"budget": qwlora.BitBudget(3.5)}
        qwlora.quantize_(budgeted, "w4-channel", "rtn", calibration=IDS[:1], **options)
        after = logits(peft), grids(budgeted)
        return report.before, report.after, moments, errors, after

    compare(compute, device)


def test_scores_generation_and_merging(device: torch.device, tmp_path: Path) -> None:
    computed = []
    for place in (CPU, device):
        tokenizer, model, folder = byte_tokenizer(), adapted(place), tmp_path / place.type
        reference = logits_of(built(place))
        scores = score_tokens(logits_of(model), IDS, "scoring", reference=reference)
        answer = generate_text(model.get_base_model(), tokenizer, IDS[:1], Sampling(3), print)
        sampled = sample_sequences(built(place), tokenizer, 2, 5)
        assert sampled.device == scores.nll.device == CPU
        qwlora.save_adapter(model, folder / "adapter")
        qwlora.save_base(base(place), folder / "base")
        loaded = qwlora.load_base(folder / "base", device=place)
        again = qwlora.load_adapter(loaded, folder / "adapter").eval()
        merged = qwlora.merged_model(adapted(place))
        numbers = [scores.to_json(), answer.text, sampled, qwlora.fingerprint(loaded)]
        computed.append([*numbers, logits(again), logits(merged)])
        assert device_of(again).type == device_of(merged).type == place.type
        qwlora.export(base(place), "hf", folder / "hf", adapters={"first": folder / "adapter"})
    assert_same(computed[1], computed[0], device)
    here, there = (sorted((tmp_path / p.type).rglob("*.safetensors")) for p in (CPU, device))
    assert [f.read_bytes() for f in here] == [f.read_bytes() for f in there] != []


def test_simulation_and_its_files(device: torch.device, tmp_path: Path) -> None:
    computed, simulations, batch = [], [], {"input_ids": IDS}
    for place in (CPU, device):
        model = base(place, "layers")
        simulation = qwlora.simulate(model, batch)
        simulation.calibrate([batch, {"input_ids": IDS[:, :5]}])
        simulations.append(simulation)
        found = {name: (e.scale, e.low_end) for name, e in simulation.encodings.items()}
        costs = {one.name: one.cost for one in sensitivities(simulation, [batch])}
        sqnr = layer_sqnr(simulation, [batch])
        computed.append([found, costs, sqnr, simulation.outputs(batch)])
        simulation.save(tmp_path / place.type)
    assert_same(computed[1], computed[0], device)
    shared = {tensor.data_ptr() for tensor in model.state_dict().values()}
    loaded = qwlora.load_simulation(tmp_path / CPU.type, model)
    assert_same(loaded.outputs(batch), computed[0][-1], device)
    qwlora.export(simulations[1], "onnx_each", tmp_path / "onnx")
    rows = qwlora.verify(tmp_path / "onnx", simulations[1], [batch])
    assert [row for row in rows if not row.passed] == [] != rows
    assert {p.data_ptr() for p in simulations[1].graph_module.parameters()} <= shared
    assert_same(simulations[0].to(device).outputs(batch), computed[0][-1], device)
    assert device_of(simulations[0].origin.model) == CPU, "the user's model stays where it is"
