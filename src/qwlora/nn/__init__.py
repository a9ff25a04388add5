"""Layers whose weight is packed integers, and how a module becomes one.

    layer = pack_module(module, quantized)      a new module for a Linear, Conv1D, Embedding, Conv
    head = pack_tied(head, layer)               an output head that reads the embedding's codes
    pack_parameter_(module, name, quantized)    a 3-D parameter (fused experts), in place
    layer.quantized, layer.encoding, layer.codes

A packed layer is an instance of its float class, so PEFT's own LoRA attaches to it and a subclass
keeps its forward. The weight is unpacked for each forward and again for each backward; autograd
keeps codes, never floats. Not supported: a gradient for the weight (it is frozen), and merging a
float delta into the codes.
"""

from qwlora.nn.instance_forward import instance_calls, instance_forward_problem
from qwlora.nn.pack import (
    empty_packed,
    has_computed_weight,
    is_packable,
    pack_at_,
    pack_module,
    pack_tied,
    packed_weights,
    place_empty_,
    tie_weights_,
    weight_out_in,
)
from qwlora.nn.packed_experts import (
    PackedParameter,
    empty_packed_parameter_,
    pack_parameter_,
    parameter_out_in,
)
from qwlora.nn.packed_layer import PackedLayer, is_packed
from qwlora.nn.packed_modules import PackedConv1d, PackedConv2d, PackedEmbedding, PackedLinear

__all__ = [
    "PackedConv1d",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLayer",
    "PackedLinear",
    "PackedParameter",
    "empty_packed",
    "empty_packed_parameter_",
    "has_computed_weight",
    "instance_calls",
    "instance_forward_problem",
    "is_packable",
    "is_packed",
    "pack_at_",
    "pack_module",
    "pack_parameter_",
    "pack_tied",
    "packed_weights",
    "parameter_out_in",
    "place_empty_",
    "tie_weights_",
    "weight_out_in",
]
