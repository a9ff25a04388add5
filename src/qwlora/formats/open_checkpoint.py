"""One door to all readers: a folder, a .gguf file, a float folder with an encodings file, or a base of our own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwlora.encodings.grids import BlockOrder
from qwlora.errors import SourceError
from qwlora.formats.aimet import AimetCheckpoint
from qwlora.formats.awq import AwqCheckpoint
from qwlora.formats.base_folder import RECORD
from qwlora.formats.checkpoint import Checkpoint
from qwlora.formats.compressed_tensors import CompressedTensorsCheckpoint
from qwlora.formats.gptq import GptqCheckpoint
from qwlora.formats.huggingface_folder import FloatCheckpoint
from qwlora.formats.qwlora_base import BaseCheckpoint
from qwlora.formats.safetensors_files import read_json

METHODS = {
    "gptq": GptqCheckpoint,
    "awq": AwqCheckpoint,
    "compressed-tensors": CompressedTensorsCheckpoint,
}
OLD_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}  # beside a config.json that says nothing


def open_checkpoint(
    path: str | Path,
    encodings: str | Path | None = None,
    *,
    keep_float: Sequence[str] = (),
    block_order: BlockOrder | None = None,
) -> Checkpoint:
    """The reader for what lies at `path`.

    Args:
        path: a folder with config.json and safetensors files, a .gguf file, or a base's folder.
        encodings: an AIMET encodings file for a folder of floats.
        keep_float: with `encodings`, globs of what stays float.
        block_order: with `encodings`, how version 1.0.0 lists blocks where that cannot be known.

    Raises:
        SourceError: nothing is there, the quantization is of a kind that is not read (named), or encodings are given for what is quantized already.
        EncodingsFileError: the encodings do not fit the model.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        if encodings is not None:
            raise SourceError(
                f"{str(path)!r} holds integers already; encodings belong to a folder of floats"
            )
        from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    if not path.is_dir():
        raise SourceError(f"{str(path)!r} is neither a folder nor a .gguf file")
    if (path / RECORD).is_file():
        if encodings is not None:
            raise SourceError(
                f"{str(path)!r} is a QWLoRA base, which has its encodings; those of a file belong to a folder of floats"
            )
        return BaseCheckpoint(path)
    method, settings = quantization_of(path)
    if method is None:
        return (
            FloatCheckpoint(path)
            if encodings is None
            else AimetCheckpoint(path, encodings, keep_float, block_order)
        )
    if encodings is not None:
        raise SourceError(
            f"{str(path)!r} is quantized already ({method}); encodings belong to a folder of floats"
        )
    if method not in METHODS:
        raise SourceError(
            f"{str(path)!r}: quant_method {method!r} is not read; {', '.join(METHODS)}, GGUF files and floats with AIMET encodings are. "
            "Quantize the float model instead"
        )
    return METHODS[method](path, settings)


def quantization_of(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """The quantization method of a folder, None if it holds floats, and its settings.

    Raises:
        SourceError: config.json cannot be read, or says in no known way how it is quantized.
    """
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    places = [config, text if isinstance(text, dict) else {}]
    settings: Any = next(
        (
            part[key]
            for part in places
            for key in ("quantization_config", "compression_config")
            if part.get(key)
        ),
        None,
    )
    if settings is None:
        for file, old_method in OLD_FILES.items():
            if (folder / file).is_file():
                return old_method, read_json(folder / file)
        return None, {}
    if not isinstance(settings, dict):
        raise SourceError(
            f"{str(folder / 'config.json')!r}: quantization_config is {json.dumps(settings)[:80]}; an object is needed"
        )
    method = settings.get("quant_method")
    if method is None and "config_groups" in settings:
        method = "compressed-tensors"
    return str(method), settings
