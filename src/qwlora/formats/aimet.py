"""Reader for a float checkpoint with an AIMET encodings file: quantizes the float weights.

    codes = quantize(float weight)      with the encoding of the entry that has the parameter's name

All four versions of encodings files are supported; `matched_encodings.py` finds the parameter of
each entry. What an entry does depends on its parameter:

    matrix, up to 8 bits              becomes integers
    vector (norm, bias), up to 16     is rounded to the grid and stays float; it has no packed layer
    vector, more than 16 bits         ignored: AIMET's exporter derives such entries for biases, but
                                      its simulation does not apply them
    float entry, 16 bits or more      ignored
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from qwlora.encodings.model import BlockOrder
from qwlora.errors import GridError, SourceError
from qwlora.formats.checkpoint import ShownCheckpoint
from qwlora.formats.huggingface_folder import FloatCheckpoint
from qwlora.formats.matched_encodings import MatchedEncodings
from qwlora.grid.float_offset import measure_float_offset
from qwlora.grid.observers import measure
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Scheme
from qwlora.grid.sqnr import sqnr_db

# An encoding below LEAST_SQNR that is WORSE than a min-max grid is refused, both in dB. Clipping
# that an observer chose costs less. At 2 bits a min-max grid is too poor to tell.
LEAST_SQNR, WORSE = 12.0, 6.0


class AimetCheckpoint(ShownCheckpoint):
    """A float checkpoint and its encodings.

    Args:
        folder: a Hugging Face folder with float weights.
        encodings: the encodings file.
        keep_float, block_order: see `MatchedEncodings`.

    Raises:
        SourceError: see `FloatCheckpoint`.
        EncodingsFileError: see `MatchedEncodings`.
    """

    def __init__(
        self,
        folder: str | Path,
        encodings: str | Path,
        keep_float: Sequence[str] = (),
        block_order: BlockOrder | None = None,
    ):
        self.floats = FloatCheckpoint(folder)
        self.folder = self.path = self.floats.folder
        self.config: PretrainedConfig = self.floats.config
        self._matched = MatchedEncodings(self.floats.model, encodings, keep_float, block_order)
        self._grids = self._matched.grids

    def names(self) -> list[str]:
        """Names of parameters and saved buffers in the model's order, tied tensors once."""
        return self.floats.names()

    def schemes(self) -> dict[str, tuple[Scheme, tuple[int, ...]]]:
        """Scheme and shape `[out, in]` of each parameter that becomes integers; reads no tensor
        data."""
        shapes = {name: tuple(self.floats.model.get_parameter(name).shape) for name in self._grids}
        placed = {
            name: shape[::-1] if self._matched.is_transposed(name) else shape
            for name, shape in shapes.items()
            if len(shape) > 1
        }
        return {name: (self._grids[name].scheme, shape) for name, shape in placed.items()}

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """Read one parameter, as integers if it is a matrix with an entry.

        Raises:
            SourceError: there is no such parameter, or its values are not finite.
        """
        value = self.floats.read(name)
        grid = self._grids.get(name)
        if grid is None:
            return value
        assert isinstance(value, Tensor), "a float checkpoint has floats"
        matrix = value.t() if self._matched.is_transposed(name) else value
        try:
            if value.ndim < 2:
                return grid.fake_quantize(value.float())
            quantized = QuantizedTensor(grid.quantize(matrix.float()), grid)
            _check_fit(matrix.float(), quantized)
            return quantized
        except GridError as error:
            raise SourceError(f"{str(self.floats.folder)!r}: {name!r}: {error}") from error


def _check_fit(weight: Tensor, quantized: QuantizedTensor) -> None:
    """Refuse an encoding that cannot have been made for this weight.

    Raises:
        GridError: it is much worse than a min-max grid of the same scheme.
    """
    scheme, values = quantized.encoding.scheme, quantized.dequantize()
    signal = float(weight.square().sum())
    usual = measure_float_offset if scheme.float_offset else measure
    found, by_range = (
        sqnr_db(signal, float((weight - rounded).square().sum()))
        for rounded in (values, usual(weight, scheme).fake_quantize(weight))
    )
    if found < min(LEAST_SQNR, by_range - WORSE):
        ones = torch.ones_like(quantized.codes)
        step = quantized.encoding.dequantize(ones) - quantized.encoding.dequantize(ones - 1)
        clipped = int(((weight - values).abs() > 0.51 * step).sum())
        raise GridError(
            f"its encoding leaves an SQNR of {found:.1f} dB, where the range of the weight would "
            f"give {by_range:.1f} dB, and clips {clipped:,} of {weight.numel():,} values. The "
            "encodings belong to another checkpoint, or their scales are wrong"
        )
