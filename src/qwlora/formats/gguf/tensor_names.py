"""Maps GGUF tensors to the model's parameters with the conversions of transformers.

transformers has two kinds of conversions: for some architectures the same as for its own
checkpoints (`integrations.gguf`), for the others a processor class per architecture
(`modeling_gguf_pytorch_utils`). Here both become `Origin`s.

Float tensors are converted directly. For integers, the function is probed to learn how it reorders
values: its input is filled with row numbers, then with column numbers, and the result shows where
each row and column came from (`Reordering`). A conversion that does anything else to values, like
subtracting one, is refused for integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.gguf.utils import get_gguf_conversion_mapping, is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from qwlora.errors import SourceError, foreign_as
from qwlora.formats.checkpoint import Origin
from qwlora.formats.gguf.gguf_file import GgufFile
from qwlora.formats.huggingface.transformers_names import origins

FIRST = 1000
"""The number given to row 0 and column 0 in a probe. Results below it were computed, not moved."""


@dataclass(frozen=True)
class Reordering:
    """Which stored rows and columns the rows and columns of a parameter come from.

    Args:
        rows: for each row of the parameter, the index of the stored row, counted through all
            sources.
        columns: the same for columns; None if they keep their order.
        transposed: whether the parameter is stored as [in, out]; `rows` and `columns` refer to
            [out, in].
    """

    rows: Int[Tensor, "*rows"]
    columns: Int[Tensor, " in"] | None
    transposed: bool


def gguf_origins(
    file: GgufFile, config: Mapping[str, Any], model: PreTrainedModel
) -> tuple[dict[str, Origin], list[str]]:
    """Find the stored tensors of each parameter.

    Args:
        file: the open file.
        config: the configuration as transformers reads it from the file.
        model: the model without data.

    Returns:
        The origin of each parameter, and the stored tensors that belong to no parameter and that
        transformers does not ignore.

    Raises:
        SourceError: transformers does not know the architecture, or the file's tensors do not fit
            its conversions.
    """
    architecture, where = file.architecture, repr(str(file.path))
    with foreign_as(
        SourceError, f"{where}: transformers cannot map the tensors of {architecture!r}"
    ):  # bad values can fail anywhere in a conversion
        if not is_gguf_arch_supported(architecture):
            return _Processor(file, config, model).origins(file)
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        mapping = get_gguf_conversion_mapping(architecture, model.config)
        return origins(model, shapes, where, mapping)


class _Processor:
    """The conversion of an architecture for which transformers has a processor class."""

    def __init__(self, file: GgufFile, config: Mapping[str, Any], model: PreTrainedModel):
        kind = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)
        self.processor = kind(config=dict(config))
        self.mapping = get_gguf_hf_weights_map(_OuterModules(model), self.processor)

    def origins(self, file: GgufFile) -> tuple[dict[str, Origin], list[str]]:
        """As `gguf_origins`."""
        sources: dict[str, list[str]] = {}
        unknown = []
        for name, tensor in file.tensors.items():
            targets = self._targets(name, tensor.shape)
            unknown += [] if targets else [name]
            for target in targets:
                sources.setdefault(target, []).append(name)
        return {
            target: Origin(target, tuple(names), self._parameters)
            for target, names in sources.items()
        }, unknown

    def _targets(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """The parameters that the processor makes from a stored tensor."""
        if name in self.mapping and len(shape) < 3:
            return [self.mapping[name]]
        probe = torch.zeros(1, dtype=torch.int8)
        try:
            try:
                return [*self._parameters({name: probe.expand(*shape[:-1], min(2, shape[-1]))})]
            except (ValueError, IndexError):  # needs the real number of columns
                return [*self._parameters({name: probe.expand(shape)})]
        except KeyError:  # experts of a block that the model does not have
            return []

    def _parameters(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert `tensors` as transformers does when it loads a file."""
        parsed: dict[str, Any] = {"tensors": {}}
        for stored, tensor in tensors.items():
            if tensor.is_floating_point():
                tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            weights, name, _ = self.processor.process(
                weights=tensor.numpy(),
                name=stored,
                tensor_key_mapping=self.mapping,
                parsed_parameters=parsed,
            )
            if name in self.mapping:
                parsed["tensors"][self.mapping[name]] = torch.from_numpy(weights)
        return parsed["tensors"]


class _OuterModules:
    """A model whose `ModuleList`s appear to have no children.

    transformers builds a table of all tensor names for each module that it visits; visiting every
    layer would take very long.
    """

    def __init__(self, module: nn.Module):
        self.module, self.config = module, getattr(module, "config", None)

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def named_children(self) -> list[tuple[str, _OuterModules]]:
        if isinstance(self.module, nn.ModuleList):
            return []
        return [(name, _OuterModules(child)) for name, child in self.module.named_children()]


def find_reordering(
    origin: Origin, shapes: Sequence[tuple[int, ...]], block: int, what: str
) -> Reordering:
    """How `origin.convert` reorders the rows and columns of its sources.

    The probe first uses tensors with two columns, which is fast. Conversions that fail because they
    need the real number of columns are probed again with it.

    Args:
        origin: the conversion to probe.
        shapes: the shape of each source.
        block: the number of columns that share a scale.
        what: the tensor, for messages.

    Raises:
        SourceError: the conversion does more than move rows and whole blocks of columns.
    """
    width = shapes[0][-1]
    try:
        return _probed(origin, [(*shape[:-1], min(2, width)) for shape in shapes], block, what)
    except SourceError:
        raise
    except Exception:  # see `gguf_origins`
        with foreign_as(SourceError, f"{what}: transformers' conversion of this tensor fails"):
            return _probed(origin, [(*shape[:-1], width) for shape in shapes], block, what)


def _probed(origin: Origin, shapes: list[tuple[int, ...]], block: int, what: str) -> Reordering:
    by_row, by_column, total, width = {}, {}, 0, shapes[0][-1]
    numbers = torch.arange(FIRST, FIRST + width, dtype=torch.int32)
    for source, shape in zip(origin.sources, shapes, strict=True):
        count = math.prod(shape[:-1])
        rows = torch.arange(FIRST + total, FIRST + total + count, dtype=torch.int32)
        by_row[source] = rows.view(*shape[:-1], 1).expand(shape)
        by_column[source] = numbers.expand(shape)
        total += count
    rows, columns = origin.convert(by_row), origin.convert(by_column)
    transposed = rows.ndim == 2 and rows.shape[0] == width > 1 and bool((rows[:1] == rows).all())
    if transposed:
        rows, columns = rows.T, columns.T
    row, column = rows[..., 0], columns.reshape(-1, columns.shape[-1])[0]
    only_moved = (
        rows.dtype == columns.dtype == torch.int32
        and bool((rows == row.unsqueeze(-1)).all())
        and bool((columns == column).all())
    )
    if not only_moved or not _is_order(row - FIRST, total) or not _is_order(column - FIRST, width):
        raise SourceError(
            f"{what}: transformers changes the values of this tensor, or mixes rows and columns, "
            "which is not possible on integers. Use a file with float values for this tensor"
        )
    order = (column - FIRST).long()
    if torch.equal(order, torch.arange(width)):
        return Reordering((row - FIRST).long(), None, transposed)
    starts = order[::block].unsqueeze(-1)
    if (
        width % block
        or bool((starts % block).any())
        or not torch.equal(order, (starts + torch.arange(block)).flatten())
    ):
        raise SourceError(
            f"{what}: transformers moves columns of this tensor out of their blocks of {block}, "
            "which share a scale. Use a file with smaller blocks for this tensor"
        )
    return Reordering((row - FIRST).long(), order, transposed)


def _is_order(numbers: Tensor, count: int) -> bool:
    """Whether `numbers` is a permutation of 0 to `count - 1`."""
    return numbers.numel() == count and torch.equal(
        numbers.flatten().sort().values, torch.arange(count, dtype=numbers.dtype)
    )
