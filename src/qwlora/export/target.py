"""Export targets: each writes a simulation as files of one runtime, and opens them there.

A new target costs a module with a class that satisfies `Target` and one entry in `TARGETS`. This
module and the modules of the targets import neither torch nor the packages of any runtime, because
recipes are validated against the registry before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from qwlora.export.onnx_target import OnnxTarget
from qwlora.system.optional_packages import require

if TYPE_CHECKING:
    from qwlora.export.verify import Runtime
    from qwlora.graph.quantized_graph import QuantizedGraph


class Target(Protocol):
    """One kind of exported files."""

    @property
    def extra(self) -> str:
        """The extra of this package that installs `packages`."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Modules that `write` and `open` import."""

    @property
    def activation_bitwidths(self) -> tuple[int, ...]:
        """Bitwidths of activations that the files can express."""

    @property
    def model_files(self) -> str:
        """Glob of the files that hold the model; their total size is reported."""

    def write(self, graph: QuantizedGraph, folder: Path, metadata: Mapping[str, str]) -> None:
        """Write the files of `graph` into `folder`.

        Raises:
            ExportError: the files cannot express the graph.
        """

    def open(self, folder: Path) -> Runtime:
        """The files in `folder`, opened in the target's runtime.

        Raises:
            ExportError: the runtime refuses them.
        """


TARGETS: dict[str, Target] = {"onnx": OnnxTarget()}


def require_packages(target: Target) -> None:
    """Import everything that `target` needs.

    Raises:
        MissingExtraError: a package is missing; the message names the extra that installs it.
    """
    for package in target.packages:
        require(package, target.extra)
