"""What an export target is: it writes files for one runtime, and opens them there.

    GraphTarget      the simulation of one adapter as one model: activations on their grids
    UseCasesTarget   the same for all adapters and combinations of them, on one base
    WeightsTarget    the base's integers once, and adapters beside it: a runtime switches them

A new target costs a module with one of these and an entry in `registry.py`. None of these modules
imports torch or the packages of a runtime before it is used, because recipes are validated against
the registry before anything heavy is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwlora.errors import MissingExtraError
from qwlora.system.optional_packages import require

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qwlora.export.canonical_adapter import CanonicalAdapter
    from qwlora.export.verify import Reference, Runtime
    from qwlora.export.verify_weights import WeightsRuntime
    from qwlora.grid.scheme import Scheme
    from qwlora.simulation.shared_encodings import BaseActivations


class Target(ABC):
    """Files for one runtime; see the subclasses.

    Attributes:
        extra: the extra of this package that installs `packages`.
        packages: modules that are imported to open the files, and for a graph also to write them.
        has_float16_scales: whether the files hold scales as float16.
        writes_float_embeddings: whether embeddings are written as the floats that codes stand for.
    """

    extra: str
    packages: tuple[str, ...]
    has_float16_scales = False
    writes_float_embeddings = False

    def problem(self, scheme: Scheme) -> str | None:
        """Why the files cannot hold integers of a scheme, and what they can; None if they can."""
        return None

    def conflict(self, schemes: Collection[Scheme]) -> str | None:
        """Why the files cannot hold layers of all these schemes together; None if they can."""
        return None

    def source_problem(self, source: Path) -> str | None:
        """Why a model from `source` cannot be written, whatever its grid; None if it can."""
        return None

    def keeps(self, source: Path) -> bool:
        """Whether a base with the integers of `source` is written as it is, whatever its grid."""
        return False

    def require_packages(self) -> None:
        """Import `packages`.

        Raises:
            MissingExtraError: one is missing; the message names the extra that installs it.
        """
        for package in self.packages:
            require(package, self.extra)

    def loading(self, base: str, adapter: str | None) -> str:
        """How a program loads the files, in Markdown; empty if there is nothing to show.

        Args:
            base: the folder of the base. A graph target has none and ignores it.
            adapter: the folder of an adapter; None: the base alone.
        """
        return ""

    def missing(self) -> str | None:
        """Which package is missing, and how to install it; None if all are there."""
        try:
            self.require_packages()
        except MissingExtraError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class ExportedGraph:
    """What a graph target writes.

    Args:
        simulation: where the graph comes from; computes golden outputs.
        metadata: for the files that have room for it.
        sample: one batch of the model's inputs by name. Its shapes are those of files with fixed
            shapes, its values are golden inputs.
        encodings_version: of AIMET encodings files.
    """

    simulation: Reference
    metadata: Mapping[str, str]
    sample: Mapping[str, Tensor]
    encodings_version: str = "1.0.0"


class GraphTarget(Target):
    """A simulation as a model in one folder.

    Attributes:
        activation_bitwidths: bitwidths of activations that the files can express.
        model_files: glob of the files that hold the model; their total size is reported.
        fixed_shapes: the files take inputs of the sample's shapes only.
    """

    activation_bitwidths: tuple[int, ...]
    model_files: str
    fixed_shapes = False

    @abstractmethod
    def write(self, exported: ExportedGraph, folder: Path) -> None:
        """Write the files of a simulation into `folder`.

        Raises:
            ExportError: the files cannot express the graph.
        """

    @abstractmethod
    def open(self, folder: Path) -> Runtime:
        """The files in `folder`, opened in the target's runtime.

        Raises:
            ExportError: the runtime refuses them.
        """


@dataclass(frozen=True)
class ExportedUseCases:
    """What a use case target writes: one graph per use case, all of one structure.

    Args:
        base: the zero adapter.
        cases: by name. Their graphs differ in the adapter's weights and in encodings only.
        updatable: which encodings change with the use case; see `simulation/shared_encodings.py`.
    """

    base: ExportedGraph
    cases: Mapping[str, ExportedGraph]
    updatable: BaseActivations


class UseCasesTarget(Target):
    """One base and all use cases in one folder: each adapter, several at once, or none.

    Attributes:
        activation_bitwidths: as of a graph target.
    """

    activation_bitwidths: tuple[int, ...]

    @abstractmethod
    def write(self, exported: ExportedUseCases, folder: Path) -> None:
        """Write all files into `folder`.

        Raises:
            ExportError: the files cannot express the graphs, or their bases differ.
        """

    @abstractmethod
    def open(self, folder: Path, case: str) -> Runtime:
        """The files of a use case, opened in a runtime, after every check that they allow.

        Raises:
            VerificationError: the files contradict each other; every problem names its file.
            ExportError: the runtime refuses them.
        """


@dataclass(frozen=True)
class ExportedBase:
    """What a weights target writes.

    Args:
        gguf_file: the file that the model came from, if it was a GGUF file.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    gguf_file: Path | None = None


class WeightsTarget(Target):
    """A base folder with the base's integers, and a folder for every adapter."""

    @abstractmethod
    def write_base(self, base: ExportedBase, folder: Path) -> None:
        """Write the base into `folder`.

        Raises:
            ExportError: the files cannot hold a layer's grid; all such layers are listed.
        """

    @abstractmethod
    def write_adapter(self, adapter: CanonicalAdapter, base: Path, folder: Path) -> None:
        """Write an adapter into `folder`.

        Args:
            base: the folder that `write_base` wrote.

        Raises:
            ExportError: the files cannot hold it.
        """

    @abstractmethod
    def open(self, folder: Path) -> WeightsRuntime:
        """The base in `folder`, opened in the target's runtime without an adapter.

        Raises:
            ExportError: the runtime refuses it.
        """
