"""What files of `export.float_bits` 8 hold instead of a model's floats.

    embedding, output head      blocks of 32 codes of 8 bits, as GGUF's Q8_0:
                                w' = round(w / d) d,    d = float16(max |w| / 127)
    lora_A, scaling * lora_B    float16

Other floats are small and stay: norms, biases. So do embeddings whose rows are no whole blocks, and
factors beyond float16. `verify` compares files with a model whose floats are rounded alike, and
also says what the model computes without.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qwlora.grid.encoding import QuantizedTensor, encoding_from_range, rows_of_groups
from qwlora.grid.scheme import PerBlock, Scheme
from qwlora.nn.packed_layer import is_packable, pack_at_, weight_out_in
from qwlora.nn.temporary import structure

EMBEDDINGS, FACTORS = "embeddings, output head: 8 bits", "adapters: float16"
_BLOCK = 32
_SCHEME = Scheme(8, True, PerBlock(_BLOCK))


@contextmanager
def rounded(model: nn.Module, what: Collection[str]) -> Iterator[list[str] | None]:
    """Round EMBEDDINGS or FACTORS of a base with or without adapters inside the block. Yields what
    was rounded; None: nothing."""
    restore = structure(model)
    try:
        done = [EMBEDDINGS] if EMBEDDINGS in what and _pack_embeddings_(model) else []
        done += [FACTORS] if FACTORS in what and _round_factors_(model) else []
        yield done or None
    finally:
        restore()


def half(factor: Tensor) -> Tensor:
    """A factor in float16, if it holds all numbers of it."""
    short = factor.detach().half()
    return short if bool(short.isfinite().all()) else factor.detach()


def _pack_embeddings_(model: nn.Module) -> bool:
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    names = list[str]()
    for get in (inner.get_input_embeddings, inner.get_output_embeddings):
        # A tied head is packed with the embedding.
        layer = get().get_base_layer() if isinstance(get(), LoraLayer) else get()
        if layer is None or not is_packable(layer) or weight_out_in(layer).shape[-1] % _BLOCK:
            continue
        names.append(next(path for path, module in inner.named_modules() if module is layer))
        pack_at_(inner, f"{names[-1]}.weight", _in_8_bits(weight_out_in(layer).detach()))
    return bool(names)


def _in_8_bits(weight: Tensor) -> QuantizedTensor:
    shape = _SCHEME.scale_shape(tuple(weight.shape))
    largest = rows_of_groups(weight.float(), _SCHEME).abs().amax(-1).view(shape)
    encoding = encoding_from_range(-largest, largest, _SCHEME)
    # of a block of zeros, the smallest scale, which float16 also holds
    encoding = replace(encoding, scale=encoding.scale.half().float())
    return QuantizedTensor(encoding.quantize(weight.float()), encoding)


def _round_factors_(model: nn.Module) -> bool:
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        for name, a in layer.lora_A.items():
            # Files hold B with the scaling folded in.
            for factor, times in ((a, 1.0), (layer.lora_B[name], layer.scaling[name])):
                values = half(factor.weight.float() * times).float() / times
                factor.weight = nn.Parameter(values, requires_grad=False)
    return bool(layers)
