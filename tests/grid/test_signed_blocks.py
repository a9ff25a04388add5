"""Symmetric blocks whose scales may be negative."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

from qwlora.errors import GridError
from qwlora.grid.encoding import Encoding, measure
from qwlora.grid.scheme import PerBlock, Scheme, SignedBlock, parse_scheme, short_name
from qwlora.quantize.gptq import solve_gptq
from qwlora.quantize.scale_search import search_scale

SIGNED, PLAIN = (Scheme(4, granularity=kind(32)) for kind in (SignedBlock, PerBlock))


def weights(seed: int = 0) -> torch.Tensor:
    return torch.randn(16, 128, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    x = torch.tensor([[8.0, -7.0, 1.0, 0.0], [7.0, -8.0, 1.0, 0.0]])
    encoding = measure(x, Scheme(4, granularity=SignedBlock(4)))
    assert encoding.scale.tolist() == [[-1], [1]]
    assert encoding.quantize(x).tolist() == [[0, 15, 7, 8], [15, 0, 9, 8]]
    assert torch.equal(encoding.fake_quantize(x), x)
    assert parse_scheme("w4-signed32") == SIGNED == Scheme.from_json(SIGNED.to_json())
    assert short_name(SIGNED) == "w4-signed32"
    # blocks that lean down have the scale of the plain grid
    blocks = weights().unflatten(1, (-1, 32))
    leans_down = -blocks.amin(-1) >= blocks.amax(-1)
    signed, plain = measure(weights(), SIGNED).scale, measure(weights(), PLAIN).scale
    assert torch.equal(signed[leans_down], plain[leans_down])
    assert (signed[~leans_down] < 0).all()
    offset = torch.full((1, 1), -8, dtype=torch.int32)
    with pytest.raises(GridError, match="a scale is a finite number other than 0"):
        Encoding(SIGNED, torch.zeros(1, 1), offset)
    with pytest.raises(GridError, match="a scale is a finite positive number"):
        Encoding(PLAIN, -torch.ones(1, 1), offset)
    with pytest.raises(GridError, match="signed grids have no offsets; remove -asymmetric"):
        Scheme(4, False, SignedBlock(32))


def test_codes_are_those_of_ggufs_q4_0():
    x = weights()
    stored = quantize(x.numpy(), Type.Q4_0)
    scale = torch.from_numpy(stored.reshape(16, 4, 18)[..., :2].copy().view(np.float16)).float()
    encoding = Encoding(SIGNED, scale.squeeze(-1), torch.full((16, 4), -8, dtype=torch.int32))
    assert 20 < (encoding.scale < 0).sum() < 44
    fields = torch.from_numpy(stored.reshape(16, 4, 18)[..., 2:].copy())
    codes = torch.cat([fields & 15, fields >> 4], -1).flatten(1)
    assert torch.equal(encoding.quantize(x), codes)
    assert torch.equal(encoding.dequantize(codes), torch.from_numpy(dequantize(stored, Type.Q4_0)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_solver_gains_by_the_sign(bits: int):
    x = weights()
    signed, plain = (parse_scheme(f"w{bits}-{kind}32") for kind in ("signed", "block"))
    inputs = torch.randn(512, 128, generator=torch.Generator().manual_seed(1))
    moment = inputs.T @ inputs / 512

    def errors(scheme: Scheme) -> list[float]:
        found = [measure(x, scheme), search_scale(x, scheme)]
        values = [encoding.fake_quantize(x) for encoding in found]
        values.append(solve_gptq(x, scheme, moment)[0].dequantize())
        return [float(((x - v) @ moment * (x - v)).sum()) for v in values]

    for of_signed, of_plain in zip(errors(signed), errors(plain), strict=True):
        assert of_signed < 0.95 * of_plain
