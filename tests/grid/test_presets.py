from __future__ import annotations

import pytest
import torch

from qwlora.errors import GridError
from qwlora.grid.observers import measure
from qwlora.grid.scheme import Lpbq, PerBlock, PerChannel, Scheme
from qwlora.grid.scheme_presets import PRESETS, Preset, preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_quantizes_a_weight(name):
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    scheme = preset(name).weight
    assert f"w{scheme.bitwidth}" == name[:2]
    error = (measure(weight, scheme).fake_quantize(weight) - weight).square().mean()
    assert 0 < error < 0.4


def test_what_the_names_mean():
    a8, a16 = Scheme(8, False), Scheme(16, False)
    assert preset("w4a16") == Preset(Scheme(4, granularity=PerChannel(0)), a16)
    assert preset("w4a8") == Preset(Scheme(4, granularity=PerChannel(0)), a8)
    assert preset("w8a8") == Preset(Scheme(8, granularity=PerChannel(0)), a8)
    assert preset("w4-lpbq") == Preset(Scheme(4, granularity=Lpbq(64)), a16)
    assert preset("w3g64") == Preset(Scheme(3, granularity=PerBlock(64)))
    assert preset("w2g64") == Preset(Scheme(2, False, PerBlock(64)))


def test_an_unknown_preset_is_refused():
    with pytest.raises(GridError, match="preset 'w5a5' is not one of w8a8, w8a16, w4a8"):
        preset("w5a5")
