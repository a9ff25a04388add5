"""A QWLoRA base as a `Checkpoint`, so that another job can freeze the same integers again.

Each tensor is read and checked against its digest in base.json. To load the base as a model, use
`base_folder.load_base`.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qwlora.errors import GridError, SourceError
from qwlora.formats.base_files import BaseFiles, read_layers
from qwlora.formats.checkpoint import ShownCheckpoint
from qwlora.formats.huggingface.model_config import read_config
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.nn.packed_tensor import PackedTensor, Parts
from qwlora.parameter_names import parameter_name


class BaseCheckpoint(BaseFiles, ShownCheckpoint):
    """The tensors of the base in `folder`.

    Raises:
        SourceError: the folder is not a base, has another format version, or cannot be read.
        GridError: base.json describes an invalid layer.
        FingerprintError: the configuration or tokenizer was changed after saving.
    """

    def __init__(self, folder: str | Path):
        super().__init__(Path(folder))
        self.path = self.folder
        self.layers = {
            parameter_name(path): (path, *layer)
            for path, layer in read_layers(self.record, self.where).items()
        }
        self.config = read_config(self.folder, len(self.files.names()))
        parts = {
            f"{path}.{part}": name
            for name, (path, *_) in self.layers.items()
            for part in Parts._fields
        }
        self.stored: dict[str, list[str]] = {}
        for found in self.files.names():
            self.stored.setdefault(parts.get(found, found), []).append(found)

    def names(self) -> list[str]:
        """Names of parameters and saved buffers, tied tensors once."""
        return list(self.stored)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """One parameter or saved buffer.

        Raises:
            SourceError: there is no such tensor, or one of its stored parts is missing or has the
                wrong shape.
            FingerprintError: it was changed after saving.
            GridError: its scales or offsets are invalid.
        """
        if name not in self.stored:
            raise SourceError(f"{self.where}: there is no tensor {name!r}")
        if name not in self.layers:
            return self.checked(name, "")
        path, scheme, shape = self.layers[name]
        found = {
            stored.rpartition(".")[2]: self.checked(stored, scheme.to_text())
            for stored in self.stored[name]
        }
        expected = PackedTensor.empty(scheme, shape, "meta").parts
        for part, tensor in zip(Parts._fields, expected, strict=True):
            have, want = (None if t is None else list(t.shape) for t in (found.get(part), tensor))
            if have != want:
                raise SourceError(
                    f"{self.where}: {path}.{part} is {have or 'missing'}, but {scheme} needs "
                    f"{want or 'none'}; quantize again"
                )
        try:
            return PackedTensor(scheme, shape[-1], Parts(**found)).quantized
        except GridError as error:
            raise GridError(f"{self.where}: layer {path}: {error}; quantize again") from error
