"""What Qualcomm's HTP takes and computes correctly, checked before anything is written.

Each kind of weight was tried as one product with onnxruntime-qnn 2.7 on its emulator (chip 57,
architecture 75), with inputs of 16 bits. Wrong means that it was accepted, and its result was
not that of ONNX Runtime on the CPU.

    2 bits              per block yes; per tensor and per channel wrong
    4, 8 bits           symmetric per tensor, per channel, per block and LPBQ: yes
                        asymmetric: refused, or wrong per block
    16 bits             symmetric per tensor and per channel: yes
    others              ONNX has no type for 3 and 5 to 7 bits but the next wider one

With inputs of 8 bits, blocks and 16-bit weights are refused, and a norm whose weight has other than
8 bits and an offset runs on the CPU. Tables of embeddings need one scale, as a Gather reads them,
and so do lora_A and lora_B, which are inputs of the graph.

The HTP rescales a product with s_x s_w / s_y, which must be greater than 2^-24.
"""

from __future__ import annotations

from qwlora.targets.target import FormatLimits

# Snapdragon 8 Gen 3. The provider's default is an old chip without 4-bit blocks and 16-bit weights.
CHIP = {"soc_model": "57", "htp_arch": "75"}
SMALLEST_RESCALE = 2.0**-24
NORM_REMEDY = (
    "add to simulation.rules {match: NORM, of: weights, bitwidth: 8, symmetric: false}, where NORM "
    "is a glob for the names of the norms"
)
_TABLES = FormatLimits(
    name="a table or an input of an HTP graph",
    symmetric=(8, 16),
    channel_bits=(),
    block_bits=(),
    remedy="For the embedding, add to base.rules, first: {match: EMBEDDING, weights: w8-tensor}; "
    "for adapters, set simulation.adapter_weights: w8-tensor",
)
HTP = FormatLimits(
    name="the HTP",
    symmetric=(2, 4, 8, 16),
    tensor_bits=(4, 8, 16),
    channel_bits=(4, 8, 16),
    block_bits=(2, 4, 8),
    has_signed_scales=False,
    tables=_TABLES,
    with_8_bits=FormatLimits(
        name="the HTP, with inputs of 8 bits,",
        symmetric=(4, 8),
        block_bits=(),
        tables=_TABLES,
        remedy="Or give the layer's input 16 bits",
    ),
)
