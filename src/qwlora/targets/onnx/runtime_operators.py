"""Put operators of ONNX Runtime in place of the many small ones of a captured graph.

    softmax(scale q k^T + mask) v   -->  GroupQueryAttention, with the cache and the rotation inside
    w x / sqrt(mean(x^2) + eps)     -->  SimplifiedLayerNormalization
    x sigmoid(x)                    -->  QuickGelu

The rules match operators, not names of modules. They compute the mask and the rotation at positions
that the model knows, and compare both with what GroupQueryAttention does. If one attention of a
model differs, the whole graph stays as it was captured.

GroupQueryAttention takes the number of tokens from attention_mask, so a batch must be padded on the
right. SmolLM2's graph has 977 nodes instead of 6,991 (docs/log/runtimes.md).
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from qwlora.graph.capture import MASK, POSITIONS, Captured
from qwlora.graph.nodes import SOFTMAXES, calls, operation, origin
from qwlora.graph.quantized_graph import with_graph
from qwlora.graph.rewrites import rewritten
from qwlora.system.optional_packages import require

DOMAIN, ATTENTION = "com.microsoft", "GroupQueryAttention"
_aten = torch.ops.aten
_OPERATORS = torch.ops.qwlora_onnx


def _define(name: str, schema: str, shape: Callable[..., Any]) -> None:
    # An operator that stands for a node of the exported graph, and is never computed.
    torch.library.define(f"qwlora_onnx::{name}", schema)
    torch.library.register_fake(f"qwlora_onnx::{name}", shape)


def _attention_shapes(q: Tensor, k: Tensor, v: Tensor, past: Tensor, *_: Any) -> Any:
    batch, heads, tokens, width = past.shape
    present = past.new_empty(batch, heads, tokens + k.shape[1], width)
    return torch.empty_like(q), present, torch.empty_like(present)


_define(
    "attention",
    "(Tensor query, Tensor key, Tensor value, Tensor past_key, Tensor past_value, str name)"
    " -> (Tensor, Tensor, Tensor)",
    _attention_shapes,
)
_define(
    "reshape",
    "(Tensor x, int[] sizes) -> Tensor",
    lambda x, sizes: x.new_empty(*x.shape[:2], *sizes),
)
_define(
    "rms_norm",
    "(Tensor x, Tensor weight, float epsilon) -> Tensor",
    lambda x, *_: torch.empty_like(x),
)
_define(
    "add_rms_norm",
    "(Tensor x, Tensor y, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    lambda x, *_: (torch.empty_like(x), torch.empty_like(x)),
)
_define("silu", "(Tensor x) -> Tensor", torch.empty_like)

_COPIES = {"to", "_to_copy", "type_as", "clone", "contiguous", "dropout", "alias", "detach"}
# What repeats each head of keys and values for its group of query heads, after a new axis of 2.
_REPEATS = {*_COPIES, "slice", "unsqueeze", "expand", "reshape"}
_HIDDEN = -1e4  # scores below are those of masked tokens


@dataclass(frozen=True)
class Attention:
    """An attention of a captured graph. Values are [batch, heads, tokens, width].

    Args:
        output: of the attention.
        query, key, value: of the new tokens, queries and keys before the rotation.
        whole: keys and values of past and new tokens.
        mask: what is added to the scores.
        scale, softcap: of the scores: scale q k^T, or softcap tanh(scale q k^T / softcap).
        angles: cosine and sine of the rotation, [batch, 1, tokens, width].
    """

    output: Node
    query: Node
    key: Node
    value: Node
    whole: tuple[Node, Node]
    mask: Node
    scale: float
    softcap: float = 0.0
    angles: tuple[Node, ...] = ()


def find_attentions(captured: Captured) -> list[Attention]:
    """The attentions of a graph with a cache; none if one of them is of a kind that
    GroupQueryAttention does not compute."""
    names = captured.input_names.items()
    cached = {node for node, name in names if name in captured.interface.cached}
    softmaxes = [node for node in calls(captured.program) if operation(node) in SOFTMAXES]
    found = [a for node in softmaxes if (a := _attention(node, cached)) is not None]
    return found if 2 * len(found) == len(cached) else []


def _attention(softmax: Any, cached: set[str]) -> Attention | None:
    scores, mask = _arguments(softmax.args[0], "add")
    softcap, (tanh, factor) = 0.0, _arguments(scores, "mul")
    if _operation(tanh) == "tanh":
        scores, softcap = _arguments(tanh.args[0], "div")
        if factor != softcap:
            return None
    scale, product = _unscaled(scores)
    query, transposed = _arguments(product, "matmul")
    output, *others = _readers(softmax)
    _, repeated = _arguments(output, "matmul")
    by_token = transposed.args[0] if _is_swap(transposed, (2, 3)) else None
    keys, values = _whole(by_token, cached), _whole(repeated, cached)
    if others or None in (mask, query, keys, values):
        return None
    key, value = keys.args[0][1], values.args[0][1]
    (query, angles), (key, same) = _unrotated(query), _unrotated(key)
    widths = {node.meta["val"].shape[3] for node in (query, key, value)}
    # as onnxruntime 1.32 asks
    fits = len(widths) == 1 and all(width % 8 == 0 for width in widths)
    if angles != same or not fits:
        return None
    return Attention(output, query, key, value, (keys, values), mask, scale, softcap, angles)


def _call_of(value: Any) -> tuple[str, Any]:
    """The operation of a node and its arguments; empty for other values."""
    return (operation(value), value.args) if isinstance(value, Node) else ("", ())


def _operation(value: Any) -> str:
    return _call_of(value)[0]


def _readers(node: Node) -> list[Node]:
    """The nodes that read a value or copies of it."""
    readers = list[Node]()
    for user in node.users:
        readers += _readers(user) if operation(user) in _COPIES else [user]
    return readers


def _arguments(node: Any, name: str) -> tuple[Any, Any]:
    """The first two arguments of a call of the operation `name`; None of other values."""
    return (node.args[0], node.args[1]) if _operation(node) == name else (None, None)


def _unscaled(node: Any) -> tuple[float, Any]:
    """A factor, and the value that is multiplied by it."""
    scale = 1.0
    while _operation(node) in ("mul", "div") and isinstance(node.args[1], int | float):
        scale *= node.args[1] if operation(node) == "mul" else 1 / node.args[1]
        node = node.args[0]
    return scale, node


def _is_swap(node: Any, axes: tuple[int, int]) -> bool:
    """Whether a node swaps these of four axes."""
    return _operation(node) == "transpose" and {a % 4 for a in node.args[1:]} == {*axes}


def _whole(node: Any, cached: set[str]) -> Any:
    """The keys or values, past and new, that `node` repeats for groups of query heads."""
    while _operation(node) in _REPEATS:
        if operation(node) == "unsqueeze" and node.args[1] != 2:
            return None
        node = node.args[0]
    match _call_of(node):
        case "cat", ([Node() as past, Node()], -2 | 2) if past.name in cached:
            return node
    return None


def _unrotated(node: Any) -> tuple[Any, tuple[Node, ...]]:
    """x, cosine and sine, where `node` is x cos + (-x_2, x_1) sin with the halves x_1 and x_2 of x,
    or of its first part, the rest of which stays. Else `node` itself, and no angles."""
    match _call_of(node):
        case "cat", ([Node() as whole], _):
            return _unrotated(whole)
        case "cat", ([Node() as rotated, Node() as rest], -1 | 3):
            part, angles = _unrotated(rotated)
            x, count = part.args[0], part.meta["val"].shape[-1]
            if angles and _is_slice(part, x, 0, count) and _is_slice(rest, x, count):
                return x, angles
    left, right = _arguments(node, "add")
    x, cosine = _arguments(left, "mul")
    turned, sine = _arguments(right, "mul")
    match _call_of(turned):
        case "cat", ([Node() as minus, Node() as first], -1 | 3):
            second = minus.args[0] if operation(minus) == "neg" else None
            half = x.meta["val"].shape[-1] // 2
            fits = half % 8 == 0  # as onnxruntime 1.32 asks
            if fits and _is_slice(first, x, 0, half) and _is_slice(second, x, half):
                return x, (origin(cosine), origin(sine))
    return node, ()


def _is_slice(node: Any, whole: Node, start: int, stop: int | None = None) -> bool:
    if _operation(node) != "slice" or node.args[0] is not whole:
        return False
    (axis, first, last), width = node.args[1:4], whole.meta["val"].shape[-1]
    return axis % 4 == 3 and first == start and min(last, width) == (stop or width)


def _evaluated(captured: Captured, node: Node, past: int, tokens: int) -> Tensor:
    """The value of a node that depends on sizes and positions only, for `tokens` new tokens after
    `past` ones."""
    program, names, needed = captured.program, captured.input_names, {node}
    for each in reversed(program.graph.nodes):
        if each in needed:
            needed |= set(each.all_input_nodes)
    known: dict[Any, Any] = {**program.state_dict, **program.constants}
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    sizes = {"batch": 1, "tokens": tokens, "past": past, "context": past + tokens}
    given = {
        MASK: torch.ones(1, past + tokens, dtype=torch.int64),
        POSITIONS: torch.arange(past, past + tokens)[None],
    }
    graph, copies, values = Graph(), dict[Node, Node](), list[Tensor]()
    for each in (each for each in program.graph.nodes if each in needed):
        copies[each] = graph.node_copy(each, copies.__getitem__)
        if each.op == "placeholder" and each.name in names:
            name = names[each.name]
            axes = captured.interface.shapes[name]
            shape = [size if isinstance(size, int) else sizes[size] for size in axes]
            zero = torch.zeros((), dtype=each.meta["val"].dtype)
            values.append(given.get(name, zero).expand(shape))
        elif each.op == "placeholder":
            values.append(known[targets[each.name]])
    graph.output(copies[node])
    with torch.no_grad():
        result: Tensor = GraphModule(nn.Module(), graph)(*values)
    return result


def _window(captured: Captured, mask: Node, longest: int) -> int | None:
    """How many tokens each token sees: itself and those before it; None for another mask."""

    def added(past: int, tokens: int) -> Tensor:
        values = _evaluated(captured, mask, past, tokens).float()
        return torch.where(values < _HIDDEN, -torch.inf, values)

    window = int((added(longest - 1, 1) == 0).sum())
    for past in {0, max(window - 2, 0)}:
        tokens = min(5, longest - past)
        distance = torch.arange(past, past + tokens)[:, None] - torch.arange(past + tokens)
        hidden = (distance < 0) | (distance >= window)
        expected = torch.zeros(1, 1, tokens, past + tokens).masked_fill(hidden, -torch.inf)
        if not torch.equal(added(past, tokens), expected):
            return None
    return window


def _table(captured: Captured, angle: Node, longest: int) -> Tensor | None:
    """The first half of cosines or sines at each position; None if the second half differs, or if
    they depend on more than the position."""
    whole = _evaluated(captured, angle, 0, longest)
    if whole.shape[:-2].numel() != 1:
        return None
    whole = whole.reshape(whole.shape[-2:])
    for past in (0, longest // 2):  # some models choose angles by the length of the text
        few = _evaluated(captured, angle, past, 3).reshape(3, -1)
        if not torch.allclose(few, whole[past : past + 3], rtol=0, atol=1e-6):
            return None
    first, second = whole.chunk(2, -1)
    return first.contiguous() if torch.equal(first, second) else None


class RuntimeAttention(NamedTuple):
    """Attributes of a GroupQueryAttention node, and the nodes of its tables' angles, if any."""

    attributes: dict[str, Any]
    tables: tuple[Node, ...]


class RuntimeGraph(NamedTuple):
    """A program with operators of ONNX Runtime, its attentions by name, and their tables."""

    program: ExportedProgram
    attentions: dict[str, RuntimeAttention]
    tables: dict[Node, Tensor]


def with_runtime_operators(captured: Captured, longest: int) -> RuntimeGraph | None:
    """A captured graph with one node for each attention, norm and activation function; None if it
    has attentions of another kind.

    Args:
        longest: number of positions that the model knows.
    """
    captured = replace(captured, program=rewritten(captured.program))
    found = find_attentions(captured)
    masks = {attention.mask for attention in found}
    windows = {mask: _window(captured, mask, longest) for mask in masks}
    angles = {angle: None for attention in found for angle in attention.angles}
    tables = {
        angle: table for angle in angles if (table := _table(captured, angle, longest)) is not None
    }
    if not found or None in windows.values() or len(tables) < len(angles):
        return None
    graph, attentions = copy.deepcopy(captured.program.graph), dict[str, RuntimeAttention]()
    nodes = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        _simplify_(node)
    for each in found:
        _replace_(each, nodes)
        window = windows[each.mask]
        attributes = {
            "num_heads": int(each.query.meta["val"].shape[1]),
            "kv_num_heads": int(each.key.meta["val"].shape[1]),
            "scale": each.scale,
            "softcap": each.softcap,
            "local_window_size": -1 if window == longest else window,
            "do_rotary": int(bool(each.angles)),
        }
        attentions[each.output.name] = RuntimeAttention(attributes, each.angles)
    graph.eliminate_dead_code()
    return RuntimeGraph(with_graph(captured.program, graph), attentions, tables)


def _simplify_(node: Any) -> None:
    """Let one node compute a norm, with the sum before it, or an activation function, or the axes
    after [batch, tokens]; none one that changes nothing."""
    match operation(node), node.args:
        case "silu", [x, *_]:
            node.target, node.args = _OPERATORS.silu.default, (x,)
        case "rms_norm", [x, _, weight, epsilon]:
            node.target, node.args = _OPERATORS.rms_norm.default, (x, weight, epsilon)
            first, second = _arguments(x, "add")
            if isinstance(second, Node) and _same_shape(first, second):
                add = partial(_call, node)
                results = add(_OPERATORS.add_rms_norm.default, first, second, weight, epsilon)
                norm, total = (add(operator.getitem, results, index) for index in range(2))
                node.replace_all_uses_with(norm)
                x.replace_all_uses_with(total, lambda user: node < user)
        case "view" | "reshape", [x, _]:
            old, new = list(x.meta["val"].shape), list(node.meta["val"].shape)
            is_fixed = all(isinstance(size, int) for size in new[2:])
            if len(old) > 2 and old[:2] == new[:2] and is_fixed:
                node.target, node.args = _OPERATORS.reshape.default, (x, new[2:])
        case "slice", [x, *_] if _same_shape(x, node):
            node.replace_all_uses_with(x)


def _same_shape(x: Node, y: Node) -> bool:
    return bool(x.meta["val"].shape == y.meta["val"].shape)


def _replace_(attention: Attention, nodes: Mapping[str, Node]) -> None:
    """Put one node in place of an attention, in a copy of its graph with these nodes."""
    output = nodes[attention.output.name]
    add = partial(_call, output)
    whole: list[Any] = [nodes[node.name] for node in attention.whole]
    new = [nodes[n.name] for n in (attention.query, attention.key, attention.value)]
    flat = [_flat(add, node) for node in new]
    pasts = [node.args[0][0] for node in whole]
    results = add(_OPERATORS.attention.default, *flat, *pasts, output.name)
    result, *presents = [add(operator.getitem, results, index) for index in range(3)]
    for node, present in zip(whole, presents, strict=True):
        node.replace_all_uses_with(present, lambda user: user.op == "output")
    heads, width = output.meta["val"].shape[1::2]
    for by_token in [user for user in output.users if _is_swap(user, (1, 2))]:
        for last in _readers(by_token):
            if operation(last) == "reshape" and last.meta["val"].ndim == 3:
                last.replace_all_uses_with(result)
    by_head = add(_OPERATORS.reshape.default, result, [heads, width])
    output.replace_all_uses_with(add(_aten.transpose.int, by_head, 1, 2))


def _call(before: Node, target: Any, *arguments: Any) -> Any:
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, arguments)
    values = map_arg(arguments, lambda n: n.meta["val"])
    node.meta = {**before.meta, "val": target(*values)}
    return node


def _flat(add: Callable[..., Any], node: Any) -> Any:
    """[batch, tokens, heads width] of a value [batch, heads, tokens, width]."""
    by_token = _by_token(add, node)
    size = math.prod(by_token.meta["val"].shape[2:])
    source = by_token.args[0]
    if by_token.target is _OPERATORS.reshape.default and source.meta["val"].shape[2:] == (size,):
        return source
    return add(_OPERATORS.reshape.default, by_token, [size])


def _by_token(add: Callable[..., Any], node: Any) -> Any:
    """[batch, tokens, heads, width] of a value [batch, heads, tokens, width]."""
    if _is_swap(node, (1, 2)):
        return node.args[0]
    if node.target is _OPERATORS.rms_norm.default:
        source = _by_token(add, node.args[0])
        return add(node.target, source, *node.args[1:])
    return add(_aten.transpose.int, node, 1, 2)


def translations() -> dict[Any, Callable[..., Any]]:
    """How `torch.onnx.export` writes the nodes of `with_runtime_operators`."""
    op = require("onnxscript", "onnx").opset21

    def renamed(values: Any, operator: str, domain: str, *inputs: Any, **attributes: Any) -> Any:
        # onnxscript makes standard operators only, so one of them is renamed.
        node = (values[0] if isinstance(values, Sequence) else values).producer()
        node.domain, node.op_type = domain, operator
        node.attributes.clear()
        ir = require("onnx_ir", "onnx")
        node.attributes.update({a.name: a for a in ir.convenience.convert_attributes(attributes)})
        node.resize_inputs(len(inputs))
        for index, value in enumerate(inputs):
            node.replace_input_with(index, value)
        return values

    def attention(
        query: Any, key: Any, value: Any, past_key: Any, past_value: Any, name: str
    ) -> Any:
        outputs = op.Split(query, num_outputs=3)
        inputs = query, key, value, past_key, past_value
        return renamed(outputs, ATTENTION, DOMAIN, *inputs, name=name)

    def reshape(x: Any, sizes: Any) -> Any:
        return op.Reshape(x, op.Constant(value_ints=[0, 0, *sizes]))

    def rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
        attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
        return renamed(op.Identity(x), "SimplifiedLayerNormalization", "", x, weight, **attributes)

    def add_rms_norm(x: Any, y: Any, weight: Any, epsilon: float) -> Any:
        outputs = op.Split(x, num_outputs=4)
        renamed(outputs, "SkipSimplifiedLayerNormalization", DOMAIN, x, y, weight, epsilon=epsilon)
        outputs[1].name = outputs[2].name = ""
        return outputs[0], outputs[3]

    def silu(x: Any) -> Any:
        return renamed(op.Identity(x), "QuickGelu", DOMAIN, x, alpha=1.0)

    return {
        _OPERATORS.attention.default: attention,
        _OPERATORS.reshape.default: reshape,
        _OPERATORS.rms_norm.default: rms_norm,
        _OPERATORS.add_rms_norm.default: add_rms_norm,
        _OPERATORS.silu.default: silu,
    }
