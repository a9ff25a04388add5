"""The `mlx` target: an affine-quantized folder and adapters that mlx-lm loads.

    weight   uint32 [out, in * bits / 32]   codes of a row as one little-endian bit stream
    scales   float32 [out, in / g]
    biases   float32 [out, in / g]          value of code 0: offset * scale, or the float offset

    W[o, i] = scales[o, g] * code[o, i] + biases[o, g]

MLX has groups of 32, 64 and 128 and 2, 3, 4, 5, 6 and 8 bits. Coarser grids become groups whose
scales are equal. The integers are the base's own. Values may differ from the base's by the rounding
of a float32 sum, except on grids with a float offset. Linear layers and embeddings can be
quantized.

    adapters.safetensors   MODULE.lora_a [in, r], MODULE.lora_b [r, out]
    adapter_config.json    one rank and one scale for all modules: ranks are padded with zeros, and
                           the scale is 1

mlx-lm 0.32 reads rope_theta at the top level of config.json only, and else silently takes 10000;
transformers 5 writes it into rope_parameters. It is written to both places.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwlora import strict_json
from qwlora.export.canonical_adapter import CanonicalAdapter
from qwlora.export.format_limits import MLX_GROUPS, layer_kind_problem, mlx_problem
from qwlora.export.weights.weights_folder import (
    float_tensors,
    layer_kind,
    layers_to_write,
    refuse,
    write_folder,
)
from qwlora.formats.huggingface.int32_words import pack_words
from qwlora.grid.encoding import spread
from qwlora.grid.scheme import Blocks
from qwlora.nn.packed_layer import PackedLayer


def write_mlx(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Write the base `model`.

    Raises:
        ExportError: a layer's grid or kind does not fit; all are listed.
    """
    layers = layers_to_write(model)
    refuse("mlx", [f"{name}: {p}" for name, layer in layers.items() if (p := _problem(layer))])
    tensors = {name: tensor.float() for name, tensor in float_tensors(model).items()}
    layouts: dict[str, tuple[int, int]] = {}
    for name, layer in layers.items():
        path, group = name.removesuffix(".weight"), _group(layer)
        assert group is not None
        scales, biases = _scales_and_biases(layer, group)
        words = pack_words(layer.codes, layer.scheme.bitwidth).view(torch.uint32)
        tensors |= {name: words, f"{path}.scales": scales, f"{path}.biases": biases}
        layouts[path] = (group, layer.scheme.bitwidth)
    common = Counter(layouts.values()).most_common(1)[0][0]
    quantization = {**_settings(common), "mode": "affine"} | {
        path: _settings(layout) for path, layout in layouts.items() if layout != common
    }
    changes = {"quantization": quantization, "quantization_config": quantization}
    write_folder(model, tokenizer, folder, tensors, {**_rope(model), **changes})


def write_mlx_adapter(adapter: CanonicalAdapter, folder: Path) -> None:
    """Write an adapter. Its modules are listed by their whole names, so `num_layers`, the number of
    last layers whose modules may have names relative to their layer, does not matter.
    """
    tensors = {}
    for module, (a, b) in adapter.factors.items():
        missing = adapter.rank - len(a)
        tensors[f"{module}.lora_a"] = pad(a, (0, 0, 0, missing)).t().contiguous()
        tensors[f"{module}.lora_b"] = pad(b, (0, missing)).t().contiguous()
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    config = {
        "fine_tune_type": "lora",
        "num_layers": 0,
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": sorted(adapter.factors),
        },
    }
    (folder / "adapter_config.json").write_text(strict_json.dumps(config, indent=2) + "\n")


def _settings(layout: tuple[int, int]) -> dict[str, int]:
    return {"group_size": layout[0], "bits": layout[1]}


def _problem(layer: PackedLayer) -> str | None:
    scheme = layer.scheme
    if problem := layer_kind_problem(layer_kind(layer), "mlx-lm") or mlx_problem(scheme):
        return problem
    if _group(layer) is None:
        return f"{scheme}: {layer.tensor.shape[-1]} inputs do not divide into MLX's groups of 32"
    return None


def _group(layer: PackedLayer) -> int | None:
    """The largest group of MLX that does not cross a block of the grid; None if there is none."""
    granularity, columns = layer.scheme.granularity, layer.tensor.shape[-1]
    size = granularity.size if isinstance(granularity, Blocks) else columns
    return next((g for g in MLX_GROUPS if size % g == 0 and columns % g == 0), None)


def _scales_and_biases(layer: PackedLayer, group: int) -> tuple[Tensor, Tensor]:
    """Both [out, in / group]."""
    encoding, shape = layer.encoding, layer.tensor.shape
    scale, minimum = (
        spread(number, layer.scheme.granularity, shape, group).float().contiguous()
        for number in (encoding.scale, encoding.minimum)
    )
    return scale, minimum


def _rope(model: PreTrainedModel) -> dict[str, Any]:
    parameters = getattr(model.config, "rope_parameters", None)
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        return {}
    found: dict[str, Any] = {"rope_theta": parameters["rope_theta"]}
    if parameters.get("rope_type", "default") != "default":
        found["rope_scaling"] = {k: v for k, v in parameters.items() if k != "rope_theta"}
    return found
