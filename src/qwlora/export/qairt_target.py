"""The `qairt` target: one base and many LoRA use cases for Qualcomm's QAIRT converter and importer.

Imports torch and ONNX packages only when it writes or opens files (see `target.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwlora.export.held_schemes import encodings_problem
from qwlora.export.target import ExportedUseCases, UseCasesTarget

if TYPE_CHECKING:
    from qwlora.export.verify import Runtime
    from qwlora.grid.scheme import Scheme


class QairtTarget(UseCasesTarget):
    """`write_qairt` and `open_qairt` as a target."""

    extra = "onnx"
    packages = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
    activation_bitwidths = (8, 16)

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

    def open(self, folder: Path, case: str) -> Runtime:
        from qwlora.export.qairt_check import open_qairt

        return open_qairt(folder, case)
