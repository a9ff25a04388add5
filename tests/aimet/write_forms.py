"""Write every form of encodings file that aimet-torch writes, with the weights that AIMET computes.

    python tests/aimet/write_forms.py FOLDER        in an environment with aimet-torch

FOLDER/GRID-plain and FOLDER/GRID-wrapped (exported through a module that has the model as its `m`)
contain:

    float/                     the float model
    fused/                     the model with AIMET's rounded weights
    theirs.safetensors         the rounded weight of every Linear layer, by parameter
    FORM/...                   what one call wrote

FOLDER/other/FORM has what was not written for every grid. test_forms.py reads all of it in the
environment of `make test`, because AIMET needs an older transformers.
"""

from __future__ import annotations

import json
import logging
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from aimet_torch.adaround.adaround_weight import Adaround, AdaroundParameters
from aimet_torch.common import quantsim
from aimet_torch.gptvq.defs import GPTVQParameters
from aimet_torch.gptvq.gptvq_weight import GPTVQ
from aimet_torch.peft import (
    PeftQuantUtils,
    replace_lora_layers_with_quantizable_layers,
    track_lora_meta_data,
)
from aimet_torch.quantization.affine import (
    GroupedBlockQuantizeDequantize,
    QuantizeDequantize,
    quantize_dequantize,
)
from aimet_torch.quantization.float.quantizer import (
    _MXFP4QuantizeDequantize,
    _NVFP4QuantizeDequantize,
)
from aimet_torch.quantsim import QuantizationSimModel, save_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

IDS = torch.randint(0, 64, (1, 8), generator=torch.Generator().manual_seed(0))
VERSIONS = ("0.6.1", "1.0.0", "2.0.0", "2.1.0")
BLOCK = 16
TENSOR, CHANNEL, BLOCKS, LPBQ = GRIDS = ("tensor", "channel", "block", "lpbq")


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.m = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.m(input_ids, use_cache=False, return_dict=False)[0]


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}
    calls = {"attn_implementation": "eager", "use_cache": False, "return_dict": False}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **calls)).eval()


def quantizer(grid: str, shape: tuple[int, int]) -> nn.Module:
    rows, columns = shape
    common: dict[str, Any] = {"bitwidth": 4, "symmetric": True}
    blocks = (rows, columns // BLOCK)
    if grid == TENSOR:
        return QuantizeDequantize((), **common)
    if grid == CHANNEL:
        return QuantizeDequantize((rows, 1), **common)
    if grid == BLOCKS:
        return QuantizeDequantize(blocks, block_size=(1, BLOCK), **common)
    if grid == "mxfp4":
        return _MXFP4QuantizeDequantize(blocks, (1, BLOCK))
    if grid == "nvfp4":
        return _NVFP4QuantizeDequantize(blocks, (1, BLOCK))
    return GroupedBlockQuantizeDequantize(
        blocks, block_size=(1, BLOCK), block_grouping=(1, blocks[1]), decompressed_bw=8, **common
    )


def simulated(grid: str, model: nn.Module) -> QuantizationSimModel:
    sim = QuantizationSimModel(model, IDS, default_param_bw=4, default_output_bw=16)
    for _, layer in linear_layers(sim.model):
        layer.param_quantizers["weight"] = quantizer(grid, tuple(layer.weight.shape))
    sim.compute_encodings(lambda m: m(IDS))
    return sim


def linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]


def rounded(sim: QuantizationSimModel, prefix: str) -> dict[str, Tensor]:
    """What AIMET computes with, by the name of the parameter."""
    weights = {}
    for name, layer in linear_layers(sim.model):
        value = layer.param_quantizers["weight"](layer.weight).detach()
        weights[f"{name.removeprefix(prefix)}.weight"] = value.as_subclass(Tensor).contiguous()
    return weights


def save_weights(folder: Path, model: PreTrainedModel, theirs: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "float")
    save_file(theirs, folder / "theirs.safetensors")
    fused = llama()
    fused.load_state_dict(model.state_dict() | theirs)
    fused.save_pretrained(folder / "fused")


@contextmanager
def default_version(version: str) -> Iterator[None]:
    before, quantsim.encoding_version = quantsim.encoding_version, version
    try:
        yield
    finally:
        quantsim.encoding_version = before


def keep_encodings(folder: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".encodings":
            file.unlink()


def export(sim: QuantizationSimModel, folder: Path, version: str) -> None:
    with default_version(version):
        sim.export(str(folder), "model", IDS)
    keep_encodings(folder)


def export_onnx(sim: QuantizationSimModel, folder: Path, version: str, dynamo: bool) -> None:
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamo": dynamo}
    sim.onnx.export((IDS,), str(folder / "model.onnx"), encoding_version=version, **names)
    keep_encodings(folder)


def write(sim: QuantizationSimModel, folder: Path) -> None:
    steps: dict[str, Callable[[Path], None]] = {
        f"sim.export {v}": lambda path, v=v: export(sim, path, v) for v in VERSIONS[:2]
    }
    for v in VERSIONS:
        for dynamo in (False, True):
            name = f"sim.onnx.export {v} {'dynamo' if dynamo else 'TorchScript'}"
            steps[name] = lambda path, v=v, dynamo=dynamo: export_onnx(sim, path, v, dynamo)
    steps["sim.save_encodings_to_json"] = lambda path: sim.save_encodings_to_json(
        str(path), "model"
    )
    for name, step in steps.items():
        (folder / name).mkdir()
        step(folder / name)


def write_others(folder: Path) -> None:
    """AdaRound, GPTVQ, 4-bit floats, and files that are no encodings."""

    def loaded(model: nn.Module, batch: Tensor) -> Any:
        return model(batch)

    def at(name: str) -> Path:
        (folder / name).mkdir(parents=True)
        return folder / name

    parameters = AdaroundParameters([IDS, IDS], 2, default_num_iterations=20, forward_fn=loaded)
    path = folder / "AdaRound"
    model = Adaround.apply_adaround(llama(), IDS, parameters, str(path), "model", 4)
    # by AIMET's arithmetic with the scales of the file; its loader derives them from min and max
    items = json.loads((path / "model.encodings").read_text())["param_encodings"]
    weights = {}
    for name, layer in linear_layers(model):
        scale = torch.tensor([[item["scale"]] for item in items[f"{name}.weight"]])
        value = quantize_dequantize(layer.weight.detach(), scale, torch.zeros_like(scale), -8, 7)
        weights[f"{name}.weight"] = value.contiguous()
    save_weights(path, model, weights)

    path = folder / "GPTVQ"
    settings = {"rows_per_block": 16, "cols_per_block": 32, "num_of_kmeans_iterations": 2}
    vectors = GPTVQParameters([IDS, IDS], forward_fn=loaded, **settings)
    model = GPTVQ.apply_gptvq(llama(), IDS, vectors, str(path), file_name_prefix="model")
    sim = QuantizationSimModel(model, IDS, default_param_bw=4, default_output_bw=16)
    sim.load_encodings(str(path / "model.encodings"), strict=False, allow_overwrite=False)
    sim.compute_encodings(lambda m: m(IDS))
    export(sim, at("GPTVQ, then sim.export 0.6.1"), "0.6.1")
    export(sim, at("GPTVQ, then sim.export 1.0.0"), "1.0.0")

    export_onnx(simulated("mxfp4", llama()), at("MXFP4, sim.onnx.export 2.1.0"), "2.1.0", False)
    sim = simulated("nvfp4", llama())
    for _, layer in linear_layers(sim.model):  # AIMET only exports scales that float8 holds
        layer.param_quantizers["weight"].maxval.data.fill_(6 / 16)
    export_onnx(sim, at("NVFP4, sim.onnx.export 2.1.0"), "2.1.0", False)

    sim = simulated(CHANNEL, llama())
    state = sim.quantizer_state_dict()
    torch.save(state, at("torch.save of quantizer_state_dict") / "model.pt")
    (at("pickle of quantizer_state_dict") / "model.pkl").write_bytes(pickle.dumps(state))
    try:
        save_checkpoint(sim, str(at("save_checkpoint") / "model.pkl"))
    except AttributeError as error:  # pickle stops at a class inside a function of AIMET
        (folder / "save_checkpoint.txt").write_text(str(error))

    adapted = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    replace_lora_layers_with_quantizable_layers(adapted)
    path = at("export_adapter_weights")
    tools = PeftQuantUtils(track_lora_meta_data(adapted, str(path), "layers"))
    (path / "layers.pkl").unlink()
    sim = QuantizationSimModel(adapted, IDS, default_param_bw=8, default_output_bw=16)
    tools.export_adapter_weights(sim, str(path), "model")


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for grid in GRIDS:
        for wrapped in (False, True):
            model, folder = llama(), root / f"{grid}-{'wrapped' if wrapped else 'plain'}"
            sim = simulated(grid, Wrapper(model) if wrapped else model)
            save_weights(folder, model, rounded(sim, "m."))
            write(sim, folder)
            print(folder.name, flush=True)
    write_others(root / "other")


if __name__ == "__main__":
    main()
