"""Maps GGUF tensors to the model's parameters with the conversions of transformers.

transformers has two kinds of conversions: for some architectures the same as for its own
checkpoints (`integrations.gguf`), for the others a processor class per architecture
(`modeling_gguf_pytorch_utils`). Here both become a `GgufOrigin`: the stored tensors of one
parameter, and a function that converts them.

Float tensors are converted directly. For integers, the function is probed to learn how it reorders
values: its input is filled with row numbers, then with column numbers, and the result shows where
each row and column came from (`Reordering`). A conversion that does anything else to values, like
subtracting one, is refused for integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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

from qwlora.errors import SourceError
from qwlora.formats.gguf.gguf_file import GgufFile
from qwlora.formats.huggingface.transformers_names import StoredTensors, origins

FIRST = 1000
"""The number given to row 0 and column 0 in a probe. Results below it were computed, not moved."""


@dataclass(frozen=True)
class GgufOrigin:
    """The stored tensors of one parameter, and the conversion to it.

    Args:
        target: the parameter's name.
        sources: names of the stored tensors.
        convert: makes the parameter from the stored tensors, by name; all on the CPU.
    """

    target: str
    sources: tuple[str, ...]
    convert: Callable[[Mapping[str, Tensor]], Tensor]


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
) -> tuple[dict[str, GgufOrigin], list[str]]:
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
    try:
        if is_gguf_arch_supported(file.architecture):
            return _by_conversions(file, model)
        return _by_processor(file, config, model)
    except SourceError:
        raise
    except Exception as error:  # bad values can fail anywhere in a conversion
        raise file.error(
            f"transformers cannot map the tensors of architecture {file.architecture!r}: "
            f"{error or type(error).__name__}"
        ) from error


def find_reordering(
    origin: GgufOrigin, shapes: Sequence[tuple[int, ...]], block: int, what: str
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
    failure: Exception | None = None
    for width in sorted({min(2, shapes[0][-1]), shapes[0][-1]}):
        try:
            return _probed(origin, [(*shape[:-1], width) for shape in shapes], block, what)
        except SourceError:
            raise
        except Exception as error:  # see `gguf_origins`
            failure = error
    raise SourceError(
        f"{what}: transformers' conversion of this tensor fails: "
        f"{failure or type(failure).__name__}"
    ) from failure


def _probed(origin: GgufOrigin, shapes: list[tuple[int, ...]], block: int, what: str) -> Reordering:
    by_row, by_column, total, width = {}, {}, 0, shapes[0][-1]
    for source, shape in zip(origin.sources, shapes, strict=True):
        count = int(np.prod(shape[:-1], dtype=np.int64))
        by_row[source] = (
            torch.arange(FIRST + total, FIRST + total + count, dtype=torch.int32)
            .view(*shape[:-1], 1)
            .expand(shape)
        )
        by_column[source] = torch.arange(FIRST, FIRST + width, dtype=torch.int32).expand(shape)
        total += count
    rows, columns = origin.convert(by_row), origin.convert(by_column)
    transposed = (
        rows.ndim == 2
        and bool((rows[:1] == rows).all())
        and rows.shape[0] == width
        and rows.shape[0] > 1
    )
    if transposed:
        rows, columns = rows.T, columns.T
    row, column = rows[..., 0], columns.reshape(-1, columns.shape[-1])[0]
    plain = (
        rows.dtype == columns.dtype == torch.int32
        and bool((rows == row.unsqueeze(-1)).all())
        and bool((columns == column).all())
    )
    if not plain or not _is_order(row - FIRST, total) or not _is_order(column - FIRST, width):
        raise SourceError(
            f"{what}: transformers changes the values of this tensor, or mixes rows and columns, "
            "which is not possible on integers. Use a file with float values for this tensor"
        )
    if torch.equal(column - FIRST, torch.arange(width, dtype=torch.int32)):
        return Reordering((row - FIRST).long(), None, transposed)
    order = (column - FIRST).long()
    starts = order[::block]
    if (
        width % block
        or bool((starts % block).any())
        or not torch.equal(order, (starts.unsqueeze(-1) + torch.arange(block)).flatten())
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


def _by_conversions(
    file: GgufFile, model: PreTrainedModel
) -> tuple[dict[str, GgufOrigin], list[str]]:
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    found, unknown = origins(
        model,
        shapes,
        repr(str(file.path)),
        get_gguf_conversion_mapping(file.architecture, model.config),
    )
    return {
        target: GgufOrigin(
            target, tuple(name for name, _ in origin.sources), _converted(origin, model, target)
        )
        for target, origin in found.items()
    }, unknown


def _converted(
    origin: StoredTensors, model: PreTrainedModel, target: str
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    return lambda tensors: origin.convert(model, tensors)[target]


def _by_processor(
    file: GgufFile, config: Mapping[str, Any], model: PreTrainedModel
) -> tuple[dict[str, GgufOrigin], list[str]]:
    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=dict(config))
    mapping = get_gguf_hf_weights_map(_OuterModules(model), processor)
    sources: dict[str, list[str]] = {}
    unknown = []
    for name, tensor in file.tensors.items():
        targets = _targets(processor, mapping, name, tensor.shape)
        if not targets:
            unknown.append(name)
        for target in targets:
            sources.setdefault(target, []).append(name)
    return {
        target: GgufOrigin(target, tuple(names), _processed(processor, mapping, target))
        for target, names in sources.items()
    }, unknown


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
        return (
            []
            if isinstance(self.module, nn.ModuleList)
            else [(name, _OuterModules(child)) for name, child in self.module.named_children()]
        )


def _targets(
    processor: TensorProcessor, mapping: dict[str, str], name: str, shape: tuple[int, ...]
) -> list[str]:
    """The parameters that the processor makes from a stored tensor."""
    if name in mapping and len(shape) < 3:
        return [mapping[name]]
    for width in sorted({min(2, shape[-1]), shape[-1]}):
        try:
            return list(
                _process(
                    processor,
                    mapping,
                    {name: torch.zeros(1, dtype=torch.int8).expand(*shape[:-1], width)},
                )
            )
        except KeyError:  # experts of a block that the model does not have
            return []
        except (ValueError, IndexError):
            if width == shape[-1]:
                raise
    raise AssertionError("a last axis is at least one long")


def _processed(
    processor: TensorProcessor, mapping: dict[str, str], target: str
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    return lambda tensors: _process(processor, mapping, tensors)[target]


def _process(
    processor: TensorProcessor, mapping: dict[str, str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Convert `tensors` as transformers does when it loads a file."""
    made: dict[str, Any] = {"tensors": {}}
    for stored, tensor in tensors.items():
        tensor = (
            tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            if tensor.is_floating_point()
            else tensor
        )
        weights, name, _ = processor.process(
            weights=tensor.numpy(), name=stored, tensor_key_mapping=mapping, parsed_parameters=made
        )
        if name in mapping:
            made["tensors"][mapping[name]] = torch.from_numpy(weights)
    return made["tensors"]
