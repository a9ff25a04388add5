"""Bases and adapters of target `hf` for vLLM, and what the packed models say of a few tokens.

python write_files.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import qwlora
from qwlora.targets.canonical_adapter import read_canonical
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedBase

# of 4 bits: vLLM has no kernel for others on a CPU
SCHEMES = ("w4-block32", "w4-signed64", "w4-channel", "w4-block32-asymmetric")
ADAPTERS: dict[str, dict[str, Any]] = {
    "first": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "second": {
        "r": 4,
        "lora_alpha": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 6},
    },
}
IDS = torch.randint(3, 250, (1, 24), generator=torch.Generator().manual_seed(1))


def write(scheme: str, folder: Path) -> None:
    """A base, its adapters, and log_probs.json: by adapter, of each token given those before it."""
    torch.manual_seed(0)
    sizes: Any = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"max_position_embeddings": 128, "initializer_range": 0.08}  # tells tokens apart
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    qwlora.quantize_(model, scheme, "search" if "block" in scheme or "signed" in scheme else "rtn")
    backend = TARGETS["hf"].backend
    (folder / "base").mkdir(parents=True)
    backend.write_base(ExportedBase(model, None), folder / "base")
    said = {"none": log_probs(model)}
    adapted: Any = None
    for name, settings in ADAPTERS.items():
        lora = LoraConfig(init_lora_weights=False, **settings)
        if adapted is None:
            adapted = get_peft_model(model, lora, name)
        else:
            adapted.add_adapter(name, lora)
        adapted.set_adapter(name)
        said[name] = log_probs(adapted.eval())
        qwlora.save_adapter(adapted, folder / "trained" / name, adapter=name)
        (folder / name).mkdir()
        canonical = read_canonical(folder / "trained" / name)
        backend.write_adapter(canonical, folder / "base", folder / name)
    (folder / "log_probs.json").write_text(json.dumps({"ids": IDS[0].tolist(), **said}))


@torch.no_grad()
def log_probs(model: Any) -> list[float]:
    found = model(input_ids=IDS).logits[0, :-1].double().log_softmax(-1)
    return found.gather(-1, IDS[0, 1:, None])[:, 0].tolist()


if __name__ == "__main__":
    for name in SCHEMES:
        write(name, Path(sys.argv[1]) / name)
