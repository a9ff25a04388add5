"""`open_checkpoint` returns the reader that fits a folder or file, by its config.json or suffix."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qwlora.encodings.model import BlockOrder
from qwlora.errors import SourceError
from qwlora.formats.aimet import AimetCheckpoint
from qwlora.formats.base_files import RECORD
from qwlora.formats.checkpoint import Checkpoint
from qwlora.formats.huggingface.compressed_tensors import CompressedTensorsCheckpoint
from qwlora.formats.huggingface.huggingface_folder import FloatCheckpoint
from qwlora.formats.huggingface.mlx import MlxCheckpoint
from qwlora.formats.huggingface.qweight import QweightCheckpoint
from qwlora.formats.huggingface.safetensors_files import read_json
from qwlora.formats.qwlora_base import BaseCheckpoint
from qwlora.formats.user_path import looked_for

METHODS: dict[str, Callable[[Path, dict[str, Any]], Checkpoint]] = {
    "gptq": partial(QweightCheckpoint, method="gptq"),
    "awq": partial(QweightCheckpoint, method="awq"),
    "compressed-tensors": CompressedTensorsCheckpoint,
    "mlx": MlxCheckpoint,
}
OLD_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
"""Older quantizers wrote these files instead of a `quantization_config` in config.json."""


def open_checkpoint(
    path: str | Path,
    encodings: str | Path | None = None,
    *,
    keep_float: Sequence[str] = (),
    block_order: BlockOrder | None = None,
) -> Checkpoint:
    """Open a checkpoint with the reader for its format.

    Args:
        path: a folder with config.json and safetensors files, a .gguf file, or a QWLoRA base.
        encodings: an AIMET encodings file that belongs to the float model in `path`.
        keep_float: with `encodings`, globs of the parameters or layers that stay float.
        block_order: with `encodings`, the order of blocks in files of version 1.0.0 that do not
            determine it.

    Raises:
        SourceError: the path does not exist, its quantization method is not supported, or
            `encodings` is given although the checkpoint is quantized.
        EncodingsFileError: the encodings do not fit the model.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        if encodings is not None:
            raise SourceError(
                f"{str(path)!r} holds integers already. Give encodings only with a float model"
            )
        from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    if not path.is_dir():
        raise SourceError(
            f"{str(path)!r} is neither a folder nor a .gguf file{looked_for(str(path), path)}"
        )
    if (path / RECORD).is_file():
        if encodings is not None:
            raise SourceError(
                f"{str(path)!r} is a QWLoRA base, which has encodings. "
                "Give an encodings file only with a float model"
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
            f"{str(path)!r} is quantized already ({method}). Give encodings only with a float model"
        )
    if method not in METHODS:
        raise SourceError(
            f"{str(path)!r}: quant_method {method!r} is not supported; {', '.join(METHODS)}, GGUF "
            "files and float models with AIMET encodings are. Quantize the float model instead"
        )
    return METHODS[method](path, settings)


def quantization_of(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """The quantization method of a folder (None for a float model) and its settings.

    Raises:
        SourceError: config.json cannot be read, or its `quantization_config` is not an object.
    """
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    places = [config, text if isinstance(text, dict) else {}]
    settings: Any = next(
        (
            part[key]
            for part in places
            for key in ("quantization_config", "compression_config", "quantization")
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
            f"{str(folder / 'config.json')!r}: quantization_config must be an object, but is "
            f"{json.dumps(settings)[:80]}. Download the file again"
        )
    method = settings.get("quant_method")
    if method is None and "config_groups" in settings:
        method = "compressed-tensors"
    elif method is None and {"bits", "group_size"} <= settings.keys():
        method = "mlx"  # mlx-lm names no method
    return str(method), settings
