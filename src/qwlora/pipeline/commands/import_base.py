"""Write the integers that a quantized checkpoint holds as a base folder, without a job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwlora.errors import SourceError
from qwlora.formats.assemble_model import load_precomputed
from qwlora.formats.base_folder import save_base
from qwlora.formats.model_card import public_name
from qwlora.formats.model_source import fetch, load_tokenizer
from qwlora.formats.open_checkpoint import open_checkpoint
from qwlora.quantize.quantize_model import BaseSize, base_size
from qwlora.system.progress import Track, untracked


def import_base(
    source: str,
    folder: Path,
    encodings: Path | None = None,
    *,
    keep_float: Sequence[str] = (),
    track: Track = untracked,
) -> tuple[str, BaseSize]:
    """Write the integers of `source` to `folder`; returns the base's fingerprint and size.

    Args:
        source: a checkpoint, as `model.source` of a recipe takes it.
        folder: an empty folder.
        encodings: AIMET encodings of a float checkpoint whose weights lie on their grid.
        keep_float: with `encodings`, globs of parameters or layers that stay float.

    Raises:
        SourceError: the checkpoint cannot be read, or is float and no encodings are given.
        EncodingsFileError: the encodings do not fit the model.
    """
    location = fetch(source)
    if encodings is None and location.holds_floats and not location.gguf_file:
        raise SourceError(
            f"model {source!r} is a float model, which has no integers to import. Give the AIMET "
            "encodings that its weights lie on with --encodings, or quantize it: qwlora init"
        )
    checkpoint = open_checkpoint(location.path, encodings, keep_float=keep_float)
    tokenizer = load_tokenizer(source)
    model = load_precomputed(checkpoint, track)
    return save_base(model, folder, tokenizer, source=public_name(source)), base_size(model)
