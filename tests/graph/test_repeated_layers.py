"""A packed weight that one graph reads more than once: by a layer that runs again, or by an adapter that asks for its layer's weight."""

import subprocess
import sys

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from conftest import tiny_model
from qwlora import quantize_, simulate
from qwlora.graph.capturable_model import visible_implementations
from qwlora.graph.quantized_graph import Kind
from qwlora.simulation.simulation import Simulation
from simulation.captured import batch
from simulation.tiny_architectures import ENCODER, VOCABULARY

IDS = batch()["input_ids"]


def checked(model: nn.Module) -> Simulation:
    """A calibrated simulation with one mark for each packed layer; it computes what the model does where nothing is quantized, and nearly so where all is."""
    made = simulate(model, batch())
    made.calibrate([batch(seed=seed) for seed in range(2)])
    packed = [path for path, module in model.named_modules() if hasattr(module, "packed")]
    assert sum(mark.kind is Kind.BASE for mark in made.marks) == len(packed)
    arguments = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad(), visible_implementations(model):
        expected: Tensor = model(**batch(), **arguments).logits
    with made.only():
        assert torch.equal(made.logits(IDS), expected)
    assert float((made.logits(IDS) - expected).norm() / expected.norm()) < 0.02
    return made


def test_layers_that_are_shared() -> None:
    torch.manual_seed(0)
    sizes = {"embedding_size": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
    model = t.AlbertForMaskedLM(t.AlbertConfig(**ENCODER, **sizes))
    quantize_(model, "w4-block32", "rtn")
    made = checked(model.eval())
    query = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query"
    names = {name.removeprefix(query) for name in made.encodings if name.startswith(query)}
    assert names == {".weight", ".bias", ".linear", ".linear_1"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dora_asks_for_the_weight_of_its_layer(name: str) -> None:
    model = tiny_model(name)
    model.set_attn_implementation("eager")
    quantize_(model, "w4-block32", solver="rtn")
    torch.manual_seed(1)
    options = {"init_lora_weights": False, "use_dora": True}
    checked(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **options)).eval())


@pytest.mark.slow
def test_a_model_without_packed_weights_needs_no_operators_of_theirs() -> None:
    program = "import torch; from qwlora import simulate; "
    program += "model = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval(); "
    program += "print(simulate(model, {'input': torch.ones(2, 4)}).inputs)"
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout == "('input',)\n", found.stderr
