"""What an export target is: it writes files for one runtime, and opens them there.

    GraphTarget         the simulation of one adapter as one model: activations on their grids
    UseCasesTarget      the same for all adapters and combinations of them, on one base
    BundleTarget        the base once, and a folder for every adapter: a runtime switches them
      SwitchableTarget    simulations: activations on their grids
      WeightsTarget       the base's integers and float adapters

A new target costs a module with one of these and an entry in `registry.py`. None of these modules
imports torch or the packages of a runtime before it is used, because recipes are validated against
the registry before anything heavy is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qwlora.errors import MissingExtraError
from qwlora.export.proof.contents import Contents
from qwlora.system.optional_packages import require

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qwlora.export.canonical_adapter import CanonicalAdapter
    from qwlora.export.format_limits import LayerKind
    from qwlora.export.proof.checks import Parity
    from qwlora.export.proof.reference import Reference
    from qwlora.export.runtime import Runtime, SwitchableRuntime, WeightsRuntime
    from qwlora.grid.scheme import Scheme
    from qwlora.progress import Track
    from qwlora.simulation.shared_encodings import BaseActivations


PROOF = "proof"  # the folder of proofs, next to exported files


class Target(ABC):
    """Files for one runtime; see the subclasses.

    Attributes:
        extra: the extra of this package that installs `packages`.
        packages: modules that are imported to open the files, and for a graph also to write them.
        has_float16_scales: whether the files hold scales as float16.
        writes_float_embeddings: whether embeddings are written as the floats that codes stand for.
        cached_graphs: whether the files are graphs with a key-value cache, of the sizes that
            `export.graphs` of the recipe has.
        compiled: whether the files are compiled where `packages` are installed.
        contents: what the files are, and what configurations in them hold.
        has_proof: whether `verify` writes a proof next to the files (`bundle.py`).
    """

    extra: str
    packages: tuple[str, ...]
    contents = Contents()
    has_float16_scales = False
    writes_float_embeddings = False
    cached_graphs = False
    compiled = False
    has_proof = False

    def problem(self, scheme: Scheme) -> str | None:
        """Why the files cannot hold integers of a scheme, and what they can; None if they can."""
        return None

    def embedding_problem(self, scheme: Scheme) -> str | None:
        """`problem` of the embedding's scheme."""
        return self.problem(scheme)

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

    def loading_without_cache(self, base: str, adapter: str | None) -> str:
        """`loading` of files of a model that has no key-value cache."""
        return self.loading(base, adapter)

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
        graphs: number of new tokens of each graph with a key-value cache, by name. Empty for a
            model that is no causal language model: one graph of the sample's shapes.
        context: new and past tokens together, in each of them.
    """

    simulation: Reference
    metadata: Mapping[str, str]
    sample: Mapping[str, Tensor]
    encodings_version: str = "1.0.0"
    graphs: Mapping[str, int] = field(default_factory=dict)
    context: int = 0


class GraphTarget(Target):
    """A simulation as a model in one folder.

    Attributes:
        activation_bitwidths: bitwidths of activations that the files can express.
        model_files: glob of the files that hold the model; their total size is reported.
    """

    activation_bitwidths: tuple[int, ...]
    model_files: str

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

    def logits(self, folder: Path, steps: int = 0) -> Callable[[Tensor], Tensor]:
        """Logits that the runtime computes of token ids [1, tokens].

        Args:
            steps: the last tokens to run one by one, if there is a key-value cache.

        Raises:
            ExportError: the runtime refuses the files.
        """
        return self.open(folder).logits

    def call_tokens(self, folder: Path) -> int | None:
        """Tokens of one call, if they are fixed."""
        return None

    def layers(
        self, folder: Path, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        """One call on the CPU, see `UseCasesTarget.layers`."""
        return tensors, self.open(folder).layers(tensors)

    def whole(self, folder: Path) -> Runtime | None:
        """The files as one model whose layers can be compared; None if they are several graphs.

        Raises:
            VerificationError: files contradict each other.
            ExportError: the runtime refuses them.
        """
        return self.open(folder)


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
        reserved: names of other files, which no adapter can have.
    """

    activation_bitwidths: tuple[int, ...]
    reserved: frozenset[str]

    @abstractmethod
    def write(self, exported: ExportedUseCases, folder: Path) -> None:
        """Write all files into `folder`.

        Raises:
            ExportError: the files cannot express the graphs, or their bases differ.
        """

    def own_files(self, folder: Path, case: str) -> list[Path]:
        """The files that only one use case needs."""
        return list(folder.glob(f"{case}.*"))

    @abstractmethod
    def logits(self, folder: Path, case: str, steps: int = 0) -> Callable[[Tensor], Tensor]:
        """Logits that the runtime computes of token ids [1, tokens], for a use case.

        Args:
            steps: the last tokens to run one by one, if there is a key-value cache.

        Raises:
            MissingExtraError: a package of the runtime is missing.
            VerificationError: the files contradict each other; every problem names its file.
            ExportError: the runtime refuses them.
        """

    @abstractmethod
    def call_tokens(self, folder: Path) -> int:
        """Tokens of one call."""

    @abstractmethod
    def layers(
        self, folder: Path, case: str, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        """One call on the CPU: its inputs by name, and every quantized activation by name of its
        tensor in the files.

        Args:
            tensors: inputs of the simulation, of `call_tokens` tokens; padding on the right.

        Raises:
            MissingExtraError, VerificationError, ExportError: see `logits`.
        """

    def verify(
        self, folder: Path, case: str, reference: Mapping[str, Tensor], track: Track
    ) -> Parity | None:
        """The comparison of a use case, if running its `logits` is not all of it."""
        return None


class BundleTarget(Target):
    """A base folder, and a folder for every adapter."""

    has_proof = True

    @abstractmethod
    def open(self, folder: Path) -> WeightsRuntime:
        """The base in `folder`, opened in the target's runtime without an adapter.

        Raises:
            ExportError: the runtime refuses it.
        """


class SwitchableTarget(BundleTarget):
    """The base's simulation in one folder, and what changes with each adapter in another.

    Attributes:
        activation_bitwidths: as of a graph target.
    """

    activation_bitwidths: tuple[int, ...]

    @abstractmethod
    def write_base(
        self, exported: ExportedGraph, updatable: BaseActivations, folder: Path
    ) -> str | None:
        """Write the simulation of a zero adapter into `folder`, with a key-value cache.

        Args:
            updatable: which encodings change with the adapter.

        Returns:
            why the model has no cache, so that the files take whole sequences; None: they have one.

        Raises:
            ExportError: the files cannot express the graph.
        """

    @abstractmethod
    def write_adapter(self, exported: ExportedGraph, base: Path, folder: Path) -> None:
        """Write what the simulation of an adapter changes into `folder`.

        Args:
            base: the folder that `write_base` wrote.

        Raises:
            ExportError: the base has no place for it.
        """

    @abstractmethod
    def open(self, folder: Path) -> SwitchableRuntime: ...


@dataclass(frozen=True)
class ExportedBase:
    """What a weights target writes.

    Args:
        gguf_file: the file that the model came from, if it was a GGUF file.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    gguf_file: Path | None = None


class WeightsTarget(BundleTarget):
    """A base folder with the base's integers, and a folder for every adapter."""

    def kind_problem(self, kind: LayerKind) -> str | None:
        """Why the files cannot hold integers of a kind of layer; None if they can."""
        return None

    def architecture_problem(self, model_type: str) -> str | None:
        """Why the runtime cannot run a `model_type` of transformers; None if it can, or if that is
        unknown because it is not installed."""
        return None

    def rounding(self, model: nn.Module) -> AbstractContextManager[None] | None:
        """A context in which `model` rounds activations as the runtime does, more coarsely than
        float32; None if the runtime does not for this model. It can be entered again."""
        return None

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
