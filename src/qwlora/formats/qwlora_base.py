"""A QWLoRA base as a `Checkpoint`, so that another job can freeze the same integers again.

Each tensor is read and checked against its digest in base.json. To load the base as a model, use
`base_folder.load_base`.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from qwlora.errors import FingerprintError, GridError, SourceError
from qwlora.formats.base_files import STEM, check_files, read_layers, read_record
from qwlora.formats.checkpoint import ShownCheckpoint
from qwlora.formats.huggingface.model_config import read_config
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.nn.fingerprint import tensor_digest
from qwlora.nn.packed_tensor import PackedTensor, Parts
from qwlora.parameter_names import parameter_name


class BaseCheckpoint(ShownCheckpoint):
    """The tensors of the base in `folder`.

    Raises:
        SourceError: the folder is not a base, has another format version, or cannot be read.
        GridError: base.json describes an invalid layer.
        FingerprintError: the configuration or tokenizer was changed after saving.
    """

    def __init__(self, folder: str | Path):
        self.folder = self.path = Path(folder)
        self._where = f"base {str(folder)!r}"
        self.record = read_record(self.folder)
        check_files(self.folder)
        self.files = SafetensorsFiles(self.folder, STEM)
        self.layers = {
            parameter_name(path): (path, *found)
            for path, found in read_layers(self.record, self._where).items()
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
            raise SourceError(f"{self._where}: there is no tensor {name!r}")
        if name not in self.layers:
            return self._checked(name, "")
        path, scheme, shape = self.layers[name]
        found = {
            stored.rpartition(".")[2]: self._checked(stored, scheme.to_text())
            for stored in self.stored[name]
        }
        expected = PackedTensor.empty(scheme, shape, "meta").parts
        for part, tensor in zip(Parts._fields, expected, strict=True):
            have, want = (None if t is None else list(t.shape) for t in (found.get(part), tensor))
            if have != want:
                raise SourceError(
                    f"{self._where}: {path}.{part} is {have or 'missing'}, but {scheme} needs "
                    f"{want or 'none'}; quantize again"
                )
        try:
            return PackedTensor(scheme, shape[-1], Parts(**found)).quantized
        except GridError as error:
            raise GridError(f"{self._where}: layer {path}: {error}; quantize again") from error

    def _checked(self, stored: str, layout: str) -> Tensor:
        tensor = self.files.read(stored)
        if tensor_digest(stored, layout, tensor) != self.record["tensors"].get(stored):
            raise FingerprintError(
                f"{self._where}: {stored} changed after saving. Copy it again, or quantize again"
            )
        return tensor
