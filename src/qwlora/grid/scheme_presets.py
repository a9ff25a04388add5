"""Named pairs of schemes, as data. Free of torch.

A name says weight bits, then what is particular about the weight's granularity or the activation's bits: `w4a16` has 4-bit weights per channel and 16-bit
activations, `w3g64` 3-bit weights in groups (blocks) of 64 and float activations. 2-bit weights are asymmetric: a symmetric grid would waste one code of four.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwlora.errors import GridError
from qwlora.grid.scheme import Lpbq, PerBlock, PerChannel, Scheme, parse_scheme


@dataclass(frozen=True)
class Preset:
    """Schemes of the weights and of the activations; None for activations that stay float."""

    weight: Scheme
    activation: Scheme | None = None


_A8, _A16 = Scheme(8, symmetric=False), Scheme(16, symmetric=False)

PRESETS: dict[str, Preset] = {
    "w8a8": Preset(Scheme(8, granularity=PerChannel(0)), _A8),
    "w8a16": Preset(Scheme(8, granularity=PerChannel(0)), _A16),
    "w4a8": Preset(Scheme(4, granularity=PerChannel(0)), _A8),
    "w4a16": Preset(Scheme(4, granularity=PerChannel(0)), _A16),
    "w4-lpbq": Preset(Scheme(4, granularity=Lpbq(64)), _A16),
    "w4g32": Preset(Scheme(4, granularity=PerBlock(32))),
    "w4g128": Preset(Scheme(4, granularity=PerBlock(128))),
    "w3g64": Preset(Scheme(3, granularity=PerBlock(64))),
    "w2g64": Preset(Scheme(2, symmetric=False, granularity=PerBlock(64))),
}


def preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        GridError: there is none.
    """
    if name not in PRESETS:
        raise GridError(f"preset {name!r} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]


def weight_scheme(name: str) -> Scheme:
    """The weight's scheme of a preset (`w4a16`), or the scheme that a short name spells (`w4-block32`, see `parse_scheme`).

    Raises:
        GridError: the name is neither.
    """
    return PRESETS[name].weight if name in PRESETS else parse_scheme(name)
