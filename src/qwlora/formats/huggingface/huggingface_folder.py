"""Hugging Face folders as `Checkpoint`.

`FolderCheckpoint` reads config.json and maps stored names to the model's parameters. A format only
supplies a `FormatReader`, which reads tensors under the float model's names
(`model.layers.0.mlp.down_proj.weight`), however the files store them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qwlora.errors import GridError, SourceError
from qwlora.formats.checkpoint import (
    MappedCheckpoint,
    Origin,
    convert_quantized,
    empty_model,
    find_origins,
    quantized_of,
)
from qwlora.formats.huggingface.model_config import read_config
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.grid.encoding import QuantizedTensor


class FormatReader:
    """The tensors of `files` under the float model's names; this class reads floats.

    A subclass reads layers of integers. Its `parts` are the stored tensors of a layer, after the
    layer's name; its `markers`, those that only a layer of integers has.

    Attributes:
        layer_of: the layer of each weight that is stored as integers, by the weight's name.
        module_of: the model's name for a stored layer, and its module if there is one.
    """

    label = "float"
    parts: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()

    def __init__(self, files: SafetensorsFiles):
        self.files = files
        named = (name.rpartition(".") for name in files.names())
        layers = [layer for layer, _, part in named if part in self.markers]
        self.layer_of = {f"{layer}.weight": layer for layer in layers}
        # The checkpoint sets it once it has the model, which needs the names and shapes from here.
        self.module_of: Callable[[str], tuple[str, nn.Module | None]] = lambda layer: (layer, None)

    def where(self, layer: str) -> str:
        return f"{str(self.files.folder)!r}: layer {layer!r} ({self.label})"

    def settings_error(self, problem: str) -> SourceError:
        return SourceError(f"{str(self.files.folder)!r}, quantization_config: {problem}")

    def group_count(self, layer: str, in_features: int, size: float) -> int:
        """The number of groups of `size` inputs in a row, which they must divide evenly."""
        if size < 1 or size % 1 or in_features % size:
            raise SourceError(
                f"{self.where(layer)}: groups of {size:g} do not divide rows of {in_features} "
                "evenly, but all blocks must have the same size. Quantize the float model instead"
            )
        return in_features // int(size)

    def quantized(
        self, layer: str, bitwidth: int, codes: Tensor, scale: Tensor, low_end: Tensor
    ) -> QuantizedTensor:
        try:
            return quantized_of(bitwidth, codes, scale, low_end)
        except GridError as error:
            raise SourceError(f"{self.where(layer)}: {error}") from error

    def names(self) -> list[str]:
        parts = {f"{layer}.{part}" for layer in self.layer_of.values() for part in self.parts}
        hidden = parts | self.layer_of.keys()
        return [*self.layer_of, *(name for name in self.files.names() if name not in hidden)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the values, `[out, in]` for integers."""
        layer = self.layer_of.get(name)
        return self.files.shape(name) if layer is None else self.layer_shape(layer)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        layer = self.layer_of.get(name)
        return self.files.read(name) if layer is None else self.read_layer(layer)

    def layer_shape(self, layer: str) -> tuple[int, ...]:
        """`[out, in]` of a layer of integers, after checking that its tensors fit each other."""
        raise NotImplementedError

    def read_layer(self, layer: str) -> QuantizedTensor:
        raise NotImplementedError


class FolderCheckpoint(MappedCheckpoint):
    """A checkpoint in a Hugging Face folder; `reader` makes the format's reader of its files.

    Raises:
        SourceError: the configuration cannot be read, a parameter of its model is missing, a stored
            tensor is not a parameter of the model, or a shape differs.
    """

    def __init__(
        self, folder: str | Path, reader: Callable[[SafetensorsFiles], FormatReader] = FormatReader
    ):
        self.path = Path(folder)
        # Mapping would gain nothing: most tensors are read once, and then unpacked or converted.
        self.files = SafetensorsFiles(self.path, mapped=False)
        self.stored = reader(self.files)
        self.stored.module_of = self._module_of
        self.config = read_config(self.path)
        try:
            self.model = empty_model(self.config, buffers=False)
        except SourceError as error:
            raise self._error(str(error)) from error
        stored = {name: self.stored.shape(name) for name in self.stored.names()}
        by_target, unknown = find_origins(self.model, stored, repr(str(self.path)))
        self._place_(by_target, [name for name in unknown if not self._is_empty_bias(name)])
        for origin in self.origins:
            module = self.model.get_submodule(origin.target.rpartition(".")[0])
            expected = tuple(self.model.get_parameter_or_buffer(origin.target).shape)
            # Integers are stored as [out, in], the weight of a Conv1D is [in, out].
            turned = expected[::-1] if isinstance(module, Conv1D) else expected
            if origin.shape not in (expected, turned):
                raise self._error(
                    f"{origin.target!r} has shape {list(origin.shape or ())} in the files, but "
                    f"{list(expected)} in the model that config.json describes; download the model "
                    "again"
                )

    def _module_of(self, stored: str) -> tuple[str, nn.Module | None]:
        for origin in self.origins:
            if not origin.operations and origin.sources[0] == f"{stored}.weight":
                path = origin.target.rpartition(".")[0]
                return path, self.model.get_submodule(path)
        # The model has fused the layer into a larger one: it is an expert.
        return stored, None

    def _converted(self, origin: Origin) -> Tensor | QuantizedTensor:
        parts = {stored: self.stored.read(stored) for stored in origin.sources}
        integers = {name: part for name, part in parts.items() if isinstance(part, QuantizedTensor)}
        floats = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
        if floats and integers:
            raise self._error(
                f"parameter {origin.target!r} is stored in several tensors, some float and some "
                f"integer ({next(iter(floats))} is float and {next(iter(integers))} integers). "
                "Quantize the float model instead"
            )
        if floats:
            return origin.convert(floats)
        return convert_quantized(origin, integers, repr(str(self.path)))

    def _is_empty_bias(self, name: str) -> bool:
        # GPTQ tools write a bias of zeros for every layer, also where the model has none.
        if not name.endswith(".bias"):
            return False
        value = self.stored.read(name)
        return isinstance(value, Tensor) and not bool(value.any())
