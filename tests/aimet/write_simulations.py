"""Write our half of the comparison of simulations with aimet-torch.

    python tests/aimet/write_simulations.py FOLDER

It needs transformers 5, which AIMET does not support, so the two halves meet in files. For every
case, FOLDER/CASE/ contains:

    case.json                  model configuration, who placed, scaling of the adapter
    float.safetensors          the model before quantization
    adapter.safetensors        LoRA weights by canonical name (empty without an adapter)
    batches.safetensors        token ids: calibration.0, calibration.1, ..., evaluation
    encodings.safetensors      NAME.scale and NAME.offset of our encodings
    results.safetensors        logits of the evaluation batch, plain (float) and simulated; every
                               simulated value as values.NAME

`make test-aimet` runs this, then test_simulation.py.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qwlora import PerChannel, Scheme, Schemes, quantize_, simulate
from qwlora.simulation.placement_rules import PlacementRule
from qwlora.system.parameter_names import canonical_name, is_adapter_name

MODEL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260}
MODEL |= {"max_position_embeddings": 128, "tie_word_embeddings": False}
CALIBRATION_BATCHES = 4
SHAPE = (2, 16)
EVALUATION_SEED = 100


@dataclass(frozen=True)
class Case:
    """One pair of simulations.

    Args:
        as_aimet: quantize what AIMET does by default, which sees only modules; otherwise AIMET gets
            a module for every operator that we quantize.
    """

    name: str
    base: str
    activations: Scheme
    rank: int = 0
    as_aimet: bool = False


A8, A16 = Scheme(8, symmetric=False), Scheme(16, symmetric=False)
CASES = [
    Case("placed by AIMET, W4 per block, A16", "w4-block32", A16, as_aimet=True),
    Case("placed by AIMET, W8 per channel, A8", "w8-channel", A8, as_aimet=True),
    Case("placed by us, W4 per block, A16", "w4-block32", A16),
    Case("placed by us, W4 per block, A8", "w4-block32", A8),
    Case("placed by us, W4 per block, A16, LoRA int8", "w4-block32", A16, rank=4),
    Case("placed by us, W4 per block, A8, LoRA int8", "w4-block32", A8, rank=4),
]
# Missing in AIMET's graph of a Llama: operators that are functions, except the input of down_proj.
UNSEEN_BY_AIMET = tuple(
    PlacementRule(path, keep="float", of="activations")
    for path in ("model.embed_tokens", "model.rotary_emb", "*.self_attn")
)


def ids(seed: int) -> Tensor:
    return torch.randint(0, 256, SHAPE, generator=torch.Generator().manual_seed(seed))


def inputs(token_ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}


def make_model(case: Case) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """The quantized model of a case with its adapter; its float weights, and its float logits."""
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**MODEL, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            is_matrix = parameter.ndim > 1
            parameter.copy_(4 * parameter if is_matrix else 1 + 0.2 * torch.randn_like(parameter))
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if case.rank:
        shape: Any = {"r": case.rank, "lora_alpha": 3 * case.rank, "target_modules": "all-linear"}
        model = get_peft_model(model, LoraConfig(**shape, init_lora_weights=False)).eval()
    with torch.no_grad():
        plain = model(**inputs(ids(EVALUATION_SEED)), use_cache=False).logits
    quantize_(model, case.base, "rtn")
    return model, weights, plain


def write(case: Case, folder: Path) -> None:
    folder.mkdir(parents=True)
    model, weights, plain = make_model(case)
    evaluation = ids(EVALUATION_SEED)
    calibration = [ids(seed) for seed in range(CALIBRATION_BATCHES)]
    channel = Scheme(8, granularity=PerChannel(0))
    rules = UNSEEN_BY_AIMET if case.as_aimet else ()
    schemes = Schemes(case.activations, adapter_weights=channel, parameters=channel, rules=rules)
    simulation = simulate(model, inputs(evaluation), schemes)
    simulation.calibrate([inputs(batch) for batch in calibration])
    parts = {
        f"{name}.{part}": getattr(e, part).clone().contiguous()
        for name, e in simulation.encodings.items()
        for part in ("scale", "offset")
    }
    save_file(parts, folder / "encodings.safetensors")
    save_file(weights, folder / "float.safetensors")
    adapter = {
        canonical_name(name): p.detach().clone()
        for name, p in model.named_parameters()
        if is_adapter_name(name)
    }
    save_file(adapter, folder / "adapter.safetensors")
    batches = {f"calibration.{i}": batch for i, batch in enumerate(calibration)}
    save_file({"evaluation": evaluation, **batches}, folder / "batches.safetensors")
    results = {"plain": plain, "simulated": simulation.logits(evaluation)}
    for name, value in simulation.values(evaluation).items():
        results[f"values.{name}"] = value.contiguous()
    save_file(results, folder / "results.safetensors")
    record: dict[str, Any] = {"name": case.name, "model": MODEL, "as_aimet": case.as_aimet}
    record["scaling"] = 3.0 if case.rank else None
    encodings = simulation.encodings.items()
    record["schemes"] = {name: encoding.scheme.to_json() for name, encoding in encodings}
    (folder / "case.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for number, case in enumerate(CASES):
        write(case, folder / f"{number}")
        print(case.name, flush=True)


if __name__ == "__main__":
    main()
