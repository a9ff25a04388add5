"""What files of `export.embedding_bits` 8 hold instead of a model's floats.

    embedding, output head      blocks of 32 codes of 8 bits, as GGUF's Q8_0:
                                w' = round(w / d) d,    d = float16(max |w| / 127)
    lora_A, scaling * lora_B    float16

Norms and biases, which are small, stay, and so do rows that are no whole blocks. `verify` compares
files with a model that is rounded in the same way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from qwlora.grid.encoding import QuantizedTensor, encoding_from_range, group_range
from qwlora.grid.scheme import PerBlock, Scheme
from qwlora.nn.packed_layer import is_packable, pack_at_
from qwlora.nn.temporary import structure

EMBEDDINGS, FACTORS = "embeddings and output head to 8 bits", "adapters to float16"
_SCHEME, _BLOCK = Scheme(8, True, PerBlock(32)), 32


@contextmanager
def rounded(model: Any, what: Collection[str]) -> Iterator[list[str]]:
    """Inside the block, EMBEDDINGS or FACTORS of a base with or without adapters are rounded.
    Yields those that are there."""
    restore, steps = structure(model), {EMBEDDINGS: _pack_embeddings_, FACTORS: _round_factors_}
    try:
        yield [name for name, step in steps.items() if name in what and step(model)]
    finally:
        restore()


def _pack_embeddings_(model: Any) -> bool:
    names = list[str]()
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        # A tied head is packed with the embedding.
        layer = get().get_base_layer() if isinstance(get(), LoraLayer) else get()
        if layer is None or not is_packable(layer) or layer.weight.shape[-1] % _BLOCK:
            continue
        low, high = group_range(weight := layer.weight.detach().float(), _SCHEME)
        largest = torch.maximum(-low, high)
        encoding = encoding_from_range(-largest, largest, _SCHEME)
        encoding = replace(encoding, scale=encoding.scale.half().float())
        names.append(next(path for path, module in model.named_modules() if module is layer))
        quantized = QuantizedTensor(encoding.quantize(weight), encoding)
        pack_at_(model, f"{names[-1]}.weight", quantized)
    return bool(names)


def _round_factors_(model: nn.Module) -> bool:
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        for name, a in layer.lora_A.items():
            # Files hold B with the scaling folded in.
            for factor, times in ((a, 1.0), (layer.lora_B[name], layer.scaling[name])):
                values = (factor.weight.detach().float() * times).half().float() / times
                factor.weight = nn.Parameter(values, requires_grad=False)
    return bool(layers)
