"""Capture a causal language model with a key-value cache as inputs and outputs.

    captured = capture_cached(model)                                      # any tokens, any past
    captured = capture_cached(model, CacheSizes(tokens=128, context=1024))     # static, one row

    input_ids, attention_mask, position_ids, past_key_values.0.key, past_key_values.0.value, ...
        -> logits, present.0.key, present.0.value, ...

attention_mask is [batch, past + tokens], keys and values are [batch, heads, past, width].

Values have the names that they have in `capture(model, {"input_ids": ...})`, so encodings carry
over by name (`simulation/kv_cache_graph.py`). Every layer keeps the whole past: what a sliding
window cannot see is masked, not dropped.

If the cache is not full, its valid tokens are the last places, so that a sliding window counts
correct distances; attention_mask is 0 on the left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from qwlora.errors import CaptureError, foreign_as
from qwlora.graph.call_arguments import Structure
from qwlora.graph.capture import IDS, MASK, PAST, POSITIONS, PRESENT, Captured, capture
from qwlora.graph.nodes import calls, operation
from qwlora.graph.quantized_graph import with_graph

CONTEXT = "context"  # name of the size of past and new tokens together
_EXAMPLE_TOKENS, _EXAMPLE_PAST = 3, 5  # sizes that differ, so that torch.export keeps them apart


@dataclass(frozen=True)
class CacheSizes:
    """The sizes of a static graph, in tokens: new ones of one call, and the context, new and past
    ones together. At least one is new, and there is room for a past one."""

    tokens: int
    context: int

    def __post_init__(self) -> None:
        if not 1 <= self.tokens < self.context:
            raise CaptureError(
                f"a graph of {self.tokens} tokens in a context of {self.context} has no cache. "
                "Choose at least 1 token, and fewer tokens than the context"
            )

    @property
    def past(self) -> int:
        """Tokens that the cache holds."""
        return self.context - self.tokens


def capture_cached(
    model: nn.Module,
    sizes: CacheSizes | None = None,
    present: Literal["all", "new"] = "all",
) -> Captured:
    """The graph of a causal language model that continues a sequence: of one row and these sizes,
    or of any number of rows, tokens and past tokens. It returns keys and values of past and new
    tokens, or of the new ones only. Models without `input_ids`, `attention_mask`, `position_ids` or
    keys and values for each layer are refused."""
    tokens, past = (sizes.tokens, sizes.past) if sizes else (_EXAMPLE_TOKENS, _EXAMPLE_PAST)
    rows = 1 if sizes else 2
    ids = torch.ones(rows, past + tokens, dtype=torch.int64)
    example = {
        IDS: ids[:, past:],
        MASK: torch.ones_like(ids),
        POSITIONS: torch.arange(past, past + tokens).expand(rows, tokens),
        PAST: _example_cache(model, ids[:, :2], past),
    }
    captured = capture(model, example, static=sizes is not None)
    if sizes is None:
        names = {f"{MASK}.1", *(f"{name}.2" for name in captured.interface.outputs)}
        shapes = {
            name: tuple(CONTEXT if size in names else size for size in shape)
            for name, shape in captured.interface.shapes.items()
        }
        captured = replace(captured, interface=replace(captured.interface, shapes=shapes))
    return _only_new(captured) if present == "new" else captured


@dataclass(frozen=True)
class CacheAddition:
    """A node that appends new keys or values to a past input."""

    past: Node
    new: Node
    whole: Node


def cache_additions(captured: Captured) -> dict[str, CacheAddition]:
    """The nodes that append to past inputs, by the name of the input."""
    names = {k: v for k, v in captured.input_names.items() if v in captured.interface.cached}
    found = {}
    for node in calls(captured.program):
        if operation(node) == "cat":
            match node.args[0]:
                case [Node() as past, Node() as new] if past.name in names:
                    found[names[past.name]] = CacheAddition(past, new, node)
    return found


def _example_cache(model: nn.Module, ids: Tensor, past: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of `past` tokens, in the shapes of those that the model makes of `ids`."""
    kind = type(model).__name__
    remedy = "only a causal language model has a graph with a cache"
    problem = f"{kind} does not run with input_ids and use_cache=True"
    with foreign_as(CaptureError, problem, remedy), torch.no_grad():
        result = model(input_ids=ids, use_cache=True)
    cache = result.get(PAST) if isinstance(result, Mapping) else None
    if cache is None:
        raise CaptureError(
            f"{kind} returns no {PAST}, so its state is not keys and values of tokens, and it has "
            "no graph with a cache. Export it without one"
        )
    try:
        _, tensors = Structure.of({PAST: cache})
    except CaptureError as error:
        raise CaptureError(f"{kind}: {error}") from error
    if odd := next((t for t in tensors if t.ndim != 4 or t.shape[2] != ids.shape[1]), None):
        raise CaptureError(
            f"the cache of {kind} has a tensor of shape {list(odd.shape)} for {ids.shape[1]} "
            "tokens. Keys and values [batch, heads, tokens, width] can be inputs of a graph. "
            "Export it without a cache"
        )
    # a fixed pattern, so that every capture sees the same data
    g = torch.Generator().manual_seed(0)
    made = [
        torch.randn(t.shape[0], t.shape[1], past, t.shape[3], generator=g).to(t) for t in tensors
    ]
    return list(zip(made[::2], made[1::2], strict=True))


def _only_new(captured: Captured) -> Captured:
    """The graph that returns keys and values of the new tokens only."""
    interface = captured.interface
    additions = cache_additions(captured)
    graph = type(captured.program.graph)()
    copied: dict[Node, Node] = {}
    graph.graph_copy(captured.program.graph, copied)
    results = []
    shapes = dict(interface.shapes)
    for name, node in zip(
        interface.outputs, captured.program.graph.output_node().args[0], strict=True
    ):
        if name.startswith(f"{PRESENT}."):
            past = f"{PAST}{name.removeprefix(PRESENT)}"
            added = additions.get(past)
            if added is None or added.whole is not node:
                raise CaptureError(
                    f"output {name} is not input {past} with new tokens after it, so there is no "
                    "output of the new tokens alone. Export the whole keys and values"
                )
            node = added.new
            tokens = interface.shapes[IDS][1]
            shapes[name] = (*shapes[name][:2], tokens, *shapes[name][3:])
        results.append(copied[node])
    graph.output(tuple(results))
    program = with_graph(captured.program, graph)
    return replace(captured, program=program, interface=replace(interface, shapes=shapes))
