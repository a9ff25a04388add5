"""Reader for a float checkpoint with an AIMET encodings file: quantizes the float weights.

    codes = quantize(float weight)      with the encoding of the entry that has the parameter's name

All four versions of encodings files are supported. The effect of an entry depends on its parameter:

    matrix, up to 8 bits              becomes integers
    vector (norm, bias), up to 16     is rounded to the grid and stays float; it has no packed layer
    vector, more than 16 bits         ignored: AIMET's exporter derives such entries for biases, but
                                      its simulation does not apply them
    float entry, 16 bits or more      ignored

An entry belongs to a parameter by its name:

    fc.weight          the parameter
    fc.weight_0        the parameter transposed, if no parameter has this name; AIMET's ONNX
                       exporter names the weight of a MatMul like this
    fc.weight_dup_4    the parameter, of which the exporter made a copy
    m.fc.weight        the parameter, if the whole file has the prefix `m.`: it was exported through
                       a module that has the model as its `m`

"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qwlora.errors import (
    EncodingsFileError,
    GridError,
    QwloraWarning,
    SourceError,
    listed,
    near_names,
    suggestion,
)
from qwlora.formats.aimet_encodings.encodings_file import read_encodings
from qwlora.formats.aimet_encodings.grids import TensorLayout, grid_of
from qwlora.formats.aimet_encodings.model import BlockOrder, EncodingsFile, Entry, FloatEncoding
from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint
from qwlora.grid.encoding import Encoding, QuantizedTensor, measure, sqnr_db
from qwlora.grid.scheme import BITWIDTHS, Scheme

# An encoding below LEAST_SQNR that is WORSE than a min-max grid is refused, both in dB: it cannot
# have been made for this weight. Clipping that an observer chose costs less. At 2 bits a min-max
# grid is too poor to tell.
LEAST_SQNR, WORSE = 12.0, 6.0


class AimetCheckpoint(FolderCheckpoint):
    """A float checkpoint and its encodings; for arguments and errors, see `matched_encodings`."""

    def __init__(
        self,
        folder: str | Path,
        encodings: str | Path,
        keep_float: Sequence[str] = (),
        block_order: BlockOrder | None = None,
        prefix: str | None = None,
    ):
        super().__init__(folder)
        self._grids = matched_encodings(self.model, encodings, keep_float, block_order, prefix)

    def schemes(self) -> dict[str, tuple[Scheme, tuple[int, ...]]]:
        """Scheme and shape `[out, in]` of each parameter that becomes integers."""
        shapes = {name: _shape_out_in(self.model, name) for name in self._grids}
        return {n: (self._grids[n].scheme, shape) for n, shape in shapes.items() if len(shape) > 1}

    def read(self, name: str) -> Tensor | QuantizedTensor:
        value = super().read(name)
        grid = self._grids.get(name)
        if grid is None:
            return value
        assert isinstance(value, Tensor), "a float checkpoint has floats"
        matrix = value.t() if _is_conv1d_weight(self.model, name) else value
        try:
            if value.ndim < 2:
                return grid.fake_quantize(value.float())
            quantized = QuantizedTensor(grid.quantize(matrix.float()), grid)
            _check_fit(matrix.float(), quantized)
            return quantized
        except GridError as error:
            raise SourceError(f"{str(self.path)!r}: {name!r}: {error}") from error


def _check_fit(weight: Tensor, quantized: QuantizedTensor) -> None:
    scheme, values = quantized.encoding.scheme, quantized.dequantize()
    by_range = measure(weight, scheme).fake_quantize(weight)
    signal = float(weight.square().sum())
    stated_db, range_db = (
        sqnr_db(signal, float((weight - rounded).square().sum())) for rounded in (values, by_range)
    )
    if stated_db < min(LEAST_SQNR, range_db - WORSE):
        ones = torch.ones_like(quantized.codes)
        step = quantized.encoding.dequantize(ones) - quantized.encoding.dequantize(ones - 1)
        # Rounding errors are half a step at most, so values with larger errors were clipped.
        clipped = int(((weight - values).abs() > 0.51 * step).sum())
        raise GridError(
            f"its encoding leaves an SQNR of {stated_db:.1f} dB, where the range of the weight "
            f"would give {range_db:.1f} dB, and clips {clipped:,} of {weight.numel():,} values. "
            "The encodings belong to another checkpoint, or their scales are wrong"
        )


def matched_encodings(
    model: nn.Module,
    path: str | Path,
    keep_float: Sequence[str] = (),
    block_order: BlockOrder | None = None,
    prefix: str | None = None,
) -> dict[str, Encoding]:
    """The grids that an encodings file gives to the parameters of a model, [out, in]. A tied
    parameter has its first name.

    Args:
        model: the float model; it may be on the meta device.
        keep_float: globs of parameters or layers that stay float, whether or not the file has an
            entry for them (`"lm_head*"`).
        block_order: the order of blocks in a 1.0.0 file that does not determine it (see
            `qwlora.formats.aimet_encodings.grids`).
        prefix: prefix that names have only in the file or only in the model (`"m."`). Default: the
            prefix with which most names agree.

    Raises:
        EncodingsFileError: the file cannot be read, several prefixes fit alike, a glob matches
            nothing, the weight of a Linear layer has no entry, or an entry does not fit its
            parameter. All problems are listed.

    Warns:
        QwloraWarning: the entries of parameters that the model does not have.
    """
    file = read_encodings(path)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    named = file.by_name.keys() if file.parameters is None else file.parameters
    removed, added = _prefix(str(path), named, parameters.keys(), prefix)
    excluded_layers = {added + name.removeprefix(removed) for name in file.excluded_layers or ()}
    # Parameters are known by identity, since a tied one has several names.
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    grids: dict[str, tuple[str, Encoding | None]] = {}  # with the name of the entry
    unknown: list[str] = []
    problems: list[str] = []
    kept = set[int]()
    ids = [(n, id(p)) for name, p in parameters.items() for n in (name, name.rpartition(".")[0])]
    for glob in keep_float:
        matched = {key for name, key in ids if fnmatchcase(name, glob)}
        kept |= matched
        if not matched:
            near_glob = suggestion(glob, [name for name, _ in ids if name])
            problems.append(f"keep_float: {glob!r} matches no parameter or layer{near_glob}")

    def parameter_of(entry: Entry) -> tuple[nn.Parameter | None, bool]:
        for name, is_numbered in _candidates(entry.name):
            parameter = parameters.get(added + name.removeprefix(removed))
            if parameter is not None and not (is_numbered and parameter.ndim != 2):
                return parameter, is_numbered
        return None, False

    for entry in file.encodings:
        parameter, is_numbered = parameter_of(entry)
        if parameter is None:
            unknown += [entry.name] if entry.name in named else []
            continue
        if id(parameter) in kept:
            continue
        first, grid = first_names[id(parameter)], None
        try:
            grid = _grid(model, first, entry, is_numbered, file, block_order)
        except SourceError as error:
            problems.append(f"{entry.name!r} {error}")
        earlier, agreed = grids.setdefault(first, (entry.name, grid))
        if not (grid is agreed or (grid and agreed and grid.equals(agreed))):
            problems.append(
                f"{earlier!r} and {entry.name!r} are one parameter of the model, but have "
                "different encodings. Remove one of the two entries"
            )
    for key, name in first_names.items():
        layer, _, leaf = name.rpartition(".")
        is_linear = isinstance(model.get_submodule(layer), nn.Linear | Conv1D)
        excluded = name in grids or key in kept or layer in excluded_layers
        if is_linear and leaf == "weight" and not excluded:
            problems.append(
                f"{name!r}, the weight of a Linear layer, has no entry{_near(name, unknown)}. "
                f"To keep it float, set {_keeping(layer)}"
            )
    if problems:
        raise EncodingsFileError(str(path), problems)
    # 2.x does not separate activations, but their names end differently.
    if file.parameters is None:
        ends = tuple(f".{name.rpartition('.')[2]}" for name in parameters)
        unknown = [n for n in unknown if any(name.endswith(ends) for name, _ in _candidates(n))]
    if unknown:
        near = [f"{name!r}{_near(name, [*first_names.values()])}" for name in unknown[:10]]
        warnings.warn(
            f"{path}: the model has no parameter for {len(unknown)} of {len(named)} entries, which "
            f"change nothing: {listed([*near, *unknown[10:]], 10)}",
            QwloraWarning,
            stacklevel=2,
        )
    in_order = (name for name in first_names.values() if name in grids)
    return {name: grid for name in in_order if (grid := grids[name][1]) is not None}


def _candidates(name: str) -> Iterator[tuple[str, bool]]:
    """The parameter names that an entry can belong to, and whether its tensor is transposed."""
    # A copy of a transposed weight has both endings: `fc.weight_dup_12_0`.
    is_transposed = False
    yield name, is_transposed
    for _ in range(2):
        if (end := re.fullmatch(r"(.+?)(_dup)?_\d{1,9}", name)) is None:
            return
        name, is_transposed = end[1], is_transposed or end[2] is None
        yield name, is_transposed


def _prefix(
    path: str, names: Collection[str], parameters: Collection[str], prefix: str | None
) -> tuple[str, str]:
    """The prefix to remove from a file's names, or to add to them, to get parameter names."""
    # The prefixes of each suffix of a parameter name. With this table the time is linear; comparing
    # each entry with each parameter would be quadratic.
    ends = defaultdict[str, list[str]](list)
    for name in parameters:
        for start in _starts(name):
            ends[name.removeprefix(start)].append(start)
    agreeing = defaultdict[tuple[str, str], set[str]](set)
    for name in (candidate for entry in names for candidate, _ in _candidates(entry)):
        for start in _starts(name):
            if (rest := name.removeprefix(start)) in parameters:
                agreeing[start, ""].add(rest)
        for start in ends.get(name, ()):
            agreeing["", start].add(start + name)
    if prefix:
        prefix = prefix.rstrip(".") + "."
        agreeing = {k: v for k, v in agreeing.items() if prefix in k}  # type: ignore[assignment]
        if not agreeing:
            problem = f"no parameter has the name of an entry with or without the prefix {prefix!r}"
            raise EncodingsFileError(path, [problem])
    most = max(map(len, agreeing.values()), default=0)
    best = [key for key, matched in agreeing.items() if len(matched) == most]
    if not best or ("", "") in best:
        return "", ""
    if len(best) > 1:
        candidates = listed(sorted(removed or added for removed, added in best))
        problem = f"several prefixes make {most} of its names those of parameters: {candidates}"
        remedy = "Set model.prefix in the recipe (prefix= in Python)"
        raise EncodingsFileError(path, [f"{problem}. {remedy}"])
    return best[0]


def _starts(name: str) -> Iterator[str]:
    """Possible prefixes of a name: nothing, and up to eight modules."""
    parts = name.split(".", 8)
    return (".".join([*parts[:i], ""]) for i in range(len(parts)))


def _grid(
    model: nn.Module,
    name: str,
    entry: Entry,
    is_numbered: bool,
    file: EncodingsFile,
    block_order: BlockOrder | None,
) -> Encoding | None:
    """The encoding that an entry gives to a parameter; None if it stays float."""
    shape = _shape_out_in(model, name)
    if isinstance(entry, FloatEncoding):
        if entry.bitwidth < 16:
            kind = " (MXFP4)" if entry.format == "float4e2m1" and entry.block_size else ""
            raise SourceError(
                f"is a float of {entry.bitwidth} bits{kind}, not an integer encoding. Quantize it "
                f"to integers in AIMET, or set {_keeping(name)}"
            )
        return None
    if len(shape) < 2 and entry.bitwidth > 16:
        return None
    if not BITWIDTHS[0] <= entry.bitwidth <= (8 if len(shape) > 1 else BITWIDTHS[-1]):
        raise SourceError(
            f"has {entry.bitwidth} bits, but weights must have 2 to 8 bits (vectors up to 16). "
            f"Use fewer bits in AIMET, or set {_keeping(name)}"
        )
    is_conv1d, producer = _is_conv1d_weight(model, name), file.producer or {}
    of_onnx = producer.get("package") == "aimet-onnx" and file.version == "1.0.0"
    # aimet-onnx lists blocks by channel, however the tensor is stored; our own files for it say so.
    # aimet-torch's ONNX exporter lists them in memory order. It keeps the parameter's name only if
    # the tensor is [out, in], where both are the same.
    if block_order is None and (of_onnx or producer.get("block_order") == "channel"):
        block_order = "channel"
    elif block_order is None and is_numbered:
        block_order = "tensor"
    elif block_order is None and not is_conv1d and producer.get("package") == "aimet-torch":
        block_order = "channel"
    module = model.get_submodule(name.rpartition(".")[0])
    channel_axis = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
    layout = TensorLayout(shape, is_conv1d != is_numbered, channel_axis, block_order)
    return grid_of(entry, layout, file.version)


def _is_conv1d_weight(model: nn.Module, name: str) -> bool:
    layer, _, leaf = name.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(layer), Conv1D)


def _shape_out_in(model: nn.Module, name: str) -> tuple[int, ...]:
    shape = tuple(model.get_parameter(name).shape)
    return shape[::-1] if _is_conv1d_weight(model, name) else shape


def _keeping(name: str) -> str:
    """The setting that keeps a parameter or layer float, for the recipe and for Python."""
    return f"model.keep_float: [{name}] in the recipe (keep_float=[{name!r}] in Python)"


def _near(name: str, among: Sequence[str]) -> str:
    """The end of a message that suggests similar names."""
    # Layers with the same name first: most misspelled names differ only in their prefix.
    layer = name.split(".")[-2:-1]
    alike = [other for other in among if other.split(".")[-2:-1] == layer] or among
    near = near_names(name, alike[:200])
    return f" (near: {', '.join(near)})" if near else ""
