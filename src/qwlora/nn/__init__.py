"""Layers whose weight is packed integers, and how a module becomes one.

    layer = pack_module(module, quantized)   a new module for a Linear, Conv1D, Embedding, Conv
    pack_at_(model, name, quantized)         one tensor of a model, also fused experts, in place
    layer.quantized, layer.encoding, layer.codes

A packed layer is an instance of its float class, so PEFT's own LoRA attaches to it and a subclass
keeps its forward. The weight is unpacked for each forward and again for each backward; autograd
keeps codes, never floats. Not supported: a gradient for the weight (it is frozen), and merging a
float delta into the codes.
"""

from qwlora.nn.packed_layer import PackedLayer, PackedLinear, is_packed, packed_weights
from qwlora.nn.replace import (
    is_packable,
    pack_at_,
    pack_module,
    tensor_out_in,
    tie_weights_,
    weight_out_in,
)

__all__ = [
    "PackedLayer",
    "PackedLinear",
    "is_packable",
    "is_packed",
    "pack_at_",
    "pack_module",
    "packed_weights",
    "tensor_out_in",
    "tie_weights_",
    "weight_out_in",
]
