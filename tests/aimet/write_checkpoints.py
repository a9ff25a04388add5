"""Write files of target `qairt_pipeline`, and what the base computes with them.

    python tests/aimet/write_checkpoints.py FOLDER        in the environment of `make test`

FOLDER/GRID/ has base/ and first/, and expected.safetensors: codes and scales of every weight, and
logits of base and adapter. test_checkpoints.py reads them with aimet-torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import qwlora
from qwlora.nn.packed_layer import packed_weights

GRIDS = ("w4-tensor", "w8-tensor-asymmetric", "w4-channel", "w4-channel-asymmetric")
GRIDS += ("w8-block16", "w4-block16-asymmetric", "w4-lpbq16")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
SIZES |= {"tie_word_embeddings": False}
ROPE = {"rope_theta": 500000.0, "rope_type": "default"}  # another default is noticed
IDS = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def write(grid: str, folder: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=ROPE)).eval()
    for parameter in model.parameters():
        parameter.mul_(4 if parameter.ndim > 1 else 1.3)
    qwlora.quantize_(model, grid, "rtn")
    expected = {"ids": IDS, "base": model(input_ids=IDS).logits}
    for name, layer in packed_weights(model).items():
        expected[f"{name}.codes"] = layer.codes
        expected[f"{name}.scale"] = layer.encoding.scale.flatten().clone()
    shape = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    shape.init_lora_weights = False
    adapted = get_peft_model(model, shape).eval()
    qwlora.save_adapter(adapted, folder / "trained")
    expected["adapter"] = adapted(input_ids=IDS).logits
    qwlora.export(adapted.unload(), "qairt_pipeline", folder, {"first": folder / "trained"})
    save_file(expected, folder / "expected.safetensors")


def main() -> None:
    torch.set_num_threads(1)
    for grid in GRIDS:
        write(grid, Path(sys.argv[1]) / grid)
        print(grid, flush=True)


if __name__ == "__main__":
    main()
