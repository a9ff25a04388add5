"""`open_checkpoint` returns the reader that fits a folder or file, by its config.json or suffix;
`load_precomputed` builds its model, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from qwlora.errors import SourceError
from qwlora.formats.aimet import AimetCheckpoint
from qwlora.formats.aimet_encodings.model import BlockOrder
from qwlora.formats.base_files import RECORD, BaseCheckpoint, save_as_base_
from qwlora.formats.checkpoint import Checkpoint, LazyModel
from qwlora.formats.huggingface.compressed_tensors import CompressedTensors
from qwlora.formats.huggingface.gptq_awq_mlx import MlxTensors, QweightTensors
from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint, FormatReader
from qwlora.formats.model_source import looked_for, quantization_of
from qwlora.nn.fingerprint import remember_base_
from qwlora.system.progress import Track, untracked

METHODS: dict[str, Callable[..., FormatReader]] = {
    "gptq": partial(QweightTensors, method="gptq"),
    "awq": partial(QweightTensors, method="awq"),
    "compressed-tensors": CompressedTensors,
    "mlx": MlxTensors,
}


def open_checkpoint(
    path: str | Path,
    encodings: str | Path | None = None,
    *,
    keep_float: Sequence[str] = (),
    block_order: BlockOrder | None = None,
    prefix: str | None = None,
) -> Checkpoint:
    """Open a checkpoint with the reader for its format.

    Args:
        path: a folder with config.json and safetensors files, a .gguf file, or a QWLoRA base.
        encodings: an AIMET encodings file that belongs to the float model in `path`.
        keep_float: with `encodings`, globs of the parameters or layers that stay float.
        block_order: with `encodings`, the order of blocks in files of version 1.0.0 that do not
            determine it.
        prefix: with `encodings`, the prefix that names have only in the file or only in the model.
            Default: determined from the names.

    Returns:
        The checkpoint. Its tensors are not read yet.

    Raises:
        SourceError: the path does not exist, its quantization method is not supported, or
            `encodings` is given although the checkpoint is quantized.
        EncodingsFileError: the encodings do not fit the model.
    """
    path = Path(path)
    is_gguf, is_base = path.suffix == ".gguf", (path / RECORD).is_file()
    if not is_gguf and not path.is_dir():
        where = looked_for(str(path), path)
        raise SourceError(f"{str(path)!r} is neither a folder nor a .gguf file{where}")
    method, settings = (None, {}) if is_gguf or is_base else quantization_of(path)
    kind = "GGUF" if is_gguf else "a base" if is_base else method
    if encodings is not None and kind is not None:
        raise SourceError(
            f"{str(path)!r} is quantized already ({kind}). Give encodings only with a float model"
        )
    if is_gguf:
        # Not above: the gguf package is optional.
        from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    if is_base:
        return BaseCheckpoint(path)
    if encodings is not None:
        return AimetCheckpoint(path, encodings, keep_float, block_order, prefix)
    if method is None:
        return FolderCheckpoint(path)
    if method not in METHODS:
        raise SourceError(
            f"{str(path)!r}: quant_method {method!r} is not supported; {', '.join(METHODS)}, GGUF "
            "files and float models with AIMET encodings are. Quantize the float model instead"
        )
    return FolderCheckpoint(path, lambda files: METHODS[method](files, settings))


def load_precomputed(checkpoint: Checkpoint, track: Track = untracked) -> PreTrainedModel:
    """Build the model of `checkpoint`, with packed layers wherever the checkpoint has integers.

    Raises:
        SourceError: tensors are missing or unknown (the message lists them), have the wrong shape,
            or cannot be read.
    """
    lazy = LazyModel(checkpoint)
    lazy.materialize_(track=track)
    remember_base_(lazy.model)
    save_as_base_(lazy.model)
    return lazy.model
