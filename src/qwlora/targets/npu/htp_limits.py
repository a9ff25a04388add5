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

from qwlora.grid.scheme import Blocks, PerChannel, PerTensor, Scheme

# Snapdragon 8 Gen 3. The provider's default is an old chip without 4-bit blocks and 16-bit weights.
CHIP = {"soc_model": "57", "htp_arch": "75"}
SMALLEST_RESCALE = 2.0**-24
NORM_REMEDY = (
    "add to simulation.rules {match: NORM, of: weights, bitwidth: 8, symmetric: false}, where NORM "
    "is a glob for the names of the norms"
)
_BITS = (4, 8, 16)


def weight_problem(scheme: Scheme, input_bitwidth: int = 16) -> str | None:
    """Why the HTP does not compute products of such a weight and an input; None if it does."""
    blocks = isinstance(scheme.granularity, Blocks)
    if scheme.float_offset or not scheme.symmetric:
        problem = "takes symmetric weights; the nearest is the same without asymmetric"
    elif scheme.has_signed_scales:
        problem = "takes positive scales; the nearest is the same with block instead of signed"
    elif scheme.bitwidth == 2 and not blocks:
        problem = "computes 2 bits per tensor or channel wrongly; the nearest is w4-channel"
    elif scheme.bitwidth == 16 and blocks:
        problem = "takes 16-bit weights per tensor or per channel; the nearest is w16-channel"
    elif input_bitwidth == 8 and (blocks or scheme.bitwidth not in (4, 8)):
        problem = "multiplies inputs of 8 bits with 4 or 8 bits per tensor or channel; or give the "
        problem += "layer's input 16 bits"
    elif scheme.bitwidth not in (2, *_BITS):
        nearest = min(bits for bits in _BITS if bits > scheme.bitwidth)
        problem = f"has weights of 2, 4, 8 and 16 bits; the nearest has {nearest}"
    else:
        return None
    return f"{scheme}: the HTP {problem}"


def factor_problem(scheme: Scheme, input_bitwidth: int) -> str | None:
    """Why the HTP does not multiply activations with such a norm weight; None if it does."""
    if input_bitwidth == 8 and (scheme.bitwidth != 8 or scheme.symmetric):
        return (
            f"{scheme}: the HTP multiplies activations of 8 bits with 8 bits and an offset; "
            f"{NORM_REMEDY}"
        )
    return None


def table_problem(scheme: Scheme) -> str | None:
    """Why the HTP does not read rows of such a table; None if it does."""
    if (
        not isinstance(scheme.granularity, PerTensor)
        or scheme.bitwidth not in (8, 16)
        or not scheme.symmetric
    ):
        return f"{scheme}: the HTP reads tables with one symmetric scale; the nearest is w8-tensor"
    return None


def input_problem(scheme: Scheme) -> str | None:
    """Why a weight on such a grid cannot be an input of an HTP graph; None if it can."""
    if isinstance(scheme.granularity, PerChannel) or not scheme.symmetric:
        return (
            "an input of an HTP graph has one symmetric scale. "
            "Set simulation.adapter_weights.granularity: tensor"
        )
    if scheme.bitwidth not in (8, 16):
        return "an input of an HTP graph has 8 or 16 bits. Set simulation.adapter_weights.bitwidth"
    return None
