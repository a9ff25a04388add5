"""The `qairt` target: one base and many LoRA use cases for Qualcomm's QAIRT converter and importer.

Imports torch and ONNX packages only when it writes or opens files (see `target.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qwlora.export.held_schemes import encodings_problem
from qwlora.export.target import ExportedUseCases, UseCasesTarget

if TYPE_CHECKING:
    from torch import Tensor

    from qwlora.data.sequences import Sequences
    from qwlora.export.verify import LanguageModelParity, Reference
    from qwlora.grid.scheme import Scheme
    from qwlora.progress import Track


class QairtTarget(UseCasesTarget):
    """`write_qairt` and `open_qairt` as a target."""

    extra = "onnx"
    packages = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
    activation_bitwidths = (8, 16)
    reserved = frozenset({"none", "base", "base_v3", "model"})

    def loading(self, base: str, adapter: str | None) -> str:
        return (
            f"`{base}` holds base and adapters together, as use cases, for Qualcomm's converter "
            "and LoRA importer."
        )

    def problem(self, scheme: Scheme) -> str | None:
        return encodings_problem(scheme)

    def write(self, exported: ExportedUseCases, folder: Path) -> None:
        from qwlora.export.qairt_folder import write_qairt

        write_qairt(exported, folder)

    def logits(self, folder: Path, case: str) -> Callable[[Tensor], Tensor]:
        from qwlora.export.qairt_check import open_qairt
        from qwlora.export.verify import runtime_logits

        return open_qairt(folder, case).logits

    def layers(
        self, folder: Path, case: str, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        from qwlora.export.qairt_check import open_qairt

        return tensors, open_qairt(folder, case).layers(tensors)

    def verify(
        self, folder: Path, case: str, simulation: Reference, text: Sequences, track: Track
    ) -> LanguageModelParity:
        from qwlora.export.qairt_check import open_qairt
        from qwlora.export.verify import verify_language_model

        tokens = text.input_ids.shape[1]  # shapes are fixed
        return verify_language_model(open_qairt(folder, case), simulation, text, tokens, track)
