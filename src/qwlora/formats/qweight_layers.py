"""The layer naming that GPTQ and AWQ files share: `LAYER.qweight`, `LAYER.scales` and others are
stored instead of `LAYER.weight`."""

from __future__ import annotations

from collections.abc import Sequence

from qwlora.formats.safetensors_files import SafetensorsFiles


class LayerFiles:
    """Maps the stored tensors of quantized layers to the float model's names.

    Args:
        files: the stored tensors.
        parts: the suffixes of a quantized layer's tensors, including `qweight`.
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
