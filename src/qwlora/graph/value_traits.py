"""Traits of the values in a captured graph, and the decisions of placement. Plain data; does not
import torch.

`graph_analysis.py` finds the traits, placement rules (`simulation/placement_rules.py`) select by
them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from qwlora.grid.scheme import RangeEstimator


class Trait(StrEnum):
    """A structural property of a value, which may have several."""

    # The value is a float64 tensor.
    FLOAT64 = "float64"
    # Computed from integers only: no floating-point input or parameter flows into it, and no
    # matrix product reads it.
    INTEGER_ORIGIN = "integer-origin"
    # Used only as the argument of sine or cosine. A grid step above one radian makes it useless.
    ANGLE = "angle"
    # A mask was added to it or selected among its values. Also every value computed from such a
    # value before the softmax.
    MASKED = "masked"
    # Computed and read inside a module that counts as one operation.
    INSIDE_ONE_OPERATION = "inside-one-operation"
    # Computed inside such a module and read outside of it.
    LEAVES_ONE_OPERATION = "leaves-one-operation"
    # x + f(x)
    RESIDUAL_ADDITION = "residual-addition"
    # An activation that a matrix product reads, directly or after data movement.
    MATMUL_INPUT = "matmul-input"
    # The same, as the second factor of a product of two activations.
    MATMUL_SECOND_INPUT = "matmul-second-input"
    # Computed from weights alone, including an adapter's, and used as a weight by a matrix product.
    ADAPTED_WEIGHT = "adapted-weight"
    # A floating-point input of the model.
    INPUT = "input"
    # lora_A, lora_B and other parameters of an adapter.
    ADAPTER_WEIGHT = "adapter-weight"
    # A weight, bias or norm of the base that step 1 left in float.
    PARAMETER = "parameter"
    # Only moves values of another tensor (view, transpose, slice ...).
    DATA_MOVEMENT = "data-movement"
    # Keys and values of attention, which a key-value cache holds.
    KEY_OR_VALUE = "key-or-value"
    # lora_A(x), lora_B(lora_A(x)) and the scaling of it; not the sum with the base layer's output.
    LORA_BRANCH = "lora-branch"


class Decision(StrEnum):
    """Whether the simulation quantizes a tensor, and how."""

    QUANTIZE = "quantize"  # it gets an encoding
    SHARE = "share"  # data movement: the encoding of the value it was moved from also holds it
    FLOAT = "float"


@dataclass(frozen=True)
class GridOptions:
    """Options of one value's grid; None: the same as for other values."""

    bitwidth: int | None = None
    symmetric: bool | None = None
    minimum: float | None = None
    maximum: float | None = None
    observer: RangeEstimator | None = None

    def filled(self, other: GridOptions) -> GridOptions:
        """With the options of `other` where they are None."""
        return replace(other, **{k: value for k, value in vars(self).items() if value is not None})
