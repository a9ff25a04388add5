"""Capture base and adapter as one `torch.export` graph, clean it, and check it against the module.

It handles any model with nested keyword arguments and results, without changes to it. The graph

- shares the module's storage, except for tensors in half precision: it computes in float32
  (`capturable_model.py`)
- takes any size of each axis that the model does not fix (`Captured.interface` lists them)
- has no nodes that compute nothing, has no nested graphs, and dequantizes each packed weight once
- returns the module's outputs, bit for bit (`capture_check.py`)

A causal language model with a key-value cache is two graphs with the same encodings:

    capture(model, {"input_ids": ids, "use_cache": True})
        prefill: logits, present.0.key, present.0.value, ...
    capture(model, {"input_ids": ids, "past_key_values": pairs, ...})
        decode: the same outputs from past_key_values.0.key, ...

The language model of a vision-language model is captured from embeddings of text and images,
without the vision tower and the embedding table:

    capture(model, {"inputs_embeds": x, "attention_mask": mask, "position_ids": positions})
        x float [batch, tokens, width]; positions [batch, tokens], or [3, batch, tokens] if the
        model counts time, height and width (mrope)
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from qwlora.errors import CaptureError, foreign_as
from qwlora.graph.call_arguments import LABELS, Structure, cache_of, tokens_in
from qwlora.graph.capturable_model import in_float32, visible_implementations, widened
from qwlora.graph.capture_check import BATCH, Axes, Tensors, check_graph, limited_axes
from qwlora.graph.nodes import (
    buffer_names,
    calls,
    module_path,
    operation,
    operator_of,
    place_of,
    used_placeholders,
)
from qwlora.graph.quantized_graph import Interface, with_graph
from qwlora.nn.frozen import refuse_meta
from qwlora.nn.packed_layer import PackedLayer
from qwlora.system.device import device_of, moved
from qwlora.system.parameter_names import adapter_of, canonical_name, parameter_name
from qwlora.system.quiet import OF_EXPORT, quiet

PAST, PRESENT, USE_CACHE = "past_key_values", "present", "use_cache"
CACHE = "cache"  # name of the argument in newer models
IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
EMBEDS = "inputs_embeds"  # instead of token ids
MASKS_OF = {MASK: IDS, "decoder_attention_mask": "decoder_input_ids"}
_aten = torch.ops.aten
_SAME_VALUES = (_aten.alias.default, _aten.lift_fresh_copy.default)
_STOPS = (_aten.detach.default, _aten.detach_.default)  # these stop gradients
_CASTS = (
    _aten.to.dtype,
    _aten.to.dtype_layout,
    _aten.to.device,
    _aten._to_copy.default,
    _aten.type_as.default,
)
_GRADIENT_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


@dataclass(frozen=True)
class Captured:
    """A graph, its inputs and outputs, and how they map to the model's arguments and result. If the
    graph starts from embeddings, it also has the module that embeds token ids."""

    program: ExportedProgram
    interface: Interface
    arguments: Structure
    result: Structure
    embeddings: nn.Module | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in order."""
        return self.interface.inputs

    def bind(self, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The graph's inputs from the model's arguments.

        Only arguments that do not change the result may differ from those of the capture:

            attention_mask     missing: all ones, including for positions in the cache
                               given but not captured: dropped if it is all ones
            position_ids       missing: 0, 1, 2, ... if nothing is masked and there is no cache
                               given but not captured: dropped if they are 0, 1, 2, ...
            input_ids          given but captured with inputs_embeds: their embeddings
            None               counts as not given
        """
        given = {name: value for name, value in arguments.items() if value is not None}
        if self.embeddings is not None and EMBEDS not in given and IDS in given:
            with torch.no_grad():
                given[EMBEDS] = self.embeddings(moved(given.pop(IDS), device_of(self.embeddings)))
        # with a cache, the model counts from the tokens in it
        if POSITIONS in given or PAST not in given:
            self._complete_positions_(given)
        if MASK in given and MASK not in self.inputs and _is_all_ones(given[MASK]):
            del given[MASK]
        for mask, name in MASKS_OF.items():
            ids = token_places(given, name)
            if mask not in given and mask in self.inputs and ids is not None:
                rows, tokens = ids.shape
                given[mask] = ids.new_ones(rows, tokens_in(given.get(PAST)) + tokens)
        tensors = tuple(widened(tensor) for tensor in self.arguments.flatten(given))
        self._check_sizes(tensors)
        return tensors

    def _check_sizes(self, tensors: Sequence[Tensor]) -> None:
        ranges = {str(symbol): known for symbol, known in self.program.range_constraints.items()}
        inputs = {n.name: n for n in self.program.graph.find_nodes(op="placeholder")}
        for tensor, (placeholder, name) in zip(tensors, self.input_names.items(), strict=True):
            sizes, shape = tuple(tensor.shape), self.interface.shapes[name]
            if len(sizes) != len(shape) or any(
                isinstance(fixed, int) and fixed != size
                for fixed, size in zip(shape, sizes, strict=True)
            ):
                raise CaptureError(
                    f"input {name} has shape {list(sizes)}; the graph takes "
                    f"[{', '.join(map(str, shape))}]. For another size, capture again"
                )
            for axis, symbol in enumerate(map(str, inputs[placeholder].meta["val"].shape)):
                known, size = ranges.get(symbol), sizes[axis]
                # torch.export writes 2 for "no lower bound"
                if known and not (known.lower <= max(size, 2) and size <= known.upper):
                    raise CaptureError(
                        f"input {name} has shape {list(sizes)}; the model takes {known.lower} to "
                        f"{known.upper} along axis {axis}"
                    )

    def _complete_positions_(self, given: dict[str, Any]) -> None:
        positions: Any = given.get(POSITIONS)
        ids = token_places(given, IDS)
        if POSITIONS not in self.inputs and positions is not None:
            counted = torch.arange(positions.shape[-1], device=positions.device)
            if not bool((positions == counted).all()):
                raise CaptureError(
                    f"{POSITIONS} do not count from zero, but the graph was captured with "
                    f"{', '.join(self.inputs)} and counts from the first token, padding included. "
                    f"Add {POSITIONS} to the example inputs of `simulate`"
                )
            del given[POSITIONS]
        elif POSITIONS in self.inputs and ids is not None:
            if positions is None:
                if MASK in given and not _is_all_ones(given[MASK]):
                    raise CaptureError(
                        f"the graph was captured with {POSITIONS}, and a masked batch needs them; "
                        f"give {POSITIONS}"
                    )
                positions = torch.arange(ids.shape[1], device=ids.device)[None]
            if positions.ndim == 2 and len(positions) == 1:  # one row for the whole batch
                positions = positions.expand(len(ids), -1)
            # the three axes of mrope are equal for text
            axes = len(self.interface.shapes[POSITIONS]) - positions.ndim
            given[POSITIONS] = positions.expand(3, -1, -1) if axes == 1 else positions

    @property
    def input_names(self) -> dict[str, str]:
        """Input names by placeholder."""
        return dict(zip(self.program.graph_signature.user_inputs, self.inputs, strict=True))

    def named(self, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """The graph's outputs by name."""
        return dict(zip(self.interface.outputs, outputs, strict=True))

    def result_of(self, outputs: Sequence[Tensor]) -> Any:
        """The graph's outputs in the model's result type."""
        return self.result.fill(dict(zip(self.result.names, outputs, strict=True)))


class FlatModel(nn.Module):
    """A model with positional tensors as arguments and a tuple of tensors as result."""

    def __init__(self, model: nn.Module, arguments: Structure):
        super().__init__()
        self.model, self.arguments = model, arguments
        self.cache_argument = cache_argument(model)

    def result(self, *tensors: Tensor) -> Any:
        arguments = self.arguments.fill(dict(zip(self.arguments.names, tensors, strict=True)))
        past = arguments.pop(PAST, None)
        if arguments.get(USE_CACHE):
            # an empty DynamicCache keeps every token, like the decode graph
            arguments[self.cache_argument] = past if past is not None else cache_of([])
        return self.model(**arguments)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return Structure.of(self.result(*tensors), PRESENT)[1]


def example_of(model: Any, ids: Tensor, as_embeddings: bool = False) -> dict[str, Tensor]:
    """Two equal sequences of at most 16 of these tokens, or their embeddings, as example inputs."""
    ids = ids[None, :16].repeat(2, 1)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if as_embeddings:
        on_device = example.pop("input_ids").to(device_of(model))
        example = {EMBEDS: model.get_input_embeddings()(on_device).detach(), **example}
        rotary = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        if "mrope_section" in rotary:  # positions of time, height and width
            example["position_ids"] = torch.arange(ids.shape[1]).expand(3, *ids.shape)
    return example


def capture(model: nn.Module, example_inputs: Mapping[str, Any], static: bool = False) -> Captured:
    """The graph of `model(**example_inputs)`.

    Args:
        example_inputs: tensors become inputs of the graph; numbers, strings and None become
            constants. `past_key_values` is a cache, or a pair of keys and values [batch, heads,
            tokens, width] for each layer. At least two tokens. `labels` of transformers models are
            ignored: the graph ends at the logits.
        static: fix every size to that of the example, which may then be 1.

    Raises:
        CaptureError: the model is in training mode, `torch.export` cannot capture it, or the
            graph's outputs differ from the module's in any bit, at the example's shape or another.
            The message names the first module whose output differs.
    """
    if any(module.training for module in model.modules()):
        raise CaptureError(
            "the model is in training mode; call model.eval() first, the graph is for evaluation"
        )
    for config in (getattr(model, "peft_config", None) or {}).values():
        if vars(config).get("alora_invocation_tokens"):
            raise CaptureError(
                "a graph treats all tokens alike, but activated LoRA (alora_invocation_tokens) "
                "does not. Train the adapter without it"
            )
    refuse_meta(model, CaptureError)
    arguments, given = Structure.of(_completed(model, example_inputs), PAST)
    # torch.export makes a size of 1 a constant, so a single row is doubled if the model allows it
    one, two = (_separate(given, rows) for rows in (1, 2))
    if not static and [t.shape for t in one] != [t.shape for t in two]:
        with suppress(CaptureError):
            captured = _captured(model, arguments, two, static)
            if _takes_rows(captured):
                return captured
    return _captured(model, arguments, one, static)


def _takes_rows(captured: Captured) -> bool:
    return any(BATCH in shape for shape in captured.interface.shapes.values())


def _captured(model: nn.Module, arguments: Structure, tensors: Tensors, static: bool) -> Captured:
    ids = [t for t in tensors if t.ndim == 2 and not t.is_floating_point()]
    if not (static or arguments.cached) and any(t.shape[1] < 2 for t in ids):
        raise CaptureError(
            "example inputs have one token, and torch.export makes a size of 1 constant; give two "
            "or more"
        )
    flat = FlatModel(model, arguments).eval()
    with in_float32(model), visible_implementations(model), torch.no_grad(), quiet(OF_EXPORT):
        axes_of = tuple(dict.fromkeys(range(t.ndim), Dim.AUTO) for t in tensors)
        shapes = None if static else {"tensors": axes_of}
        kind = type(model).__name__
        with foreign_as(CaptureError, f"torch.export cannot capture {kind}"), _fixed_sizes(kind):
            result, outputs = Structure.of(flat.result(*tensors), PRESENT)
            program = torch.export.export(flat, tensors, dynamic_shapes=shapes, strict=False)
        # tensor names in a file are unique
        taken = {*arguments.names, *(canonical_name(n) for n, _ in model.named_parameters())}
        names = tuple(f"out_{name}" if name in taken else name for name in result.names)
        floats = [n for n, t in zip(names, outputs, strict=True) if t.is_floating_point()]
        if not floats:
            raise CaptureError(
                f"{type(model).__name__} returns no floating point tensor (outputs: "
                f"{', '.join(names) or 'none'}), so there is nothing to simulate"
            )
        axes = Axes.of(program, arguments.names, tensors, arguments.cached)
        try:
            cleaned = _clean(program, flat, keep_layout=False)
            fixed = check_graph(cleaned, flat, tensors, axes, names)
        # a kernel may sum in another order in another layout, and a view may need the copy
        except (CaptureError, RuntimeError):
            cleaned = _clean(program, flat, keep_layout=True)
            fixed = check_graph(cleaned, flat, tensors, axes, names)
        fixed |= limited_axes(program, cleaned, flat, tensors, axes, names)
    if EMBEDS in arguments.names:
        _refuse_lost_adapters(cleaned, type(_unwrapped(model)).__name__)
    sizes = axes.shapes(cleaned, names, fixed)
    primary = "logits" if "logits" in floats else floats[0]
    interface = Interface(arguments.names, names, primary, sizes, arguments.cached)
    return Captured(cleaned, interface, arguments, result, _table(model, arguments))


def rebound(
    captured: Captured,
    program: ExportedProgram,
    model: nn.Module,
    example_inputs: Mapping[str, Any],
) -> Captured:
    """`captured` with `program`, the same graph with other weights. Its outputs must equal those of
    `model`."""
    given = Structure.of(_completed(model, example_inputs), PAST)[1]
    tensors = _separate(given, rows=1 + _takes_rows(captured))
    axes = Axes.of(program, captured.arguments.names, tensors)
    with in_float32(model), visible_implementations(model), torch.no_grad():
        flat = FlatModel(model, captured.arguments).eval()
        check_graph(program, flat, tensors, axes, captured.interface.outputs)
    return replace(captured, program=program, embeddings=_table(model, captured.arguments))


def _table(model: nn.Module, arguments: Structure) -> nn.Module | None:
    inner: Any = _unwrapped(model)
    return inner.get_input_embeddings() if EMBEDS in arguments.names else None


def _completed(model: nn.Module, example_inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments on the model's device, with a cache instead of pairs, and an explicit
    `use_cache`."""
    completed = moved(dict(example_inputs), device_of(model))
    # the loss is not part of the graph
    if isinstance(_unwrapped(model), PreTrainedModel):
        completed.pop(LABELS, None)
    if isinstance(completed.get(CACHE), Cache):
        completed[PAST] = completed.pop(CACHE)
    if isinstance(completed.get(PAST), tuple | list):
        completed[PAST] = cache_of([(key, value) for key, value, *_ in completed[PAST]])
    if completed.get(PAST) is not None:
        completed.setdefault(USE_CACHE, True)
    elif USE_CACHE in _parameters(model):
        completed.setdefault(USE_CACHE, False)
    config = getattr(_unwrapped(model), "config", None)
    if completed.get(USE_CACHE) and getattr(config, "is_encoder_decoder", False):
        raise CaptureError(
            f"{type(_unwrapped(model)).__name__} is an encoder-decoder with two caches per layer "
            "(EncoderDecoderCache), and a graph holds one. Capture without a cache "
            "(use_cache=False, no past_key_values): each call then computes all decoder tokens"
        )
    return completed


def cache_argument(model: nn.Module) -> str:
    """The name of the cache, in the arguments and the output of a model."""
    return CACHE if CACHE in _parameters(model) else PAST


def takes_cache(model: nn.Module) -> bool:
    """Whether a model can compute new tokens from a cache of those before."""
    return cache_argument(model) in _parameters(model)


def _unwrapped(model: nn.Module) -> nn.Module:
    return getattr(model, "get_base_model", lambda: model)()


def _parameters(model: nn.Module) -> set[str]:
    inner = _unwrapped(model)
    known = inspect.signature(inner.forward).parameters
    # a model that generates may hand on `use_cache` in its **kwargs (LLaVA)
    generates = isinstance(inner, PreTrainedModel) and inner.can_generate()
    hands_on = generates and any(p.kind is p.VAR_KEYWORD for p in known.values())
    return {*known, *inspect.signature(model.forward).parameters, *[USE_CACHE] * hands_on}


# explains the errors that torch calls data-dependent
@contextmanager
def _fixed_sizes(kind: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if "data-dependent" not in str(error):
            raise
        raise CaptureError(
            f"torch.export cannot capture {kind}: the values of an input decide how large other "
            "tensors are (data-dependent), such as the number of an image's patches. Run it in "
            "PyTorch, and capture the part of the model that takes its outputs"
        ) from error


def token_places(arguments: Mapping[str, Any], name: str) -> Tensor | None:
    """A tensor of integers [batch, tokens]: `arguments[name]`, or one sized like the embeddings."""
    ids, embeddings = arguments.get(name), arguments.get(EMBEDS)
    if name == IDS and isinstance(embeddings, Tensor):
        return embeddings[..., 0].long()
    return ids if isinstance(ids, Tensor) else None


def _separate(tensors: Tensors, rows: int) -> Tensors:
    with_axes = [t for t in tensors if t.ndim]
    if not with_axes:
        raise CaptureError("example inputs hold no tensor with an axis; give at least one")
    is_single = with_axes[0].shape[0] == 1
    repeated = (
        t.repeat(rows, *[1] * (t.ndim - 1)) if is_single and t.shape[:1] == (1,) else t
        for t in tensors
    )
    # torch.export merges inputs that are one tensor
    return tuple(widened(t).clone(memory_format=torch.contiguous_format) for t in repeated)


def _is_all_ones(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask == 1).all())


def _clean(program: ExportedProgram, flat: FlatModel, keep_layout: bool) -> ExportedProgram:
    graph = copy.deepcopy(program.graph)
    _inline_(graph, program.graph_module)
    learning = _learning(graph, program)
    for node in list(graph.nodes):
        if node.target is _aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is _aten.set_.source_Tensor:
            # PEFT parametrizes a parameter for one forward, which assigns its own storage to it
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)
        elif node.target in _STOPS and node in learning:
            # DoRA stops the gradient of its norm, and graphs are trained through
            node.target = _aten.detach.default
        elif (
            node.target in _STOPS
            or _changes_nothing(node)
            or (node.target is _aten.contiguous.default and not keep_layout)
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is _aten.cat.default:
            # torch ignores empty vectors, whatever the shapes of the others
            parts = [n for n in node.args[0] if n.meta["val"].ndim != 1 or n.meta["val"].shape[0]]
            node.args = (parts, *node.args[1:])
        elif (order := _new_order(node)) is not None:
            node.target, node.args = _aten.permute.default, (node.all_input_nodes[0], order)
    _dequantize_once_(graph, flat)
    # such as a weight of which only the dtype was read
    graph.eliminate_dead_code()
    cleaned = with_graph(program, graph)
    _refuse_hidden_codes(cleaned)
    return cleaned


def _learning(graph: Graph, program: ExportedProgram) -> set[Node]:
    """Nodes computed from trainable parameters."""
    trainable = {
        s.arg.name
        for s in program.graph_signature.input_specs
        if s.kind is InputKind.PARAMETER and program.state_dict[s.target].requires_grad
    }
    learning: set[Node] = set()
    for node in graph.nodes:
        if node.name in trainable or not learning.isdisjoint(node.all_input_nodes):
            learning.add(node)
    return learning


def _refuse_lost_adapters(program: ExportedProgram, kind: str) -> None:
    used, specs = used_placeholders(program), program.graph_signature.input_specs
    adapters = {adapter_of(str(s.target)) for s in specs if s.arg.name in used} - {None}
    names = {s.arg.name: str(s.target) for s in specs if s.arg.name not in used}
    if lost := [canonical_name(n) for n in names.values() if adapter_of(n) in adapters]:
        raise CaptureError(
            f"{len(lost)} weights of the adapter are not in the graph of {EMBEDS}, {lost[0]} first:"
            f" the graph is the language model of {kind}, and takes what the table and the vision "
            "tower return. Attach the adapter to layers of the language model only (target_modules)"
        )


def _refuse_hidden_codes(program: ExportedProgram) -> None:
    """Refuse a graph where something other than `dequantize` reads packed codes."""
    # such a weight has no float value in the graph, so it could have no encoding
    buffers = buffer_names(program)
    for node in calls(program):
        for source in node.all_input_nodes:
            path = buffers.get(source.name, "")
            if path.endswith(".packed") and operation(node) != "dequantize":
                raise CaptureError(
                    f"{parameter_name(path.removesuffix('.packed'))}: {operation(node)} reads its "
                    "codes, so the weight would have no encoding. Call the packed layer (layer(x)) "
                    "or read layer.weight, and capture again"
                )


def _dequantize_once_(graph: Graph, flat: FlatModel) -> None:
    """Merge the nodes that dequantize one layer (it ran twice, or its adapter reads the weight)."""
    # a tied layer keeps its own node, because nodes carry the name of their layer
    packed = {
        path: module
        for path, module in flat.named_modules(remove_duplicate=False)
        if isinstance(module, PackedLayer)
    }
    first: dict[tuple[Any, ...], list[tuple[nn.Module | None, Node]]] = {}
    for node in list(graph.nodes):
        if operation(node) != "dequantize":
            continue
        layer = packed.get(module_path(node).partition("@")[0])
        earlier = first.setdefault(node.args, [])
        same = [n for reader, n in earlier if layer is None or reader in (None, layer)]
        if same:
            node.replace_all_uses_with(same[0])
            graph.erase_node(node)
        else:
            earlier.append((layer, node))


def _changes_nothing(node: Node) -> bool:
    # its last argument says whether the model trains
    if node.target is _aten.dropout.default:
        return node.args[2] is False
    if node.target in _CASTS:
        before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
        return bool(before.dtype == after.dtype and before.device == after.device)
    return node.target in _SAME_VALUES


def _new_order(node: Node) -> list[int] | None:
    """The axis order of an einsum that only permutes one tensor; None for any other einsum."""
    # as a permutation it moves data, so it shares the encoding of its input
    if node.target is not _aten.einsum.default or len(node.all_input_nodes) != 1:
        return None
    before, _, after = str(node.args[0]).replace(" ", "").partition("->")
    is_order = len(before) == len(set(before)) and sorted(before) == sorted(after)
    return [before.index(axis) for axis in after] if is_order else None


def _inline_(graph: Graph, owner: GraphModule) -> None:
    """Replace nested graphs by their nodes; refuses those that cannot be inlined."""
    # torch.export makes nested graphs from `with torch.enable_grad()` and from disabled autocast
    for node in list(graph.nodes):
        held = [a for a in node.all_input_nodes if a.op == "get_attr"]
        modules = (getattr(owner, str(attribute.target), None) for attribute in held)
        inner = next((module for module in modules if isinstance(module, GraphModule)), None)
        if node.op != "call_function" or inner is None:
            continue
        body = copy.deepcopy(inner.graph)
        _inline_(body, inner)
        if node.target is _GRADIENT_MODE:
            arguments = node.args[2:]
        elif node.target is _AUTOCAST and not node.args[2]:  # not enabled
            arguments = node.args[5:]
        else:
            raise CaptureError(
                f"{place_of(node)} runs {operator_of(node)}, a nested graph whose values could not "
                "be quantized: autocast, a branch on data, or a loop. Write that part without it "
                "(cast the model with model.to(dtype), use torch.where), and capture again"
            )
        placeholders = [n for n in body.nodes if n.op == "placeholder"]
        values: dict[Node, Any] = dict(zip(placeholders, arguments, strict=True))
        with graph.inserting_before(node):
            results = graph.graph_copy(body, values)
        for user in list(node.users):  # a getitem for each result
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.erase_node(user)
        graph.erase_node(node)
        for attribute in held:
            if not attribute.users:
                graph.erase_node(attribute)
