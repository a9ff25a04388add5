"""What an export target is: files for one runtime.

    Target     what is known of it before anything runs: a line of `registry.py`
    Backend    writes and opens its files; the class that the line names, imported on first use
    Runtime    opened files, in the program that they were written for

A new target costs a module with a Backend and a line in `registry.py`; see docs/log/code.md.

    layout  BUNDLE    base/ and NAME/ of each adapter: a runtime switches them
            EACH      NAME/ of each adapter, which holds the base, too
            CASES     one folder for the base and all use cases: each adapter, several at once, none
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cache, cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qwlora.errors import MissingExtraError
from qwlora.grid.scheme import Blocks
from qwlora.system.atomic import files_in
from qwlora.system.optional_packages import node_package, require
from qwlora.system.parameter_names import BASE
from qwlora.system.regular_files import check_plain
from qwlora.targets.proof.contents import Contents, check_contents

# Recipes are validated against the registry before anything heavy is loaded: no torch here.
if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qwlora.grid.scheme import Scheme
    from qwlora.simulation.adapter_simulations import BaseActivations
    from qwlora.simulation.kv_cache_graph import CacheSizes
    from qwlora.simulation.simulation import Simulation
    from qwlora.targets.proof.checks import Limits, Parity


# Of the float models of targets aimet and qairt. ONNX has LayerNormalization since 17, and
# RMSNormalization since 23.
OPSETS = range(17, 24)
ANY_BITS = range(2, 17)
PROOF = "proof"  # a folder of a bundle, next to BASE and those of adapters
NONE, AND = "none", "+"  # use cases: no adapter; the names of several


def members(case: str) -> list[str]:
    """Names of the adapters of a use case."""
    return [] if case == NONE else case.split(AND)


class LayerKind(Enum):
    """What a weight is part of."""

    LINEAR = "a Linear layer"
    CONV1D = "transformers' Conv1D"  # of GPT-2; its weight is [in, out]
    EMBEDDING = "an embedding"  # never refused: written as floats where it cannot be integers
    OTHER = "another layer"  # experts that are stacked in one tensor, convolutions


class Layout(Enum):
    """Where the files of base and adapters are; see the module."""

    BUNDLE = auto()
    EACH = auto()  # for what a runtime cannot switch: DoRA, experts, whole modules
    CASES = auto()


def size_problems(tokens: Sequence[int], contexts: Sequence[int]) -> Iterator[str]:
    """What is wrong with numbers of new tokens and contexts of graphs with a key-value cache."""
    for key, sizes in (("tokens", tokens), ("context", contexts)):
        if not sizes or len(set(sizes)) < len(sizes):
            yield f"{key} {[*sizes]}: list at least one number, and each once"
    if small := [size for size in tokens if size < 1]:
        yield f"tokens {small}: each must be at least 1"
    if full := [size for size in contexts if tokens and size <= max(tokens)]:
        yield (
            f"context {full}: each must be greater than all tokens {[*tokens]}, since every graph "
            "needs room for past tokens. Give larger contexts, or fewer tokens"
        )


@dataclass(frozen=True, kw_only=True)
class FormatLimits:
    """What a format, or the program that reads it, can hold. `refusals.py` reads it.

    Args:
        symmetric, zero_point, float_offset: bitwidths of grids that are symmetric, or have an
            integer or a float offset.
        tensor_bits, channel_bits, block_bits: bitwidths of grids by what one scale covers.
        block, block_sizes: blocks are multiples of the one, and one of the others if any are given.
        stored_blocks: all grids are stored in blocks of one of these sizes, largest first. Empty:
            grids are stored as they are.
        has_float_embeddings: whether embeddings are written as the floats that codes stand for.
        refused: kinds of layers, and why they are.
        same_scheme, same_if_asymmetric: why all layers need one scheme, if they do, or if one of
            theirs is asymmetric.
        with_8_bits, tables: limits of weights that are multiplied with activations of 8 bits, and
            of embeddings. Default: the same.
        remedy: a sentence at the end of messages.
    """

    name: str = ""
    symmetric: Collection[int] = ANY_BITS
    zero_point: Collection[int] = ()
    float_offset: Collection[int] = ()
    tensor_bits: Collection[int] = ANY_BITS
    channel_bits: Collection[int] = ANY_BITS
    block_bits: Collection[int] = ANY_BITS
    has_signed_scales: bool = True
    block: int = 1
    block_sizes: tuple[int, ...] = ()
    block_kind: type[Blocks] = Blocks
    stored_blocks: tuple[int, ...] = ()
    has_float16_scales: bool = False
    has_float_embeddings: bool = False
    refused: Mapping[LayerKind, str] = field(default_factory=dict)
    same_scheme: str = ""
    same_if_asymmetric: str = ""
    with_8_bits: FormatLimits | None = None
    tables: FormatLimits | None = None
    remedy: str = ""

    def stored_block(self, scheme: Scheme, columns: int) -> int | None:
        # A larger block needs fewer scales. It must cross no block of the grid, and fill the rows.
        block = scheme.granularity.size if isinstance(scheme.granularity, Blocks) else columns
        sizes = self.stored_blocks
        return next((size for size in sizes if block % size == 0 and columns % size == 0), None)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is known of a target before anything runs.

    Args:
        backend_class: `module:class` of its `Backend`.
        extra: the extra of this package that installs `packages`.
        runtime: the program's name, for people; default: the target's.
        exact, shipped, rounds: how `verify` runs files with float32 activations and, where the
            program or another file rounds them, with that; what it rounds to.
        packages, writers: modules that are imported to open and to write the files.
        node_packages: npm packages, NAME@RANGE, that node runs the files with.
        compilers: further ones, and their extra: the files are compiled where they are installed.
        is_simulated: whether the files hold activations on grids; else weights and float adapters.
        activation_bitwidths: bitwidths of activations that they can express.
        cached_graphs: whether they are graphs with a key-value cache, of sizes `export.graphs`.
        graph_layouts, opsets: what `export.layout` and `export.opset` of the recipe can be.
        has_proof: whether `verify` writes a proof next to the files (`proof/folder.py`).
        model_files: glob of the files whose total size is reported.
        reserved: names of other files, which no adapter can have.
        source_suffix: of files of a model whose own integers, metadata and tokenizer are copied.
        writes_floats: whether all weights are written as float32 next to their encodings.
        has_one_shape: whether adapters are padded to one rank on the same modules.
        embedding_bits: what `export.embedding_bits` of the recipe can be; the first is its default.
            See `rounded_floats.py` for 8.
        rounds_adapters: whether adapters are float16 where embeddings have 8 bits.
        limits, chip: limits of the files, and of the chip that they are compiled for.
        simulation: values that keys of `simulation` in the recipe can have; the first is default.
    """

    backend_class: str
    extra: str
    packages: tuple[str, ...]
    runtime: str = ""
    exact: str = ""
    shipped: str = "as shipped"
    rounds: str = ""
    writers: tuple[str, ...] = ()
    node_packages: tuple[str, ...] = ()
    compilers: tuple[str, str] | None = None
    layout: Layout = Layout.BUNDLE
    is_simulated: bool = False
    activation_bitwidths: tuple[int, ...] = ()
    cached_graphs: bool = False
    graph_layouts: tuple[str, ...] = ()
    opsets: Collection[int] = ()
    has_proof: bool = True
    model_files: str = "**/*"
    reserved: frozenset[str] = frozenset()
    source_suffix: str = ""
    writes_floats: bool = False
    has_one_shape: bool = False
    embedding_bits: tuple[int, ...] = (16, 32)
    rounds_adapters: bool = False
    limits: FormatLimits = FormatLimits(zero_point=ANY_BITS, float_offset=ANY_BITS)
    chip: FormatLimits | None = None
    simulation: Mapping[str, Sequence[object]] = field(default_factory=dict)

    @cached_property
    def backend(self) -> Backend:
        module, _, name = self.backend_class.partition(":")
        return getattr(import_module(module), name)()

    @property
    def has_golden(self) -> bool:
        # Opsets are those of float models for a device's compiler, whose results nobody sees here.
        return bool(self.opsets)

    @property
    def has_base(self) -> bool:
        return self.layout is Layout.BUNDLE

    @property
    def has_cases(self) -> bool:
        return self.layout is Layout.CASES

    @property
    def holds_factors_only(self) -> bool:
        """Whether adapters have to be LoRA factors; where weights are not simulated, of linear
        layers."""
        return self.layout is not Layout.EACH

    @property
    def has_canary(self) -> bool:
        """Whether its files are weights that a server loads."""
        return self.has_base and not self.is_simulated

    @property
    def taken_names(self) -> frozenset[str]:
        return self.reserved.union([BASE] * self.has_base, [PROOF] * self.has_proof)

    def missing(self, to_write: bool = False) -> str | None:
        """Which package is missing, and how to install it; None if all are there."""
        try:
            self.require_packages(to_write)
            if self.compilers is not None and not to_write:
                require(*self.compilers)
        except MissingExtraError as error:
            return str(error)
        return None

    def require_packages(self, to_write: bool = False) -> None:
        for package in self.writers if to_write else self.packages:
            require(package, self.extra)
        for package in () if to_write else self.node_packages:
            node_package(package)

    def parts(self, bundle: Path, name: str) -> dict[str, Path]:
        """The folders in a `bundle` with the files of an adapter or use case, by what they are."""
        if self.has_base:
            adapter = {} if name == BASE else {"adapter": bundle / name}
            return {BASE: bundle / BASE, **adapter}
        return {"files": bundle if self.has_cases else bundle / name}

    def stages(self, target: str, name: str) -> list[str]:
        """The stages of a job that write the files of an adapter or use case."""
        base, adapter = [f"export/{target}"], [f"export/{target}/{name}"] * (name != BASE)
        return base if self.has_cases else base + adapter if self.has_base else adapter

    def open(self, bundle: Path, name: str | None = None, as_shipped: bool = False) -> Runtime:
        """The files in the target's runtime, with an adapter or as a use case.

        Args:
            bundle: folder of the target.
            name: adapter or use case. None: the base alone, if it has a folder of its own. Empty:
                `bundle` itself holds the files of one adapter.
            as_shipped: with the program's own settings, not with exact ones.

        Raises:
            SourceError: the folder holds a link, a pipe or a device; or a file, key or value that
                the target does not write.
            MissingExtraError: a package of the runtime is missing.
            VerificationError: the files contradict each other; every problem names its file.
            ExportError: the runtime refuses them.
        """
        self.require_packages()
        opened = self.backend.open_shipped if as_shipped else self.backend.open
        # Runtimes trust their files, so `contents.py` checks these first, and each adapter before
        # the first switch to it.
        if not self.has_base:
            files = self.parts(bundle, str(name))["files"]
            self._check(files, is_base=False)
            return opened(files, str(name))
        self._check(bundle / BASE, is_base=True)
        runtime = opened(bundle / BASE, BASE)
        # Adapters take turns in a proof. Their files are read once.
        runtime.check = cache(partial(self._check, is_base=False))
        if name not in (None, BASE):
            runtime.use(bundle / str(name))
        return runtime

    def _check(self, folder: Path, is_base: bool) -> None:
        check_plain(folder)
        ignored = (f"{PROOF}/", ".") if self.has_cases else ()  # of the bundle: see `folder.py`
        files = [
            file
            for file in files_in(folder)
            if not file.startswith(ignored)
            and not re.fullmatch(r"\..*\.part", Path(file).name)  # left by a killed writer
        ]
        check_contents(self.backend.contents, folder, files, is_base)


@dataclass(frozen=True)
class ExportedBase:
    """A base of integers. `gguf_file` is where it came from, `embedding_bits` what the recipe's
    `export` says. With 8, a writer gets embeddings that are packed already."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    gguf_file: Path | None = None
    embedding_bits: int = 16


@dataclass(frozen=True)
class ExportedGraph:
    """A simulation of an adapter.

    Args:
        simulation: where the graph comes from; computes golden outputs.
        sample: one batch of the model's inputs by name. Its shapes are those of files with fixed
            shapes, its values are golden inputs.
        encodings_version: of AIMET encodings files.
        graphs: sizes of the graphs with a key-value cache. Empty for a model that is not a causal
            language model: one graph of the sample's shapes.
        opset: of the float models of targets aimet and qairt. Default: the newest that they need.
        updatable: which encodings change with the adapter, see `simulation/adapter_simulations.py`.
        layout: `genie`: inputs and outputs of the graphs as Qualcomm's Genie passes them.
        embedding_bits: see `store_narrow`.
    """

    simulation: Simulation
    metadata: Mapping[str, str]
    sample: Mapping[str, Tensor]
    encodings_version: str = "1.0.0"
    graphs: tuple[CacheSizes, ...] = ()
    opset: int | None = None
    updatable: BaseActivations = "all"
    layout: str | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    embedding_bits: int = 16


class Rounding(ExitStack):
    """While it is open, hooks of modules, which `hooks` register, round activations like a runtime.

    Args:
        other: of a runtime that cannot compute without rounding: rounding that is as valid.
    """

    def __init__(self, hooks: Sequence[Callable[[], Any]], other: Rounding | None = None):
        super().__init__()
        self._hooks, self.other = hooks, other

    def __enter__(self) -> Self:
        for register in self._hooks:
            self.enter_context(register())
        return self


class Runtime:
    """A model in its runtime, which defines `logits`, `extend` or both.

    Attributes:
        shipped: the same with the program's own settings, if those compute something else.
        switches: whether `use` and `decode` work; else the files are of one adapter or use case.
        has_layers: whether `run_layers` works.
        process_bytes: most memory that a process of its own had so far.
        check: called with the folder of an adapter before the first switch to it.
    """

    process_bytes = 0
    shipped: Runtime | None = None
    switches = False
    has_layers = False
    check: Callable[[Path], None] | None = None

    @property
    def has_cache(self) -> bool:
        """Whether caches of `extend` can take turns, which a proof compares."""
        return False

    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        """Float32 logits [1, tokens, vocabulary] of token ids [1, tokens], none of them masked.

        Args:
            steps: the last tokens to run one by one, where the files are graphs of fixed sizes;
                the graphs with room take turns.
        """
        return self.extend(ids, {})[0]

    def use(self, adapter: Path | None) -> None:
        """Switch to the adapter in a folder, or to none. Adapters stay loaded."""
        if adapter is not None and self.check is not None:
            self.check(adapter)
        self.switch_to(adapter)

    def switch_to(self, adapter: Path | None) -> None:
        raise NotImplementedError

    def decode(self, ids: Tensor, count: int) -> list[int]:
        """The `count` likeliest tokens after token ids [1, tokens], one by one."""
        import torch

        tokens, cache = [ids], dict[str, Any]()
        for _ in range(count):
            logits, cache = self.extend(tokens[-1], cache)
            tokens.append(logits[:, -1:].argmax(-1))
        return torch.cat(tokens[1:], 1)[0].tolist()

    def extend(self, ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        """Logits, the last ones those of new tokens or of the last one alone, and the runtime's own
        cache with them. An empty `past` begins a sequence. Without a cache: of the whole text."""
        import torch

        tokens = torch.cat([past["ids"], ids], 1) if past else ids
        return self.logits(tokens), {"ids": tokens}

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every output of a simulation's files by name, given every input by name."""
        raise NotImplementedError

    def run_layers(
        self, values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Every quantized activation, computed from the simulated `values` of the others and from
        the model's inputs."""
        raise NotImplementedError

    def parity(
        self, compare: Callable[[Any, Limits, str], Parity], limits: Limits
    ) -> Parity | None:
        """The comparison of files that more than one program runs; None: this one alone.

        Args:
            compare: takes a runtime, limits, and where it runs, in a sentence (" on the CPU").
        """
        return None


class Backend(ABC):
    """Writes and opens the files of a target. The layout says which of the writers it has.

    Attributes:
        contents: what the files are, and what configurations in them hold.
    """

    contents = Contents()

    def write_base(self, exported: Any, folder: Path) -> str | None:
        """Write the base of a bundle.

        Args:
            exported: an `ExportedBase`, or the `ExportedGraph` of a zero adapter.

        Returns:
            why files of a simulation have no key-value cache; None: they have one.
        """
        raise NotImplementedError

    def write_adapter(self, exported: Any, base: Path, folder: Path) -> None:
        """Write what an adapter changes in a bundle, or all files.

        Args:
            exported: a `CanonicalAdapter`, or an `ExportedGraph`.
            base: the folder that `write_base` wrote, of a bundle.
        """
        raise NotImplementedError

    def write_cases(
        self, base: ExportedGraph, cases: Mapping[str, ExportedGraph], folder: Path
    ) -> None:
        """Write all use cases.

        Args:
            base: the zero adapter.
            cases: by name. Their graphs differ in the adapter's weights and in encodings only.
        """
        raise NotImplementedError

    def own_files(self, folder: Path, case: str) -> list[Path]:
        """The files that only one use case needs."""
        raise NotImplementedError

    @abstractmethod
    def open(self, folder: Path, case: str) -> Runtime:
        """See `Target.open`. The folder holds all files, or of a bundle the base's."""

    def open_shipped(self, folder: Path, case: str) -> Runtime:
        """`open` with the program's own settings, if those compute something else."""
        return self.open(folder, case)

    def model_problem(self, model: PreTrainedModel, tokenizer: Any) -> str | None:
        """Why the runtime cannot run a model of this configuration, which may be without weights,
        and tokenizer; None if it can, or if the runtime is not installed."""
        return None

    def rounding(self, model: nn.Module) -> Rounding | None:
        """What makes `model` round activations like the runtime. None if the runtime computes in
        float32."""
        return None
