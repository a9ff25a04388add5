"""Writes the golden files of test_gptq_awq_mlx.py with MLX and mlx-lm themselves: files/mlx-layers,
files/mlx-llama and files/mlx-adapter.

Run by hand, in an environment with mlx 0.32.4 and mlx-lm 0.32.2 (on Linux: `mlx[cpu]`):

    python tests/formats/huggingface/make_mlx_files.py

MLX quantizes each layer and dequantizes it into `expected.safetensors`.
"""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers

FILES = Path(__file__).parents[1] / "files"
IN, OUT = 128, 4
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def layers() -> None:
    stored, expected = {}, {}
    for bits in (2, 3, 4, 5, 6, 8):
        for group in (32, 64, 128):
            mx.random.seed(bits)
            weight = mx.random.normal((OUT, IN)) * 0.1
            name = f"w{bits}-{group}"
            codes, scales, biases = mx.quantize(weight, group_size=group, bits=bits)
            stored |= {f"{name}.weight": codes, f"{name}.scales": scales}
            stored[f"{name}.biases"] = biases
            values = mx.dequantize(codes, scales, biases, group_size=group, bits=bits)
            expected[f"{name}.weight"] = values
    folder = FILES / "mlx-layers"
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), stored, {"format": "mlx"})
    mx.save_safetensors(str(folder / "expected.safetensors"), expected)


def tiny_llama(**changes: int) -> llama.Model:
    mx.random.seed(0)
    return llama.Model(llama.ModelArgs.from_dict(CONFIG | changes))


def whole_model() -> None:
    """A folder as `mlx_lm.convert -q` writes it: 4 bits, but 8 for the embedding."""
    model, folder = tiny_llama(), FILES / "mlx-llama"

    def predicate(path: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized"):
            return False
        return {"group_size": 32, "bits": 8} if "embed" in path else True

    model, config = utils.quantize_model(model, dict(CONFIG), 64, 4, quant_predicate=predicate)
    folder.mkdir(exist_ok=True)
    utils.save_model(folder, model)
    utils.save_config(config, folder / "config.json")
    save_logits(model, folder)


def save_logits(model: llama.Model, folder: Path) -> None:
    tokens = mx.array([[1, 5, 9, 2, 40, 77]])
    expected = {"tokens": tokens, "logits": model(tokens)}
    mx.save_safetensors(str(folder / "expected.safetensors"), expected)


def adapter() -> None:
    """An adapter as `mlx_lm.lora` saves it, on the float model, with its logits."""
    sizes = {"hidden_size": 32, "intermediate_size": 64}
    model, folder = tiny_llama(**sizes), FILES / "mlx-adapter"
    folder.mkdir(exist_ok=True)
    utils.save_model(folder / "base", model)
    utils.save_config(CONFIG | sizes, folder / "base" / "config.json")
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    model.freeze()
    linear_to_lora_layers(model, 1, parameters)
    for name, tensor in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):
            model.load_weights([(name, mx.random.normal(tensor.shape) * 0.02)], strict=False)
    trained = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), trained)
    settings = {"fine_tune_type": "lora", "lora_parameters": parameters}
    settings |= {"num_layers": 1, "model": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1))
    save_logits(model, folder)


if __name__ == "__main__":
    layers()
    whole_model()
    adapter()
