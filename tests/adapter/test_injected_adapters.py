"""Adapters that came in by `peft.inject_adapter_in_model` work with every function.

transformers 5.24 refuses its own adapter methods on such models with every released PEFT.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file

import qwlora
from conftest import packed_model, tiny_model
from qwlora import save_adapter, simulate, simulate_adapters
from qwlora.adapter.adapter_deltas import rounding_losses
from qwlora.adapter.attach import activate_, active_adapter, active_adapters
from qwlora.errors import TrainingError
from qwlora.nn.fingerprint import adapter_fingerprint

pytestmark = [
    pytest.mark.usefixtures("shared_captures"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
]

IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def base() -> Any:
    return packed_model("llama", layers=1)


def config() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)


def adapted(way: str) -> Any:
    torch.manual_seed(1)
    if way == "wrapped":
        model: Any = get_peft_model(base(), config(), adapter_name="one")
        model.add_adapter("two", config())
    else:
        model = base()
        inject_adapter_in_model(config(), model, adapter_name="one")
        inject_adapter_in_model(config(), model, adapter_name="two")
        activate_(model, ["one"])
    return model.eval()


def test_it_is_simulated_saved_and_loaded_like_a_wrapped_one(tmp_path: Path) -> None:
    found = []
    for way in ("injected", "wrapped"):
        made = simulate(adapted(way), BATCH)
        made.calibrate([BATCH])
        found.append(made.outputs(BATCH)["logits"])
        made.save(tmp_path / way)
        again = qwlora.load_simulation(tmp_path / way, adapted(way))
        assert torch.equal(again.outputs(BATCH)["logits"], found[-1])
        save_adapter(made.origin.model, tmp_path / f"adapter-{way}", adapter="one")
    assert torch.equal(*found)
    assert adapter_fingerprint(adapted("injected")) == adapter_fingerprint(adapted("wrapped"))
    folders = (tmp_path / f"adapter-{way}" for way in ("injected", "wrapped"))
    injected, wrapped = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert injected.keys() == wrapped.keys()
    loaded = qwlora.load_adapter(base(), tmp_path / "adapter-injected").eval()
    assert isinstance(loaded, PeftModel)
    assert torch.equal(loaded(**BATCH).logits, adapted("wrapped")(**BATCH).logits)


def test_several_injected_adapters_are_simulated_and_left_as_they_were() -> None:
    model = adapted("injected")
    with pytest.raises(TrainingError, match="no active adapter"):
        active_adapter(base())
    before = model(**BATCH).logits
    made = simulate_adapters(model, BATCH)
    made.calibrate([BATCH])
    assert set(made) == {"one", "two", "base"}
    logits = {name: simulation.outputs(BATCH)["logits"] for name, simulation in made.items()}
    assert not torch.equal(logits["one"], logits["two"])
    wrapped = simulate_adapters(adapted("wrapped"), BATCH)
    wrapped.calibrate([BATCH])
    for name, simulation in wrapped.items():
        assert torch.equal(simulation.outputs(BATCH)["logits"], logits[name])
    assert active_adapters(model) == ["one"]
    assert torch.equal(model(**BATCH).logits, before)


def test_it_is_initialized_and_trained() -> None:
    model = adapted("injected")
    assert len(rounding_losses(model)) == 2
    floats = {
        name: module.weight
        for name, module in tiny_model("llama", layers=1).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    reports = qwlora.initialize_(model, "svd", lambda path: floats[path.removesuffix(".weight")])
    assert len(reports) == 2
    assert all(report.after < report.before for report in reports.values())
    model.train()
    with qwlora.memory_saving(model):
        loss = model(**BATCH, labels=IDS).loss
        loss.backward()
    trained = [p for n, p in model.named_parameters() if "lora_" in n and ".one." in n]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)


def test_it_is_trained_on_the_graph_and_its_base_is_saved_without_it(tmp_path: Path) -> None:
    model = adapted("injected")
    saved = qwlora.save_base(model, tmp_path / "base", source="a test")
    assert saved == qwlora.fingerprint(base())
    loaded = qwlora.load_base(tmp_path / "base")
    assert torch.equal(loaded(**BATCH).logits, base()(**BATCH).logits)
    alone = simulate(loaded.eval(), BATCH)
    alone.calibrate([BATCH])
    known = alone.activation_encodings
    graph = qwlora.TrainingGraph(simulate(model, BATCH, activation_encodings=known))
    assert sum(p.requires_grad for p in graph.parameters()) == 4
