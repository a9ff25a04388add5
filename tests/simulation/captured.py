"""Batches, a small model with an adapter, and one that is captured once for many simulations."""

from functools import cache
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from conftest import tiny_model
from qwlora import Schemes, quantize_, simulate
from qwlora.graph.capture import capture
from qwlora.simulation.simulation import Simulation


def batch(rows: int = 2, tokens: int = 16, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def adapted_layer(
    architecture: str = "llama", scheme: str = "w4-block32", seed: int = 1, **lora: Any
) -> PeftModel:
    """A packed model of one layer with an adapter on every linear layer."""
    model = tiny_model(architecture, layers=1)
    quantize_(model, scheme, "rtn")
    torch.manual_seed(seed)
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **lora}
    return get_peft_model(model, LoraConfig(**options)).eval()


@cache
def adapted() -> PeftModel:
    """A packed llama with an adapter on three kinds of layers; one lora_B is zero."""
    model = tiny_model("llama")
    model.set_attn_implementation("eager")  # what is captured, so that bits can be compared
    quantize_(model, "w4-block32", solver="rtn")
    torch.manual_seed(1)
    layers = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=layers, init_lora_weights=False)
    made = get_peft_model(model, config).eval()
    v_proj = made.get_submodule("base_model.model.model.layers.0.self_attn.v_proj")
    torch.nn.init.zeros_(v_proj.lora_B["default"].weight)
    return made


@cache
def _captured() -> Any:
    return capture(adapted(), batch())


def simulation(schemes: Schemes | None = None, **given: Any) -> Simulation:
    """A simulation of it, not calibrated."""
    with mock.patch("qwlora.simulation.simulation.capture", return_value=_captured()):
        return simulate(adapted(), batch(), schemes, **given)


def calibrated(model: torch.nn.Module, schemes: Schemes | None = None, **shape: int) -> Simulation:
    """A simulation of `model`, calibrated on three batches of a shape."""
    made = simulate(model, batch(**shape), schemes)
    made.calibrate([batch(**shape, seed=seed) for seed in range(3)])
    return made
