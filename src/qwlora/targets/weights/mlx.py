"""The `mlx` target: an affine-quantized folder and adapters that mlx-lm loads.

    mlx_lm.generate --model base --adapter-path NAME --prompt "..."

    weight   uint32 [out, in * bits / 32]   codes of a row as one little-endian bit stream
    scales   float32 [out, in / g]
    biases   float32 [out, in / g]          value of code 0: offset * scale, or the float offset

    W[o, i] = scales[o, g] * code[o, i] + biases[o, g]

MLX has groups of 32, 64 and 128 and 2, 3, 4, 5, 6 and 8 bits. Coarser grids become groups whose
scales are equal. The integers are the base's own. Values may differ from the base's by the rounding
of a float32 sum, except on grids with a float offset. Linear layers and embeddings can be
quantized.

    adapters.safetensors   MODULE.lora_a [in, r], MODULE.lora_b [r, out]
    adapter_config.json    one rank and one scale (1) for all modules
"""

from __future__ import annotations

from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from qwlora.errors import ExportError, foreign_as, listed
from qwlora.grid.encoding import spread
from qwlora.grid.packing import pack_words
from qwlora.system import strict_json
from qwlora.targets.canonical_adapter import CanonicalAdapter
from qwlora.targets.proof.contents import (
    MODEL_FILES,
    NUMBER,
    OTHER_KEYS,
    PLAIN,
    TOKENIZER,
    Contents,
)
from qwlora.targets.registry import MLX
from qwlora.targets.target import Backend, ExportedBase, LayerKind, Runtime
from qwlora.targets.weights.weights_folder import (
    ROPE_FORM,
    check_layers,
    float_tensors,
    layer_kind,
    layers_to_write,
    rope_settings,
    rotations,
    warn_of_window,
    write_folder,
)

_GRID = {"group_size": int, "bits": int, "mode": "affine"}
_QUANTIZATION = {**_GRID, OTHER_KEYS: _GRID}  # by module path
_LORA = {"rank": int, "scale": NUMBER, "dropout": NUMBER, "keys": [PLAIN]}
_ADAPTER = {"fine_tune_type": "lora", "num_layers": 0, "lora_parameters": _LORA}


class Mlx(Backend):
    """MLX's format; mlx-lm runs it."""

    contents = Contents(
        base=(*MODEL_FILES, *TOKENIZER),
        adapter=("adapter_config.json", "adapters.safetensors"),
        forms={"adapter_config.json": _ADAPTER},
        settings={"quantization": _QUANTIZATION, "quantization_config": _QUANTIZATION, **ROPE_FORM},
    )

    def write_base(self, exported: ExportedBase, folder: Path) -> None:
        model, layers = exported.model, layers_to_write(exported.model)
        check_layers("mlx", layers)
        tensors = {name: tensor.float() for name, tensor in float_tensors(model).items()}
        layouts: dict[str, dict[str, int]] = {}
        for name, layer in layers.items():
            path, encoding, shape = name.removesuffix(".weight"), layer.encoding, layer.tensor.shape
            group = MLX.stored_block(layer.scheme, shape[-1])
            assert group is not None
            scales, biases = (
                spread(number, layer.scheme.granularity, shape, group).float().contiguous()
                for number in (encoding.scale, encoding.minimum)
            )
            words = pack_words(layer.codes, layer.scheme.bitwidth).view(torch.uint32)
            tensors |= {name: words, f"{path}.scales": scales, f"{path}.biases": biases}
            layouts[path] = {"group_size": group, "bits": layer.scheme.bitwidth}
        common = max(grids := [*layouts.values()], key=grids.count)
        exceptions = {path: layout for path, layout in layouts.items() if layout != common}
        quantization = {**common, "mode": "affine", **exceptions}
        changes = {"quantization": quantization, "quantization_config": quantization}
        changes |= rope_settings(model)
        write_folder(exported, folder, tensors, changes)

    def write_adapter(self, exported: CanonicalAdapter, base: Path, folder: Path) -> None:
        tensors = {}
        for module, (a, b) in exported.padded().factors.items():
            tensors[f"{module}.lora_a"] = a.t().contiguous()
            tensors[f"{module}.lora_b"] = b.t().contiguous()
        save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
        keys = sorted(exported.factors)
        lora = {"rank": exported.rank, "scale": 1.0, "dropout": 0.0, "keys": keys}
        # `num_layers` counts the last layers whose modules may have names relative to their layer.
        # These are whole names, so it does not matter.
        config = {"fine_tune_type": "lora", "num_layers": 0, "lora_parameters": lora}
        (folder / "adapter_config.json").write_text(strict_json.dumps(config, indent=2) + "\n")

    def open(self, folder: Path, case: str) -> MlxRuntime:
        return MlxRuntime(folder)

    def model_problem(self, model: PreTrainedModel, tokenizer: Any) -> str | None:
        if find_spec("mlx") is None or find_spec("mlx_lm") is None:
            return None
        try:
            with foreign_as(ExportError, f"mlx-lm cannot build {model.config.model_type}"):
                return _difference(model)
        except ExportError as error:
            return str(error).partition("\n")[0]


def _difference(model: PreTrainedModel) -> str | None:
    """What mlx-lm's model of the same configuration lacks or has otherwise, as far as modules and
    parameters show; None if nothing."""
    import mlx.core as mx
    from mlx.nn import RoPE
    from mlx.utils import tree_flatten
    from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
    from mlx_lm.utils import _get_classes

    config = model.config.to_diff_dict() | rope_settings(model)
    # Some models of mlx-lm print which package they lack, and exit.
    with redirect_stdout(None):
        model_class, settings = _get_classes(config)
    # MLX computes an array when it is read. None is, so a model of any size costs no memory.
    mlx_model, kind = model_class(settings.from_dict(config)), config["model_type"]
    rotation = rotations(model.config)[0]
    # as of mlx-lm 0.32.2
    if rotation.get("short_factor") != rotation.get("long_factor"):
        return f"mlx-lm rotates by long_factor in {kind}, and never by short_factor"
    widths = {module.dims for module in mlx_model.modules() if isinstance(module, RoPE)}
    buffers = [(name.rpartition(".")[2], buffer) for name, buffer in model.named_buffers()]
    rotated = {2 * buffer.numel() for name, buffer in buffers if name == "inv_freq"}
    if rotated and widths - rotated:
        return f"mlx-lm rotates {max(widths)} values of a head in {kind}, not {max(rotated)}"
    tensors = float_tensors(model) | {n: m.weight for n, m in layers_to_write(model).items()}
    linear = {f"{p}.weight" for p, m in model.named_modules() if layer_kind(m) is LayerKind.LINEAR}
    # Linear layers have integers, which mlx-lm must rename at most: not compute with.
    arrays = {
        name: mx.zeros(tuple(tensor.shape), mx.uint32 if name in linear else mx.float32)
        for name, tensor in tensors.items()
    }
    loaded = mlx_model.sanitize(arrays) if hasattr(mlx_model, "sanitize") else arrays
    ours = {name: (array.shape, array.dtype == mx.uint32) for name, array in loaded.items()}
    parameters = dict(tree_flatten(mlx_model.parameters()))
    theirs = {name: (array.shape, name in linear) for name, array in parameters.items()}
    if names := sorted({name for name, _ in ours.items() ^ theirs.items()}):
        return f"mlx-lm expects other weights or names in {kind}: {listed(names, 3)}"
    if not any(isinstance(cache, RotatingKVCache) for cache in make_prompt_cache(mlx_model)):
        warn_of_window(model.config, "mlx-lm", "Keep prompt and answer within {} tokens")
    return None


class MlxRuntime(Runtime):
    """The folder in mlx-lm."""

    switches = True

    def __init__(self, folder: Path):
        from mlx_lm.utils import load_model

        with foreign_as(ExportError, f"mlx-lm cannot load {str(folder)!r}"):
            self._model: Any = load_model(folder)[0]

    def switch_to(self, adapter: Path | None) -> None:
        from mlx_lm.tuner.utils import load_adapters, remove_lora_layers

        self._model = remove_lora_layers(self._model)
        if adapter is not None:
            with foreign_as(ExportError, f"mlx-lm cannot load {str(adapter)!r}"):
                self._model = load_adapters(self._model, str(adapter))

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        # Modules of MLX begin in training mode, also those of an adapter.
        self._model.eval()
        cache = past or make_prompt_cache(self._model)
        computed = self._model(mx.array(ids.numpy().astype(np.int32)), cache=cache)
        return torch.from_numpy(np.array(computed.astype(mx.float32))), cache
