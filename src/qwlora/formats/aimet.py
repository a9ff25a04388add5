"""Reader for a float checkpoint with an AIMET encodings file: quantizes the float weights.

    codes = quantize(float weight)      with the encoding of the entry that has the parameter's name

All four versions of encodings files are supported. What an entry does depends on its parameter:

    matrix, up to 8 bits              becomes integers
    vector (norm, bias), up to 16     is rounded to the grid and stays float; it has no packed layer
    vector, more than 16 bits         ignored: AIMET's exporter derives such entries for biases, but
                                      its simulation does not apply them
    float entry, 16 bits or more      ignored

An entry belongs to a parameter by its name:

    fc.weight      the parameter
    fc.weight_0    the parameter transposed, if no parameter has this name; AIMET's ONNX exporter
                   names the weight of a MatMul like this

All entries that do not fit the model are reported in one error.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from qwlora import encodings as files
from qwlora.encodings.grids import TensorLayout, grid_of
from qwlora.encodings.model import BlockOrder, EncodingsFile, Entry, FloatEncoding
from qwlora.errors import EncodingsFileError, GridError, SourceError
from qwlora.formats.checkpoint import ShownCheckpoint
from qwlora.formats.huggingface.huggingface_folder import FloatCheckpoint
from qwlora.grid.encoding import Encoding
from qwlora.grid.min_max import measure
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import BITWIDTHS, Scheme
from qwlora.grid.sqnr import sqnr_db
from qwlora.messages import near_names

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
    found, by_range = (
        sqnr_db(signal, float((weight - rounded).square().sum()))
        for rounded in (values, measure(weight, scheme).fake_quantize(weight))
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


class MatchedEncodings:
    """The grids that an encodings file gives to the parameters of a model.

    Args:
        model: the float model; it may be on the meta device.
        path: the encodings file.
        keep_float: globs of parameters or layers that stay float, whether or not the file has an
            entry for them (`"lm_head*"`).
        block_order: the order of blocks in a 1.0.0 file that does not determine it (see
            `qwlora.encodings.grids`).

    Attributes:
        grids: encoding by parameter, [out, in]; tied parameters under the first of their names.

    Raises:
        EncodingsFileError: the file cannot be read, an entry matches no parameter, the weight of a
            Linear layer has no entry, or an entry does not fit its parameter. All problems are
            listed.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | Path,
        keep_float: Sequence[str] = (),
        block_order: BlockOrder | None = None,
    ):
        self.model, self.path = model, Path(path)
        self.keep_float, self.block_order = tuple(keep_float), block_order
        self.names = [name for name, _ in model.named_parameters()]
        self._modules = dict(model.named_modules())
        self.grids = self._matched(files.read(self.path))

    def _matched(self, file: EncodingsFile) -> dict[str, Encoding]:
        """The encoding of each parameter that has one.

        Raises:
            EncodingsFileError: entries and parameters do not fit; all problems are listed.
        """
        problems: list[str] = []
        found: dict[str, dict[str, Entry]] = {}
        unknown = []
        for entry in file.encodings:
            name = self._parameter_of(entry.name)
            if name is not None:
                found.setdefault(self._first(name), {})[entry.name] = entry
            elif file.parameters is None or entry.name in file.parameters:
                unknown.append(entry.name)
        grids: dict[str, Encoding] = {}
        for name, entries in found.items():
            if self._is_kept(name):
                continue
            try:
                if (grid := self._grid(name, entries, file)) is not None:
                    grids[name] = grid
            except SourceError as error:
                problems.append(f"{next(iter(entries))!r} {error}")
        problems += self._unmatched(file, set(found), unknown)
        if problems:
            raise EncodingsFileError(str(self.path), problems)
        return grids

    def _unmatched(self, file: EncodingsFile, found: set[str], unknown: list[str]) -> list[str]:
        """Problems with entries that match no parameter and Linear weights without an entry."""
        held = self.names
        problems = []
        if file.parameters is not None:  # files of version 2.x do not separate activations
            problems = [
                f"{name!r} is listed as a parameter, but the model has no such "
                f"parameter{_near(name, held)}"
                for name in unknown
            ]
        excluded = set(file.excluded_layers or ())
        for name in held:
            layer = name.rpartition(".")[0]
            linear = isinstance(self._modules.get(layer), nn.Linear | Conv1D) and name.endswith(
                ".weight"
            )
            if linear and name not in found and layer not in excluded and not self._is_kept(name):
                problems.append(
                    f"{name!r}, the weight of a Linear layer, has no entry{_near(name, unknown)}. "
                    f"To keep it float, set {_keeping(layer)}"
                )
        return problems

    def _grid(self, name: str, entries: dict[str, Entry], file: EncodingsFile) -> Encoding | None:
        """The encoding of a parameter; None if it stays float."""
        shape = tuple(self.model.get_parameter(name).shape)
        entry, *others = entries.values()
        if isinstance(entry, FloatEncoding):
            if entry.bitwidth < 16:
                raise SourceError(
                    f"is a float of {entry.bitwidth} bits, not an integer encoding. Quantize it to "
                    f"integers in AIMET, or set {_keeping(name)}"
                )
            grid = None
        elif len(shape) < 2 and entry.bitwidth > 16:
            grid = None
        elif not BITWIDTHS[0] <= entry.bitwidth <= (8 if len(shape) > 1 else BITWIDTHS[-1]):
            raise SourceError(
                f"has {entry.bitwidth} bits, but weights must have 2 to 8 bits (vectors up to 16). "
                f"Use fewer bits in AIMET, or set {_keeping(name)}"
            )
        else:
            grid = grid_of(entry, self._placement(name, entry, shape, file), file.version)
            _check_fits(grid.scheme, shape[::-1] if self.is_transposed(name) else shape)
        for other in others:
            again = self._grid(name, {other.name: other}, file)
            if not (grid is again if grid is None else grid.equals(again)):
                raise SourceError(
                    f"and {other.name!r} are tied in the model, but have different encodings. "
                    "Remove one of the two entries"
                )
        return grid

    def _placement(
        self, name: str, entry: Entry, shape: tuple[int, ...], file: EncodingsFile
    ) -> TensorLayout:
        renumbered = not self._is_parameter(entry.name)
        conv1d = self.is_transposed(name)
        order = self.block_order
        producer = file.producer or {}
        if order is None and producer.get("block_order") == "channel":
            order = "channel"  # our own files for aimet-onnx
        elif order is None and renumbered:
            order = "tensor"  # AIMET's ONNX exporter lists blocks in memory order
        elif order is None and not conv1d and producer.get("package") == "aimet-torch":
            order = "channel"  # aimet-torch keeps the name only if the tensor is [out, in]
        transposed_conv = isinstance(
            self._modules.get(name.rpartition(".")[0]), nn.modules.conv._ConvTransposeNd
        )
        return TensorLayout(
            shape[::-1] if conv1d else shape,
            conv1d != renumbered,
            1 if transposed_conv else 0,
            order,
        )

    def _parameter_of(self, entry: str) -> str | None:
        """The parameter of an entry, by its name or by the numbered name of AIMET's ONNX
        exporter."""
        if self._is_parameter(entry):
            return entry
        numbered = re.fullmatch(r"(.+)_\d{1,9}", entry)
        if (
            numbered
            and self._is_parameter(numbered[1])
            and self.model.get_parameter(numbered[1]).ndim == 2
        ):
            return numbered[1]
        return None

    def _is_parameter(self, name: str) -> bool:
        layer, _, leaf = name.rpartition(".")
        return (
            layer in self._modules
            and leaf in self._modules[layer]._parameters
            and self._modules[layer]._parameters[leaf] is not None
        )

    def _first(self, name: str) -> str:
        """The first of the names of a tied parameter."""
        tensor = self.model.get_parameter(name)
        return next(first for first, other in self.model.named_parameters() if other is tensor)

    def is_transposed(self, name: str) -> bool:
        """Whether a parameter is the weight [in, out] of a Conv1D."""
        return isinstance(self._modules.get(name.rpartition(".")[0]), Conv1D) and name.endswith(
            ".weight"
        )

    def _is_kept(self, name: str) -> bool:
        return any(
            fnmatch.fnmatchcase(parameter_or_layer, glob)
            for parameter_or_layer in (name, name.rpartition(".")[0])
            for glob in self.keep_float
        )


def _keeping(name: str) -> str:
    """The setting that keeps a parameter or layer float, for the recipe and for Python."""
    return f"model.keep_float: [{name}] in the recipe (keep_float=[{name!r}] in Python)"


def _check_fits(scheme: Scheme, shape: tuple[int, ...]) -> None:
    try:
        scheme.scale_shape(shape)
    except GridError as error:
        raise SourceError(f"does not fit: {error}") from error


def _near(name: str, among: Sequence[str]) -> str:
    """The end of a message that suggests similar names, preferably of layers with the same name,
    because most misspelled names differ only in their prefix."""
    layer = name.split(".")[-2:-1]
    alike = [other for other in among if other.split(".")[-2:-1] == layer] or among
    near = near_names(name, alike[:200])
    return f" (near: {', '.join(near)})" if near else ""
