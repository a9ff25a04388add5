"""Writes the golden files of test_gptq_awq_mlx.py with the formats' own
libraries: files/gptq-*, files/awq-* and files/gptqmodel-llama.

Run by hand, in an environment with gptqmodel 7.7.0 and AutoAWQ 0.2.9 (no GPU needed; AutoAWQ's
Python files are enough):

    python tests/formats/huggingface/make_gptq_awq_files.py

Each layer is packed by the library, its scales are set to float32 again, and the library unpacks it
into `expected.safetensors`.
"""

import json
import os
import shutil
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file

FILES = Path(__file__).parents[1] / "files"
IN, OUT = 64, 32


def measured(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points [out, groups], min-max, as these libraries find them."""
    grouped = weight.unflatten(1, (-1, group))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale)
    return scale, zero


def parts(case: str, layer: torch.nn.Module, *names: str) -> dict[str, torch.Tensor]:
    return {f"{case}.{name}": getattr(layer, name).clone() for name in names}


def unpacked(layer: torch.nn.Module) -> torch.Tensor:
    """What GPT-QModel makes of a layer, with scales in float32."""
    layer.scales = layer.scales.float()
    layer.post_init()
    return layer.dequantize_weight().t().float().contiguous()


def gptq() -> None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.model import (
        convert_gptq_v1_to_v2_format_module,
        convert_gptq_v2_to_v1_format_module,
    )

    for version in (1, 2):
        tensors, expected = {}, {}
        for bits, symmetric, group in product((2, 3, 4, 8), (True, False), (32, IN)):
            case = f"w{bits}-{'symmetric' if symmetric else 'asymmetric'}-{group}"
            torch.manual_seed(bits)
            linear = torch.nn.Linear(IN, OUT, bias=True)
            linear.weight.data[0].abs_()  # a zero point of 0, from which version 1 subtracts one
            scale, zero = measured(linear.weight.data, bits, group, symmetric)
            sizes = (bits, group, symmetric, False, IN, OUT, True, torch.int32)
            layer = TorchLinear(*sizes, register_buffers=True)
            layer.pack(linear, scale, zero, torch.arange(IN, dtype=torch.int32) // group)
            if version == 1:
                convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits))
            tensors |= parts(case, layer, "qweight", "qzeros", "scales", "g_idx", "bias")
            if version == 1:
                convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
            expected[f"{case}.weight"] = unpacked(layer)
        written(f"gptq-v{version}", tensors, expected)


def scattered() -> None:
    """Scattered groups, which must be refused, and contiguous groups in another order, which must
    not."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    tensors, expected = {}, {}
    torch.manual_seed(0)
    linear = torch.nn.Linear(IN, OUT, bias=False)
    scale, zero = measured(linear.weight.data, 4, 16, False)
    for case, index in (
        ("scattered", torch.arange(IN) % 4),
        ("runs", torch.tensor([2, 0, 3, 1]).repeat_interleave(16)),
    ):
        layer = TorchLinear(4, 16, False, True, IN, OUT, False, torch.int32, register_buffers=True)
        layer.pack(linear, scale, zero, index.int())
        tensors |= parts(case, layer, "qweight", "qzeros", "scales", "g_idx")
        expected[f"{case}.weight"] = unpacked(layer)
    written("gptq-order", tensors, expected)


def awq() -> None:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.modules.linear.gemv import WQLinear_GEMV
    from awq.utils.packing_utils import dequantize_gemm

    for kind, groups in (("gemm", (16, 32, IN)), ("gemv", (32, IN))):
        for group in groups:
            torch.manual_seed(group)
            linear = torch.nn.Linear(IN, OUT, bias=False)
            scale, zero = measured(linear.weight.data, 4, group, False)
            scales, zeros = (t.repeat_interleave(group, 1) for t in (scale, zero))
            codes = (torch.round(linear.weight.data / scales) + zeros).clamp(0, 15)
            # AutoAWQ packs weights that are on the grid already
            linear.weight.data = (codes - zeros) * scales
            if kind == "gemm":
                turned = {"scales": scale.t().contiguous(), "zeros": zero.t().contiguous()}
                layer = WQLinear_GEMM.from_linear(linear, 4, group, **turned)
                scales = layer.scales.float()
                expected = dequantize_gemm(layer.qweight, layer.qzeros, scales, 4, group).t()
            else:  # AutoAWQ unpacks gemv on a GPU only; these integers were given to it to pack
                layer = WQLinear_GEMV.from_linear(linear, 4, group, scales=scale, zeros=zero)
                expected = linear.weight.data
            tensors = parts("layer", layer, "qweight", "qzeros", "scales")
            written(f"awq-{kind}-{group}", tensors, {"layer.weight": expected.contiguous()})


def llama() -> None:
    """A whole checkpoint, quantized and saved by GPT-QModel; what its own kernels then hold."""
    os.environ["GPTQMODEL_CPU_WORKERS"] = "4"  # its pools want as many on small machines too
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        config = LlamaConfig(**sizes, **heads, num_hidden_layers=1)
        config.bos_token_id = config.eos_token_id = config.pad_token_id = 1
        LlamaForCausalLM(config).half().save_pretrained(directory)
        tokenizer = Tokenizer(models.WordLevel({f"{i}": i for i in range(64)}, unk_token="0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="0", eos_token="1", pad_token="1", bos_token="1"
        ).save_pretrained(directory)
        settings = QuantizeConfig(bits=4, group_size=32, sym=False, desc_act=False)
        model = GPTQModel.load(directory, settings, dtype=torch.float16)
        rows = [torch.randint(64, (64,)).tolist() for _ in range(32)]
        data = [{"input_ids": row, "attention_mask": [1] * 64} for row in rows]
        model.quantize(data, batch_size=1)
        target = FILES / "gptqmodel-llama"
        shutil.rmtree(target, ignore_errors=True)
        model.save(str(target))
        cpu = {"backend": BACKEND.GPTQ_TORCH, "device": "cpu", "dtype": torch.float16}
        loaded = GPTQModel.load(str(target), **cpu)
        expected = {}
        for name, module in loaded.model.named_modules():
            if hasattr(module, "dequantize_weight"):
                module.scales = module.scales.float()
                expected[f"{name}.weight"] = module.dequantize_weight().t().float().contiguous()
        save_file(expected, target / "expected.safetensors")
        for file in target.iterdir():
            if file.name not in ("config.json", "model.safetensors", "expected.safetensors"):
                file.unlink()
        record = json.loads((target / "config.json").read_text())
        # of the machine that ran this
        del record["quantization_config"]["meta"]["offload_to_disk_path"]
        (target / "config.json").write_text(json.dumps(record, indent=1) + "\n")


def written(
    folder: str, tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    (FILES / folder).mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, FILES / folder / "model.safetensors")
    save_file(expected, FILES / folder / "expected.safetensors")


if __name__ == "__main__":
    for make in (gptq, scattered, awq, llama):
        if len(sys.argv) == 1 or make.__name__ in sys.argv[1:]:
            make()
