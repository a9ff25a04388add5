"""Layers whose weight is packed integers, and how a module becomes one.

    layer = pack_module(module, quantized)   a new module for a Linear, Conv1D, Embedding, Conv
    pack_at_(model, name, quantized)         one tensor of a model, also fused experts, in place
    layer.quantized, layer.encoding, layer.codes

A packed layer is an instance of its float class, so PEFT's own LoRA attaches to it and a subclass
keeps its forward. The weight is unpacked for each forward and again for each backward; autograd
keeps codes, never floats. Not supported: a gradient for the weight (it is frozen), and merging a
float delta into the codes.
"""

from qwlora.nn.packed_layer import PackedLayer as PackedLayer
from qwlora.nn.packed_layer import PackedLinear as PackedLinear
from qwlora.nn.packed_layer import is_packable as is_packable
from qwlora.nn.packed_layer import is_packed as is_packed
from qwlora.nn.packed_layer import pack_at_ as pack_at_
from qwlora.nn.packed_layer import pack_module as pack_module
from qwlora.nn.packed_layer import packed_weights as packed_weights
from qwlora.nn.packed_layer import tensor_out_in as tensor_out_in
from qwlora.nn.packed_layer import tie_weights_ as tie_weights_
from qwlora.nn.packed_layer import weight_out_in as weight_out_in
