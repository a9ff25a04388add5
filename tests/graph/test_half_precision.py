"""bfloat16 and float16 models: trained in their own type, simulated and exported in float32."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import qwlora
from conftest import byte_tokenizer, tiny_model
from qwlora.simulation.adapter_simulations import simulate_adapters
from qwlora.targets.onnx.onnx import export_onnx
from targets.proofs import check_parity, verify_onnx

HALF = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
IDS = torch.randint(0, 256, (3, 2, 16), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in IDS]


def trained(folder: Path, dtype: torch.dtype, **lora: bool) -> PeftModel:
    """A checkpoint in `dtype`, loaded in its own type, quantized and trained for a step."""
    tiny_model("llama", layers=1).to(dtype).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == dtype
    qwlora.quantize_(model, "w4-block32", "rtn")
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(model, config, **lora)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(input_ids=IDS[0], labels=IDS[0]).loss.backward()
    optimizer.step()
    return model.eval()


@pytest.mark.parametrize("dtype", HALF)
def test_a_half_precision_model_becomes_a_verified_file(tmp_path: Path, dtype: torch.dtype) -> None:
    model = trained(tmp_path / "checkpoint", dtype)
    before = {name: (id(p), p.dtype) for name, p in model.state_dict(keep_vars=True).items()}
    own = model(**BATCHES[0]).logits
    simulation = qwlora.simulate(model, BATCHES[0])
    after = {name: (id(p), p.dtype) for name, p in model.state_dict(keep_vars=True).items()}
    assert after == before
    assert torch.equal(model(**BATCHES[0]).logits, own)
    simulation.calibrate(BATCHES)

    export_onnx(simulation.graph(), tmp_path / "onnx")
    parity = verify_onnx(tmp_path / "onnx", simulation, IDS[2], layer_tokens=16)
    check_parity(parity, "onnx")

    with torch.no_grad():
        found = simulation(**BATCHES[0]).logits
    assert own.dtype == dtype
    assert found.dtype == torch.float32
    rounding = 16 * torch.finfo(dtype).eps * own.float().abs().max()
    assert (own.float() - found).abs().max() < rounding

    # the graph is that of the base that is saved
    simulation.save(tmp_path / "simulation")
    qwlora.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "base").mkdir(exist_ok=True)
    qwlora.save_base(model.get_base_model(), tmp_path / "base", byte_tokenizer(), source="tiny")

    base = qwlora.load_base(tmp_path / "base")
    adapted = qwlora.load_adapter(base, tmp_path / "adapter").eval()
    again = qwlora.load_simulation(tmp_path / "simulation", adapted)

    assert torch.equal(again(**BATCHES[0]).logits, found)


def test_adapters_in_half_precision_share_one_graph(tmp_path: Path) -> None:
    model = trained(tmp_path / "checkpoint", torch.bfloat16, autocast_adapter_dtype=False)
    model.add_adapter("second", model.peft_config["default"], autocast_adapter_dtype=False)
    assert {p.dtype for name, p in model.named_parameters() if "lora" in name} == {torch.bfloat16}

    simulations = simulate_adapters(model.eval(), BATCHES[0])

    assert simulations.captures == 1
    with simulations["default"].only(), simulations["second"].only():
        first, second = (simulations[name](**BATCHES[0]).logits for name in ("default", "second"))
    assert not torch.equal(first, second)
