import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qwlora.errors import GridError
from qwlora.grid.packing import pack, packed_row_bytes, planes_of, unpack

from .strategies import thorough

onnx = pytest.importorskip("onnx")
import ml_dtypes  # noqa: E402  (comes with onnx)


@st.composite
def codes(draw):
    bitwidth = draw(st.integers(1, 8))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=19))
    values = hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bitwidth - 1))
    return bitwidth, torch.from_numpy(draw(values))


def golden(q, bitwidth):
    """The bytes of a row, plane after plane, bit by bit."""
    q = np.pad(q, (0, -len(q) % (8 // np.gcd(bitwidth, 8))))
    found, place = b"", 0
    for width in planes_of(bitwidth):
        plane = q >> place & 2**width - 1
        if width == 1:
            found += np.packbits(plane).tobytes()
        else:
            number = sum(int(code) << (width * i) for i, code in enumerate(plane))
            found += number.to_bytes(len(plane) * width // 8, "little")
        place += width
    return found


@thorough
@given(codes())
def test_codes_come_back_and_a_row_is_its_planes(case):
    bitwidth, q = case
    packed = pack(q, bitwidth)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*q.shape[:-1], packed_row_bytes(q.shape[-1], bitwidth))
    assert torch.equal(unpack(packed, bitwidth, q.shape[-1]), q)
    q = q.flatten()
    assert bytes(pack(q, bitwidth).tolist()) == golden(q.numpy(), bitwidth)


@pytest.mark.parametrize("bitwidth", range(17))
def test_codes_and_widths_that_do_not_fit_are_refused(bitwidth):
    codes = torch.tensor([0, min(2**bitwidth, 255)], dtype=torch.uint8)
    if 0 < bitwidth < 8:
        with pytest.raises(GridError, match=f"code {2**bitwidth} does not fit in {bitwidth} bits"):
            pack(codes, bitwidth)
    elif bitwidth != 8:
        for act in (lambda: pack(codes, bitwidth), lambda: unpack(codes, bitwidth, 8)):
            with pytest.raises(GridError, match=f"codes of {bitwidth} bits are not packed"):
                act()


@pytest.mark.parametrize("bitwidth", range(1, 9))
def test_planes_have_all_bits_of_a_code_and_rows_are_dense(bitwidth):
    assert sum(planes_of(bitwidth)) == bitwidth
    assert planes_of(bitwidth) == sorted(set(planes_of(bitwidth)), reverse=True)
    assert packed_row_bytes(64, bitwidth) == 8 * bitwidth
    packed = pack(torch.zeros(3, 0, dtype=torch.uint8), bitwidth)
    assert packed.shape == (3, packed_row_bytes(0, bitwidth)) == (3, 0)
    assert unpack(packed, bitwidth, 0).shape == (3, 0)


@pytest.mark.parametrize("kind", ["uint2", "int2", "uint4", "int4"])
def test_order_is_that_of_onnx(kind):
    rng, bitwidth = np.random.default_rng(0), int(kind[-1])
    q = rng.integers(0, 2**bitwidth, (5, 16))
    values = q - 2 ** (bitwidth - 1) if kind.startswith("int") else q
    golden = onnx.numpy_helper.from_array(values.astype(getattr(ml_dtypes, kind))).raw_data
    stored = torch.from_numpy((values & (2**bitwidth - 1)).astype(np.uint8))
    assert bytes(pack(stored, bitwidth).flatten().tolist()) == golden
