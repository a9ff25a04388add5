"""Write what target `aimet` writes, for every kind of grid, and the integers that it must mean.

    python tests/aimet/files/write_files.py FOLDER

aimet-onnx needs other versions of shared packages, so the two halves meet in files:

    FOLDER/GRID-VERSION/model.aimet/    the target's files
    FOLDER/GRID-VERSION/codes.npz       signed or unsigned integers of every parameter, as stored
    FOLDER/graphs-VERSION/              the same of two graphs with a key-value
                                        cache; the integers are those of the packed layers

`make test-aimet` runs this, then test_loaders.py in an environment with aimet-onnx.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qwlora import LayerRule, Scheme, Schemes, Simulation, quantize_, simulate
from qwlora.grid.scheme import PerChannel
from qwlora.nn.packed_layer import PackedLinear
from qwlora.simulation.kv_cache_graph import cache_sizes
from qwlora.targets.npu.float_onnx import to_float_onnx
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import Backend, ExportedGraph

GRIDS = (
    *(f"w{bits}-channel" for bits in (2, 3, 4, 5, 6, 7, 8, 16)),
    *("w4-tensor", "w8-tensor-asymmetric", "w4-channel-asymmetric"),
    *("w4-block32", "w4-block32-asymmetric", "w8-block32", "w4-lpbq32"),
)
VERSIONS = ("1.0.0", "2.0.0")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260}
IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def adapted(model: Any, schemes: Schemes, *layers: str) -> Simulation:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[*layers], init_lora_weights=False)
    made = simulate(get_peft_model(model, config).eval(), BATCH, schemes)
    made.calibrate([BATCH])
    return made


def simulation(grid: str) -> Simulation:
    """A one-layer Llama; with 16 bits, the base is float and its weights are parameters."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    schemes = Schemes()
    if grid == "w16-channel":
        schemes = Schemes(parameters=Scheme(16, True, PerChannel(0)))
    else:
        quantize_(model, grid, solver="rtn")
    return adapted(model, schemes, "q_proj", "down_proj")


def main(folder: Path) -> None:
    """Write every grid in both versions."""
    aimet = TARGETS["aimet"].backend
    sample = {name: tensor[:1] for name, tensor in BATCH.items()}
    for grid in GRIDS:
        made = simulation(grid)
        placed = to_float_onnx(made.graph(), {name: t.shape for name, t in sample.items()})
        codes = {}
        for name, encoding in placed.encodings.items():
            if (initializer := placed.model.graph.initializers.get(name)) is not None:
                turned = name in placed.transposed
                stored = torch.from_numpy(initializer.const_value.numpy().copy())
                scheme = encoding.scheme
                shift = scheme.symmetric_offset if scheme.symmetric else 0
                found = encoding.quantize(stored.T if turned else stored).to(torch.int64) + shift
                codes[name] = (found.T if turned else found).numpy()
        for version in VERSIONS:
            path = folder / f"{grid}-{version}"
            aimet.write_adapter(ExportedGraph(made, {}, sample, version), path, path)
            np.savez(path / "codes.npz", **codes)

    write_graphs(folder, aimet)


def write_graphs(folder: Path, aimet: Backend) -> None:
    """Graphs with a key-value cache in both versions."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    quantize_(model, "w4-channel", solver="rtn", rules=[LayerRule("*embed_tokens", Scheme(8))])
    schemes = Schemes(
        quantize_residual_adds=True, symmetric_matmul_second_input=True, key_value_bitwidth=8
    )
    made = adapted(model, schemes, "v_proj")
    codes = {}
    for path, layer in made.origin.model.named_modules():
        if isinstance(layer, PackedLinear):
            name = path.removeprefix("base_model.model.").replace(".base_layer", "")
            shift = layer.scheme.symmetric_offset
            codes[f"{name}.weight"] = (layer.tensor.codes.to(torch.int64) + shift).T.numpy()
    sample = {name: tensor[:1] for name, tensor in BATCH.items()}
    for version in VERSIONS:
        path = folder / f"graphs-{version}"
        exported = ExportedGraph(made, {}, sample, version, cache_sizes([8, 1], [32]))
        aimet.write_adapter(exported, path, path)
        np.savez(path / "codes.npz", **codes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
