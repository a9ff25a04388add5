"""The `hf` target: a compressed-tensors folder and PEFT directories, for transformers and vLLM.

    transformers   AutoModelForCausalLM.from_pretrained("base"), or AutoModelForImageTextToText
                   PeftModel.from_pretrained(model, "NAME")
    vLLM           vllm serve base --dtype float16 --enable-lora --lora-modules NAME=NAME

Linear layers keep their integers, in format pack-quantized; a packed embedding is written as the
floats that its codes stand for. Grids with a float offset do not fit. See
`formats/huggingface/compressed_tensors.py` for the tensors.

A base with several schemes must be symmetric, and run once before an adapter is attached.
transformers unpacks a weight in `dtype`, and only float32 holds every product of a code and a
scale: say `dtype="float32"`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig

from qwlora.errors import ExportError, foreign_as
from qwlora.formats.checkpoint import auto_class
from qwlora.formats.huggingface.compressed_tensors import layer_tensors, weights_settings
from qwlora.graph.capture import cache_argument
from qwlora.grid.scheme import Scheme
from qwlora.nn.packed_layer import PackedEmbedding, PackedLinear
from qwlora.nn.packed_tensor import narrowest
from qwlora.targets.canonical_adapter import PEFT_FILES, PEFT_FORM, CanonicalAdapter, write_peft
from qwlora.targets.proof.contents import MODEL_FILES, OTHER_KEYS, PLAIN, TOKENIZER, Contents
from qwlora.targets.target import Backend, ExportedBase, Runtime
from qwlora.targets.weights.weights_folder import (
    check_layers,
    float_tensors,
    layers_to_write,
    write_folder,
)

_METHOD = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
}
_GROUP = {
    "targets": [PLAIN],
    "weights": {
        "num_bits": int,
        "type": "int",
        "symmetric": bool,
        "dynamic": False,
        "strategy": frozenset({"group", "channel", "tensor"}),
        "group_size": int,
    },
}
_FORM = {**_METHOD, "ignore": [PLAIN], "config_groups": {OTHER_KEYS: _GROUP}, "dequantize": True}


class Hf(Backend):
    """compressed-tensors and PEFT; transformers and PEFT run it."""

    contents = Contents(
        base=(*MODEL_FILES, *TOKENIZER),
        adapter=PEFT_FILES,
        forms={"adapter_config.json": PEFT_FORM},
        settings={"quantization_config": _FORM},
    )

    def write_base(self, exported: ExportedBase, folder: Path) -> None:
        model, layers = exported.model, layers_to_write(exported.model)
        check_layers("hf", layers)
        tensors, groups = float_tensors(model), dict[Scheme, list[str]]()

        def stored(weight: Tensor) -> Tensor:
            is_matrix = weight.ndim > 1 and weight.dtype == torch.float32
            return narrowest(weight) if is_matrix and exported.embedding_bits == 16 else weight

        tensors = {name: stored(tensor) for name, tensor in tensors.items()}
        for name, layer in layers.items():
            # The format has integers for Linear only.
            if isinstance(layer, PackedEmbedding):
                tensors[name] = stored(layer.tensor.dequantize())
                continue
            path = name.removesuffix(".weight")
            parts = layer_tensors(layer.quantized)
            tensors |= {f"{path}.{part}": tensor for part, tensor in parts.items()}
            groups.setdefault(layer.scheme, []).append(path)
        packed = {path for paths in groups.values() for path in paths}
        # transformers 5.24 keeps the integers until the first forward, and until then a layer has
        # no weight for PEFT to find; asymmetric grids do not load like that at all. With
        # `dequantize` it unpacks at once, but takes the scheme of the first group for all layers.
        # vLLM ignores this key.
        has_one_scheme, config_groups = len(groups) == 1, dict[str, Any]()
        for i, (scheme, paths) in enumerate(groups.items()):
            targets = ["Linear"] if has_one_scheme else paths
            config_groups[f"group_{i}"] = {"targets": targets, "weights": weights_settings(scheme)}
        linear = [p for p, m in model.named_modules() if isinstance(m, nn.Linear | PackedLinear)]
        ignored = [path for path in linear if path not in packed]
        settings: dict[str, Any] = {**_METHOD, "ignore": ignored, "config_groups": config_groups}
        if has_one_scheme:
            settings["dequantize"] = True
        changes: dict[str, Any] = {"quantization_config": settings}
        # vLLM and SGLang keep scales in the `dtype` of config.json, and of float32 they make
        # bfloat16, which would round the scales by up to 0.4 %.
        if all(layers[f"{path}.weight"].encoding.fits_float16 for path in packed):
            changes["dtype"] = "float16"
        write_folder(exported, folder, tensors, changes)

    def write_adapter(self, exported: CanonicalAdapter, base: Path, folder: Path) -> None:
        write_peft(exported, folder)

    def open(self, folder: Path, case: str) -> TransformersRuntime:
        with foreign_as(ExportError, f"transformers cannot load {str(folder)!r}"):
            kind = auto_class(AutoConfig.from_pretrained(folder, trust_remote_code=False))
            model = kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        runtime = TransformersRuntime(model.eval())
        # unpacks all layers: PEFT finds no weight in a packed one
        runtime.logits(torch.zeros(1, 1, dtype=torch.int64))
        return runtime


class TransformersRuntime(Runtime):
    """A base in transformers; adapters by PEFT."""

    switches = True

    def __init__(self, model: Any):
        self._model = model  # a PeftModel from the first adapter on
        self._known: dict[Path, str] = {}

    def switch_to(self, adapter: Path | None) -> None:
        """See `Runtime.use`."""
        if adapter is not None and adapter not in self._known:
            name = str(len(self._known))
            with foreign_as(ExportError, f"PEFT cannot load {str(adapter)!r}"):
                if isinstance(self._model, PeftModel):
                    self._model.load_adapter(adapter, name)
                else:
                    self._model = PeftModel.from_pretrained(self._model, adapter, name)
            self._model.eval()
            self._known[adapter] = name
        if adapter is not None:
            self._model.base_model.enable_adapter_layers()
            self._model.set_adapter(self._known[adapter])
        elif isinstance(self._model, PeftModel):
            self._model.base_model.disable_adapter_layers()

    @torch.no_grad()
    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        return self._model(input_ids=ids).logits.float()

    @torch.no_grad()
    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        cached = cache_argument(self._model)
        result = self._model(input_ids=ids, use_cache=True, **{cached: past or None})
        return result.logits.float(), getattr(result, cached)
