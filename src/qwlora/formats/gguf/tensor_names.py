"""From GGUF's tensors to the model's parameters, by transformers' own code, and what that code does to rows.

transformers has two ways. For some architectures it has conversions as for its own checkpoints (`integrations.gguf`), for the rest a processor for each
architecture (`modeling_gguf_pytorch_utils`), fed one tensor at a time. Either is here a `Making`: the stored tensors of one parameter, and a function from
their values to it. Float tensors go through that function as they are. For integers it is asked where it moves things: it is given numbers of rows, then
numbers of columns, and the answer says where each row went, whether whole blocks of columns moved, and whether the matrix was turned (`Move`). What else it
may do, like subtracting one, cannot be done to integers and is refused.
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
from qwlora.formats.transformers_names import Origin, origins

FIRST = 1000
"""The number of row 0 and of column 0 where rows and columns are numbered: small numbers that come out were made, not moved."""


@dataclass(frozen=True)
class Making:
    """One parameter.

    Args:
        target: the parameter's name.
        sources: names of the stored tensors.
        convert: their values to the parameter, all on the CPU.
    """

    target: str
    sources: tuple[str, ...]
    convert: Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Move:
    """Where a parameter's rows come from.

    Args:
        rows: for each row of the parameter the number of the stored row, counting through all sources.
        columns: the same for columns; None if they stay where they are.
        turned: the parameter is the matrix [in, out], `rows` and `columns` are those of [out, in].
    """

    rows: Int[Tensor, "*rows"]
    columns: Int[Tensor, " in"] | None
    turned: bool


def makings(
    file: GgufFile, config: Mapping[str, Any], model: PreTrainedModel
) -> tuple[dict[str, Making], list[str]]:
    """How each parameter is made, and the stored tensors that make none and that transformers does not drop by name either.

    Args:
        file: the open file.
        config: the configuration as transformers reads it from the file.
        model: without data.

    Raises:
        SourceError: transformers does not know the architecture, or the file's tensors do not fit its conversions.
    """
    try:
        if is_gguf_arch_supported(file.architecture):
            return _by_conversions(file, model)
        return _by_processor(file, config, model)
    except SourceError:
        raise
    except Exception as error:  # a file's numbers reach any line of any conversion
        raise file.error(
            f"transformers cannot map the tensors of architecture {file.architecture!r}: {error or type(error).__name__}"
        ) from error


def moved(making: Making, shapes: Sequence[tuple[int, ...]], block: int, what: str) -> Move:
    """What `making` does to rows and columns of tensors with these shapes, one shape a source.

    A width of two says that already, and costs little; conversions that look at the width refuse it and get the whole.

    Raises:
        SourceError: it does something else than move rows and blocks of `block` columns.
    """
    failure: Exception | None = None
    for width in sorted({min(2, shapes[0][-1]), shapes[0][-1]}):
        try:
            return _probed(making, [(*shape[:-1], width) for shape in shapes], block, what)
        except SourceError:
            raise
        except Exception as error:  # see `makings`
            failure = error
    raise SourceError(
        f"{what}: transformers' conversion of this tensor fails: {failure or type(failure).__name__}"
    ) from failure


def _probed(making: Making, shapes: list[tuple[int, ...]], block: int, what: str) -> Move:
    by_row, by_column, total, width = {}, {}, 0, shapes[0][-1]
    for source, shape in zip(making.sources, shapes, strict=True):
        count = int(np.prod(shape[:-1], dtype=np.int64))
        by_row[source] = (
            torch.arange(FIRST + total, FIRST + total + count, dtype=torch.int32)
            .view(*shape[:-1], 1)
            .expand(shape)
        )
        by_column[source] = torch.arange(FIRST, FIRST + width, dtype=torch.int32).expand(shape)
        total += count
    rows, columns = making.convert(by_row), making.convert(by_column)
    turned = (
        rows.ndim == 2
        and bool((rows[:1] == rows).all())
        and rows.shape[0] == width
        and rows.shape[0] > 1
    )
    if turned:
        rows, columns = rows.T, columns.T
    row, column = rows[..., 0], columns.reshape(-1, columns.shape[-1])[0]
    plain = (
        rows.dtype == columns.dtype == torch.int32
        and bool((rows == row.unsqueeze(-1)).all())
        and bool((columns == column).all())
    )
    if not plain or not _is_order(row - FIRST, total) or not _is_order(column - FIRST, width):
        raise SourceError(
            f"{what}: transformers changes the values of this tensor, or mixes rows and columns, which is not done on integers; take a file with floats there"
        )
    if torch.equal(column - FIRST, torch.arange(width, dtype=torch.int32)):
        return Move((row - FIRST).long(), None, turned)
    order = (column - FIRST).long()
    starts = order[::block]
    if (
        width % block
        or bool((starts % block).any())
        or not torch.equal(order, (starts.unsqueeze(-1) + torch.arange(block)).flatten())
    ):
        raise SourceError(
            f"{what}: transformers moves columns of this tensor out of their blocks of {block}, one scale each; take a file with smaller blocks there"
        )
    return Move((row - FIRST).long(), order, turned)


def _is_order(numbers: Tensor, count: int) -> bool:
    """Whether these are the numbers from 0 to `count - 1`, each once."""
    return numbers.numel() == count and torch.equal(
        numbers.flatten().sort().values, torch.arange(count, dtype=numbers.dtype)
    )


def _by_conversions(file: GgufFile, model: PreTrainedModel) -> tuple[dict[str, Making], list[str]]:
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    found, unknown = origins(
        model,
        shapes,
        repr(str(file.path)),
        get_gguf_conversion_mapping(file.architecture, model.config),
    )
    return {
        target: Making(
            target, tuple(name for name, _ in origin.sources), _converted(origin, model, target)
        )
        for target, origin in found.items()
    }, unknown


def _converted(
    origin: Origin, model: PreTrainedModel, target: str
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    return lambda tensors: origin.convert(model, tensors)[target]


def _by_processor(
    file: GgufFile, config: Mapping[str, Any], model: PreTrainedModel
) -> tuple[dict[str, Making], list[str]]:
    processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=dict(config))
    mapping = get_gguf_hf_weights_map(_Above(model), processor)
    sources: dict[str, list[str]] = {}
    unknown = []
    for name, tensor in file.tensors.items():
        targets = _targets(processor, mapping, name, tensor.shape)
        if not targets:
            unknown.append(name)
        for target in targets:
            sources.setdefault(target, []).append(name)
    return {
        target: Making(target, tuple(names), _processed(processor, mapping, target))
        for target, names in sources.items()
    }, unknown


class _Above:
    """A model as far as its lists of layers, and these without what is in them: transformers makes a table of all names anew for each module it visits."""

    def __init__(self, module: nn.Module):
        self.module, self.config = module, getattr(module, "config", None)

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def named_children(self) -> list[tuple[str, _Above]]:
        return (
            []
            if isinstance(self.module, nn.ModuleList)
            else [(name, _Above(child)) for name, child in self.module.named_children()]
        )


def _targets(
    processor: TensorProcessor, mapping: dict[str, str], name: str, shape: tuple[int, ...]
) -> list[str]:
    """Parameters that the processor makes of a stored tensor."""
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
        except KeyError:  # an expert tensor of a block that the model does not have
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
    """What `transformers` does with each tensor of a file, here with `tensors` alone."""
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
