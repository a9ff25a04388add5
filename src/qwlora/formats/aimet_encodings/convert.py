"""Convert an encodings file to another version, without losing or inventing anything.

Versions 0.6.1 and 1.0.0 list parameters in their own section, but store no axes. 2.0.0 and 2.1.0
store axes, but have no sections. Only the model could tell what is missing, so files are converted
only within a pair:

    0.6.1 to 1.0.0, 2.1.0 to 2.0.0    nothing is lost
    1.0.0 to 0.6.1    lost: block sizes (blocks become channels), LPBQ, and whether one scale in a
                      list is a channel's or the tensor's
    2.0.0 to 2.1.0    lost: LPBQ without one scale for each channel of a single axis
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import fields

from qwlora.errors import ConversionError, listed
from qwlora.formats.aimet_encodings.documents import printable
from qwlora.formats.aimet_encodings.model import (
    VERSIONS,
    EncodingsFile,
    Entry,
    FloatEncoding,
    IntegerEncoding,
    LpbqEncoding,
    has_axes,
)


def convert(file: EncodingsFile, version: str, lossy: bool = False) -> EncodingsFile:
    """`file` in another version.

    Args:
        version: one of `VERSIONS`.
        lossy: drop what the version cannot express, including whole encodings, instead of raising.

    Raises:
        ConversionError: the version is unknown or in the other pair, or information would be lost
            and `lossy` is False.
    """
    if version not in VERSIONS:
        problem = f"version {printable(str(version))!r} is not one of {', '.join(VERSIONS)}"
        raise ConversionError(problem)
    what = f"encodings {file.version} -> {version}"
    if has_axes(version) != (file.parameters is None):
        needed = "the axes of scales" if has_axes(version) else "which encodings are parameters"
        raise ConversionError(
            f"{what}: the file does not store {needed}. Export the model again in version {version}"
        )
    kept: list[Entry] = []
    names_of = defaultdict[str, list[str]](list)  # by what they lose
    for entry in file.encodings:
        stored = _stored(entry, version)
        for part in _lost(entry, stored):
            names_of[part].append(printable(entry.name))
        kept += [] if stored is None else [stored]
    if names_of and not lossy:
        lost = [f"{listed(names, 3)}: {part}" for part, names in names_of.items()]
        raise ConversionError(what, lost)
    parameters = file.parameters and file.parameters & {entry.name for entry in kept}
    return file.replace(version=version, encodings=tuple(kept), parameters=parameters)


def _stored(entry: Entry, version: str) -> Entry | None:
    """The part of an encoding that a version can store; None if it can store nothing."""
    nested, is_oldest = has_axes(version), version == "0.6.1"
    match entry:
        case FloatEncoding():
            return entry if nested == (entry.format is not None) else None
        case LpbqEncoding() if nested:
            axis, scales = entry.channel_axis, entry.channel_scale.size
            is_per_channel = axis is not None and scales == entry.block_scale.shape[axis]
            if entry.axis is None or (version == "2.1.0" and not is_per_channel):
                return None
            return entry.replace(decompressed_bitwidth=None)
        case LpbqEncoding():
            is_flat = entry.axis is None and entry.decompressed_bitwidth is not None
            return entry if is_flat and not is_oldest else None
        case IntegerEncoding() if nested:
            has_axis = entry.axis is not None or entry.granularity == "tensor"
            # 2.x has no field for it: a reader sees only whether every zero point is at the center.
            return entry.replace(symmetric=entry.is_centered) if has_axis else None
    is_tensor = entry.granularity == "tensor" or (is_oldest and entry.scale.size == 1)
    scale, offset = (v.reshape(() if is_tensor else -1) for v in (entry.scale, entry.offset))
    size = None if is_oldest else entry.block_size
    return entry.replace(scale=scale, offset=offset, signed=None, axis=None, block_size=size)


def _lost(entry: Entry, stored: Entry | None) -> list[str]:
    """The fields of an encoding that a version cannot store."""
    if stored is None:
        kind = {IntegerEncoding: "integers", LpbqEncoding: "LPBQ", FloatEncoding: "floats"}
        name = f" ({entry.format})" if isinstance(entry, FloatEncoding) and entry.format else ""
        return [f"the whole encoding, {kind[type(entry)]} of {entry.bitwidth} bits{name}"]
    if entry.granularity != stored.granularity:
        return [f"granularity {entry.granularity}"]
    keys = [field.name for field in fields(entry) if field.name not in entry.arrays]
    values = {key: getattr(entry, key) for key in keys}
    return [f"{k} {v}" for k, v in values.items() if v not in (None, getattr(stored, k))]
