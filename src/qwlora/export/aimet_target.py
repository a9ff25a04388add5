"""The `aimet` target: the `.aimet` folder that Qualcomm AI Hub and aimet-onnx take.

Imports torch and ONNX packages only when it writes or opens files (see `target.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qwlora.export.bundle_contents import GOLDEN_FILES, SIMULATED_ADAPTER, Contents
from qwlora.export.held_schemes import encodings_problem
from qwlora.export.target import ExportedGraph, GraphTarget

if TYPE_CHECKING:
    from torch import Tensor

    from qwlora.data.sequences import Sequences
    from qwlora.export.float_graphs import FloatGraphs
    from qwlora.export.graph_parity import GraphsParity
    from qwlora.export.verify import LanguageModelParity, Reference, Runtime
    from qwlora.grid.scheme import Scheme
    from qwlora.progress import Track


class AimetTarget(GraphTarget):
    """`write_aimet` and `FloatOnnxModel` as a target."""

    extra = "onnx"
    packages = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
    activation_bitwidths = (8, 16)
    model_files = "*.aimet/*"
    contents = Contents(
        adapter=(
            "*.aimet/model.onnx",
            "*.aimet/model.data",
            "*.aimet/model.encodings",
            "*_host.onnx",
            "graphs.json",
            "submit_aihub.py",
            *GOLDEN_FILES,
            *SIMULATED_ADAPTER,
        )
    )
    fixed_shapes = True
    cached_graphs = "asked"
    has_proof = True

    def loading(self, base: str, adapter: str | None) -> str:
        if adapter is None:
            return ""
        return (
            f"Base and adapter are one model, `{adapter}/*.aimet`, for AI Hub and aimet-onnx. "
            f"`{adapter}/README.md` has the commands."
        )

    def problem(self, scheme: Scheme) -> str | None:
        return encodings_problem(scheme)

    def write(self, exported: ExportedGraph, folder: Path) -> None:
        from qwlora.export.aimet_folder import write_aimet, write_aimet_graphs

        if exported.graphs:
            write_aimet_graphs(exported, folder)
        else:
            write_aimet(exported, folder)

    def open(self, folder: Path) -> Runtime:
        from qwlora.export.aimet_folder import open_aimet

        return open_aimet(folder)

    def logits(self, folder: Path, steps: int = 0) -> Callable[[Tensor], Tensor]:
        graphs = _graphs(folder)
        return super().logits(folder) if graphs is None else partial(graphs.logits, steps=steps)

    def call_tokens(self, folder: Path, sequence: int) -> int | None:
        from qwlora.export.cached_graphs import has_graphs, largest_call

        return largest_call(folder) if has_graphs(folder) else sequence

    def layers(
        self, folder: Path, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        graphs = _graphs(folder)
        if graphs is None:
            return super().layers(folder, tensors)
        return graphs.layers_of(tensors)

    def verify(
        self,
        folder: Path,
        simulation: Reference,
        text: Sequences,
        layer_tokens: int,
        track: Track,
    ) -> LanguageModelParity | GraphsParity:
        graphs = _graphs(folder)
        if graphs is None:
            return super().verify(folder, simulation, text, layer_tokens, track)
        from qwlora.export.graph_parity import verify_graphs

        return verify_graphs(graphs, simulation, text)


def _graphs(folder: Path) -> FloatGraphs | None:
    """The graphs with a cache in a folder, after all checks; None if it has one whole model."""
    from qwlora.export.aimet_folder import open_aimet_graphs
    from qwlora.export.cached_graphs import has_graphs

    return open_aimet_graphs(folder) if has_graphs(folder) else None
