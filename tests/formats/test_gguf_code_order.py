"""The order of codes in GGUF's simple blocks, against the gguf package's own dequantization."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from qwlora.errors import GridError
from qwlora.formats.gguf.code_order import CODE_BYTES, pack_block_codes, unpack_block_codes

KINDS = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
ONE = np.frombuffer(np.float16(1).tobytes(), np.uint8)


def meant(fields: torch.Tensor, bitwidth: int) -> torch.Tensor:
    """Codes of blocks by the gguf package: their values at scale 1, and the middle code added."""
    raw = np.concatenate([np.tile(ONE, (len(fields), 1)), fields.numpy()], axis=1)
    return torch.from_numpy(
        gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[KINDS[bitwidth]])
    ) + 2 ** (bitwidth - 1)


@pytest.mark.parametrize("bitwidth", [4, 5, 8])
def test_codes_are_where_the_gguf_package_has_them(bitwidth: int) -> None:
    fields = torch.randint(0, 256, (50, CODE_BYTES[bitwidth]), dtype=torch.uint8)
    assert torch.equal(unpack_block_codes(fields, bitwidth).float(), meant(fields, bitwidth))


@pytest.mark.parametrize("bitwidth", [4, 5, 8])
def test_packed_codes_are_read_by_the_gguf_package(bitwidth: int) -> None:
    codes = torch.randint(0, 2**bitwidth, (5, 10, 32), dtype=torch.uint8)
    packed = pack_block_codes(codes, bitwidth)
    assert packed.shape == (5, 10, CODE_BYTES[bitwidth])
    assert torch.equal(meant(packed.flatten(0, 1), bitwidth), codes.flatten(0, 1).float())
    assert torch.equal(unpack_block_codes(packed, bitwidth), codes)


def test_what_does_not_fit_is_refused() -> None:
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    with pytest.raises(GridError, match="codes of 4, 5 or 8 bits, not 3"):
        pack_block_codes(codes, 3)
    with pytest.raises(
        GridError, match="the last axis of 4-bit blocks must have length 32, not 31"
    ):
        pack_block_codes(codes[:, :31], 4)
    with pytest.raises(
        GridError, match="the last axis of 5-bit blocks must have length 20, not 16"
    ):
        unpack_block_codes(codes[:, :16], 5)
    with pytest.raises(GridError, match="code 16 does not fit in 4 bits"):
        pack_block_codes(codes + 16, 4)
