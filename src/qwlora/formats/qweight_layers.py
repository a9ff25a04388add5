"""What GPTQ's and AWQ's files have in common: a quantized layer is a handful of tensors, `LAYER.qweight` and others, that stand for `LAYER.weight`."""

from __future__ import annotations

from collections.abc import Sequence

from qwlora.formats.safetensors_files import SafetensorsFiles


class LayerFiles:
    """Names of `files` as the float model has them.

    Args:
        parts: the last parts of the names of a layer's tensors; `qweight` is one.
    """

    def __init__(self, files: SafetensorsFiles, parts: Sequence[str]):
        self.files = files
        self.parts = parts
        self.layer_of = {
            f"{name.removesuffix('.qweight')}.weight": name.removesuffix(".qweight")
            for name in files.names()
            if name.endswith(".qweight")
        }

    def names(self) -> list[str]:
        """Names of the float model's tensors."""
        layers = set(self.layer_of.values())
        kept = [
            n
            for n in self.files.names()
            if n.rpartition(".")[0] not in layers or n.rpartition(".")[2] not in self.parts
        ]
        return [*self.layer_of, *kept]
