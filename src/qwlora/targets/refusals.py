"""Why something cannot be exported to a target: the one place that decides. Imports no torch.

    refusals(target, subject)    the reasons; none if it can

A `Subject` holds what is known about an export. At first that is the sections of a recipe, then the
model and its integers and adapters from files, and finally the layers that are written. The limits
of a target are data: fields of `Target` and `FormatLimits`, filled in `registry.py`.

Recipes, preflight, `qwlora check` and the writers ask here. A writer refuses by itself only what
shows in the graph that it captured or in the numbers that it writes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.errors import QwloraError, lines, listed
from qwlora.grid.scheme import (
    Bf16Block,
    Blocks,
    Granularity,
    PerBlock,
    PerChannel,
    PerTensor,
    Scheme,
    short_name,
)
from qwlora.quantize.solvers import ROUNDING_SOLVERS
from qwlora.targets.npu.htp_limits import NORM_REMEDY
from qwlora.targets.registry import TARGETS, VLLM
from qwlora.targets.target import FormatLimits, LayerKind, Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SIZES = (32, 64, 128)
# In this order: of equally near ones, `nearest` names the first, so bfloat16 scales come last.
_GRANULARITIES: tuple[Granularity, ...] = (
    *map(PerBlock, _SIZES),
    PerChannel(),
    PerTensor(),
    *map(Bf16Block, _SIZES),
)

_ACTIVATIONS = "activation_bitwidth", "adapter_activation_bitwidth"  # keys of simulation
_ONLY = "and only LoRA factors of linear layers can be switched"
_EACH = "or use export.targets: [onnx_each], which writes a model for each adapter"


@dataclass(frozen=True)
class Weight:
    """A packed weight, or those that one key of the recipe gives a grid.

    Args:
        scheme: None if it is not known yet.
        solver: chooses its numbers; None if they exist already, keep if they are not float16.
        columns: values in a row; None if they are not known yet.
    """

    scheme: Scheme | None
    solver: str | None = None
    kind: LayerKind = LayerKind.LINEAR
    columns: int | None = None


@dataclass(frozen=True)
class AdapterParts:
    """What an adapter is made of.

    Args:
        others: what it has next to LoRA factors.
        places: layers that its factors change and that are not linear.
        sequence_tokens: of its text; None if it is not known.
    """

    name: str
    others: Sequence[str] = ()
    places: Sequence[str] = ()
    is_mergeable: bool = False
    sequence_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What would be exported. Defaults stand for what is not known yet.

    Args:
        weights: by the key of the recipe that asks for them, or by name.
        source: the file or folder of the model.
        keeps: whether the integers of `source` are taken unchanged.
        float_embedding: path of the embedding, if it stays float.
        model: with or without weights.
        input_bits: bitwidth of the activations that weights are multiplied with.
        simulation: section `simulation` of the recipe.
        embedding_bits, layout: keys of section `export` of the recipe.
        graphs: new tokens and context of each of its graphs.
        trains_graph: whether adapters are trained through calibrated activations.
        takes_tokens: whether its graphs take token ids and have a key-value cache.
    """

    weights: Mapping[str, Weight] = field(default_factory=dict)
    source: Path | None = None
    keeps: bool = False
    float_embedding: str | None = None
    model: PreTrainedModel | None = None
    tokenizer: Any = None
    adapters: Sequence[AdapterParts] = ()
    input_bits: int = 16
    simulation: Mapping[str, Any] | None = None
    embedding_bits: int | None = None
    trains_graph: bool = False
    layout: str | None = None
    graphs: Sequence[tuple[int, int]] = ()
    takes_tokens: bool = True


def refusals(target: Target, subject: Subject) -> list[str]:
    """Why a target cannot hold a subject, by what is known of it yet; empty if it can."""
    parts = _weights, _settings, _adapters, _model, _layout
    return [reason for part in parts for reason in part(target, subject)]


def refused(names: Iterable[str], subject: Subject) -> Iterator[str]:
    """A line for each of these targets that cannot hold a subject: why, and what to change."""
    targets = {name: TARGETS[name] for name in names}
    for name, target in targets.items():
        if reasons := refusals(target, subject):
            remedy = _nearest_schemes(targets, subject) if [*_weights(target, subject)] else ""
            yield f"target {name}: {'; '.join(reasons)}. {remedy}Change it, or use other targets"


def refuse(names: Iterable[str], subject: Subject, error: type[QwloraError]) -> None:
    """Raise an `error` with all reasons why one of these targets cannot hold a subject."""
    if reasons := list(refused(names, subject)):
        raise error("; ".join(reasons))


def comes_from(target: Target, source: Path | None) -> bool:
    """Whether `source` is a file of the target's own format."""
    return source is not None and source.suffix == target.source_suffix != ""


def _integers(target: Target, subject: Subject) -> dict[str, Weight]:
    """The weights whose integers the target writes, as far as their schemes are known."""
    # A GGUF file whose integers are kept is copied, also with types that we do not write.
    if subject.keeps and comes_from(target, subject.source):
        return {}
    floats = [LayerKind.EMBEDDING] if target.limits.has_float_embeddings else []
    return {n: w for n, w in subject.weights.items() if w.scheme and w.kind not in floats}


def _weights(target: Target, subject: Subject) -> Iterator[str]:
    limits, names_by_problem = target.limits, dict[str, list[str]]()
    held = _integers(target, subject)
    for name, weight in subject.weights.items():
        problem = _grid(limits, weight, subject.input_bits) if name in held else None
        if weight.kind in limits.refused:
            problem = f"{limits.name} {limits.refused[weight.kind]}"
        if problem is not None:
            names_by_problem.setdefault(problem, []).append(name)
    problems = [f"{listed(names, 3)}: {text}" for text, names in names_by_problem.items()]
    yield from lines(problems) or _together(limits, held.values())
    if limits.tables is not None and subject.float_embedding is not None:
        yield f"{subject.float_embedding} stays float. {limits.tables.remedy}"


def _together(limits: FormatLimits, weights: Iterable[Weight]) -> Iterator[str]:
    """What the limits of the files say about schemes that they allow one by one."""
    schemes = {weight.scheme for weight in weights}
    is_symmetric = all(scheme.symmetric for scheme in schemes if scheme)
    same = limits.same_scheme or ("" if is_symmetric else limits.same_if_asymmetric)
    if same and len(schemes) > 1:
        yield f"{listed(sorted(map(str, schemes)))} together: {same}"


def _grid(limits: FormatLimits, weight: Weight, input_bits: int) -> str | None:
    """What the limits of the files say about one grid; None if they allow it."""
    if input_bits == 8 and limits.with_8_bits is not None:
        limits = limits.with_8_bits
    if weight.kind is LayerKind.EMBEDDING and limits.tables is not None:
        limits = limits.tables
    problem = next(_grid_problems(limits, weight), None)
    end = f". {limits.remedy}" if limits.remedy else ""
    return f"{weight.scheme}: {problem}{end}" if problem else None


def _grid_problems(limits: FormatLimits, weight: Weight) -> Iterator[str]:
    if (scheme := weight.scheme) is None:
        return
    blocks, name = scheme.granularity, limits.name
    by_offset = limits.symmetric, "symmetric grids"
    if scheme.float_offset:
        by_offset = limits.float_offset, "float offsets"
    elif not scheme.symmetric:
        by_offset = limits.zero_point, "integer zero points"
    by_size = limits.block_bits, "blocks"
    if not isinstance(blocks, Blocks):
        is_whole = isinstance(blocks, PerTensor)
        by_size = (limits.tensor_bits if is_whole else limits.channel_bits), f"scales per {blocks}"
    for bits, what in (by_offset, by_size):
        if scheme.bitwidth not in bits:
            yield f"{name} has {f'{listed(bits, 9)} bits with' if bits else 'no'} {what}"
    if scheme.granularity.is_signed and not limits.has_signed_scales:
        yield f"{name} has no signed scales"
    if isinstance(blocks, Blocks):
        if blocks.size % limits.block:
            yield f"{name} has blocks of {limits.block} and multiples of it"
        if blocks.size not in (limits.block_sizes or [blocks.size]):
            yield f"{name} has blocks of {listed(limits.block_sizes)}"
        if not isinstance(blocks, limits.block_kind):
            yield f"{name} has blocks of kind {limits.block_kind.kind}"
    columns, sizes = weight.columns, limits.stored_blocks
    if sizes and columns is not None and limits.stored_block(scheme, columns) is None:
        yield f"{columns} inputs do not divide into blocks of {sizes[-1]}"
    # These solvers choose scales that float16 holds, where a scale is free; others keep float32.
    is_rounded = scheme.granularity.is_free and weight.solver in (None, *ROUNDING_SOLVERS)
    if limits.has_float16_scales and not is_rounded and weight.solver is not None:
        rounding = ", ".join(ROUNDING_SOLVERS)
        yield f"its scales are float32, {name} has float16. {rounding} round those of blocks"


def _settings(target: Target, subject: Subject) -> Iterator[str]:
    if subject.embedding_bits not in (None, *target.embedding_bits):
        held = " or ".join(map(str, target.embedding_bits))
        yield f"export.embedding_bits: the files hold {held} bits only"
    if target.has_cases and subject.trains_graph:
        yield (
            "workflow qwa-lora: use cases are calibrated after training, which would replace the "
            "grids used in training. Use workflow qw-lora"
        )
    if subject.simulation is None:
        return
    keys = subject.simulation
    rules, has_floats = enumerate(keys["rules"]), keys["policy"] == "weights-only"
    bits = {} if has_floats else {key: keys[key] for key in _ACTIVATIONS}
    bits |= {f"rules.{n}.bitwidth": r["bitwidth"] for n, r in rules if r["of"] != "weights"}
    widths = target.activation_bitwidths
    wrong = [f"simulation.{key} {b}" for key, b in bits.items() if b not in (None, *widths)]
    if target.is_simulated and wrong:
        yield f"{', '.join(wrong)}: activations must have {' or '.join(map(str, widths))} bits"
    if target.simulation:
        is_float = has_floats and not target.compilers
        yield from _float_graphs(keys) if is_float else _graphs(target, keys)


def _float_graphs(keys: Mapping[str, Any]) -> Iterator[str]:
    # Weights alone are on grids, so settings of any other grid would silently do nothing.
    if keys["key_value_bitwidth"] is not None:
        yield (
            "remove simulation.key_value_bitwidth: policy weights-only keeps keys and values float"
        )
    for number, rule in enumerate(keys["rules"]):
        if rule["of"] != "weights" and rule["keep"] is None:
            yield f"set simulation.rules.{number}.of: weights, or simulation.policy: npu"


def _graphs(target: Target, keys: Mapping[str, Any]) -> Iterator[str]:
    wanted = dict(target.simulation)
    if target.compilers:
        wanted["adapter_activation_bitwidth"] = [keys["activation_bitwidth"], None]
    for key, values in wanted.items():
        if keys[key] not in values:
            yield f"set simulation.{key}: {' or '.join(map(str, values)).lower()}"
    for number, rule in enumerate(keys["rules"]):
        if rule["keep"] is not None:
            yield f"simulation.rules.{number}: every value needs a grid; remove keep: float"
    norm = {"of": "weights", "bitwidth": 8, "symmetric": False}.items()
    is_narrow = target.compilers and keys["activation_bitwidth"] == 8
    if is_narrow and not any(rule.items() >= norm for rule in keys["rules"]):
        yield NORM_REMEDY


def _adapters(target: Target, subject: Subject) -> Iterator[str]:
    for adapter in subject.adapters:
        what = f"adapter {adapter.name}"
        if adapter.name.lower() in target.taken_names:  # some file systems ignore case
            yield f"{what} has the name of another file of the export; choose another name"
        if target.holds_factors_only and adapter.others:
            remedy = "Train without dora, target_parameters, lora_bias and modules_to_save"
            yield f"{what} has {listed(adapter.others, 3)}, {_ONLY}. {remedy}, {_EACH}"
        if target.holds_factors_only and not target.is_simulated and adapter.places:
            remedy = "Name the linear layers in target_modules, for example [q_proj, v_proj]"
            yield f"{what} changes {listed(adapter.places)}, {_ONLY}. {remedy}, {_EACH}"
        if target.holds_factors_only and adapter.is_mergeable:
            yield (
                f"{what} is mergeable: it changes the base's integers, which separate adapter "
                "files cannot do. Merge it (`qwlora merge`, qwlora.merged_model) and export the "
                f"merged base, {_EACH}"
            )
    tokens = {a.name: a.sequence_tokens for a in subject.adapters if a.sequence_tokens is not None}
    if target.has_cases and len(set(tokens.values())) > 1:
        lengths = listed(f"{name} {count}" for name, count in tokens.items())
        yield (
            f"adapters[].data.sequence_tokens: {lengths}, but all adapters share one graph of a "
            "fixed length. Use equal values"
        )


def _model(target: Target, subject: Subject) -> Iterator[str]:
    # Graphs are captured from any architecture, and a GGUF model is one that llama.cpp has.
    is_held = target.is_simulated or comes_from(target, subject.source)
    if subject.model is not None and not is_held:
        yield from filter(None, [target.backend.model_problem(subject.model, subject.tokenizer)])


def _layout(target: Target, subject: Subject) -> Iterator[str]:
    model: Any = subject.model
    if subject.layout not in target.graph_layouts or model is None:
        return
    if not subject.takes_tokens:
        yield "layout genie is for causal language models that take token ids; leave it out"
    config = model.config.get_text_config()
    if not genie_tokens(config, subject.tokenizer):
        yield "Genie needs begin and end tokens, but the tokenizer has no bos, eos or pad"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ("default", "llama3"):
        yield f"Genie has no key for positions of rope_type {rope}; remove export.layout"
    window = getattr(config, "sliding_window", None) or math.inf
    if any(context > window for _, context in subject.graphs):
        yield (
            f"the model attends to the last {window} tokens, but Genie to the whole context; set "
            f"export.graphs.context to at most {window}"
        )
    # Tried in libGenie of QNN 2.51: cached and new keys then have one shape, and it takes one for
    # the other (docs/log/runtimes.md).
    if wrong := [f"{new} and {context}" for new, context in subject.graphs if context == 2 * new]:
        yield (
            "Genie computes different tokens if the context is twice the new tokens "
            f"({listed(wrong)}); set another one in export.graphs"
        )
    if getattr(subject.tokenizer, "backend_tokenizer", None) is None:
        yield "Genie needs a tokenizer.json. Add a fast tokenizer (tokenizer= in Python)"


def genie_tokens(config: Any, tokenizer: Any) -> dict[str, int | list[int]]:
    """The tokens with which Genie begins and ends every text, by its keys; empty if there are none.
    A model without one of them has its padding token in its place, or else the other one."""

    def first(*names: str) -> Any:
        tokens = (getattr(s, f"{n}_token_id", None) for n, s in product(names, (config, tokenizer)))
        return next((token for token in tokens if token is not None), None)

    bos, eos = first("bos", "pad", "eos"), first("eos", "pad", "bos")
    if eos is None:
        return {}
    return {"bos-token": bos[0] if isinstance(bos, list) else bos, "eos-token": eos}


def nearest(scheme: Scheme, targets: Collection[Target], input_bits: int = 16) -> Scheme:
    """The closest scheme that all targets can hold: the closest bitwidth (more bits win a tie),
    then the same symmetry, then the closest block size. All targets hold w4-bf16block32, except
    with 8-bit activations; if no scheme fits all targets, returns `scheme` itself."""
    asked = scheme.granularity
    granularities = [*_GRANULARITIES, asked]
    # If a target lacks a kind of blocks, plain blocks of the same size are the nearest.
    if isinstance(asked, Blocks):
        granularities.append(PerBlock(asked.size))
    candidates = [
        Scheme(bitwidth, symmetric, granularity)
        for bitwidth, symmetric, granularity in product(range(2, 9), (True, False), granularities)
        if symmetric or not granularity.is_only_symmetric
    ]
    # With a solver that rounds scales: it is the scheme that is asked for, not its numbers.
    held = [
        candidate
        for candidate in candidates
        if not any(_grid(t.limits, Weight(candidate, "search"), input_bits) for t in targets)
    ]
    return min(held, key=lambda candidate: _distance(scheme, candidate), default=scheme)


def _distance(asked: Scheme, other: Scheme) -> tuple[float, ...]:
    bits = other.bitwidth - asked.bitwidth
    of_block = 0.0
    if asked.granularity != other.granularity:
        sizes = [s.granularity.size for s in (asked, other) if isinstance(s.granularity, Blocks)]
        # No blocks at all is further than any other size: no two sizes differ by 20 doublings.
        of_block = 1 + (abs(math.log2(sizes[0] / sizes[1])) if len(sizes) == 2 else 20)
    return abs(bits), bits < 0, other.symmetric != asked.symmetric, of_block


def _nearest_schemes(targets: Mapping[str, Target], subject: Subject) -> str:
    """What to change in schemes and solvers so that all targets hold the weights, as a sentence.
    Empty for integers that exist already."""
    chosen = [w for w in subject.weights.values() if w.scheme and w.solver not in (None, "keep")]
    kinds, bits = list(targets.values()), subject.input_bits
    best = {w.scheme: nearest(w.scheme, kinds, bits) for w in chosen if w.scheme}
    # Schemes that hold one by one may not hold together; of symmetric ones, more do.
    if any([*_together(target.limits, map(Weight, best.values()))] for target in kinds):
        symmetric = {scheme: replace(scheme, symmetric=True) for scheme in best}
        best = {scheme: nearest(other, kinds, bits) for scheme, other in symmetric.items()}
    pairs = ((short_name(new), short_name(old)) for old, new in best.items() if new != old)
    changes = ", ".join(f"{new} instead of {old}" for new, old in pairs)
    return f"The nearest that {' and '.join(targets)} can hold: {changes}. " if changes else ""


def held_grids(target: Target, subject: Subject) -> Iterator[str]:
    """The grids of a base as `target` stores them, each with the layers that have it."""
    for name, weight in subject.weights.items():
        if weight.scheme is not None:
            is_table = weight.kind is LayerKind.EMBEDDING
            as_floats = is_table and target.limits.has_float_embeddings
            yield f"{'floats' if as_floats else short_name(weight.scheme)} ({name})"


def notes(subject: Subject, chosen: Collection[str]) -> list[str]:
    """Which programs and chips compute the grids of the chosen targets otherwise, or not."""
    texts = []
    for_vllm = refusals(replace(TARGETS["hf"], limits=VLLM), subject)
    if "hf" in chosen and for_vllm:
        texts.append(f"hf: vLLM does not compute this base: {'; '.join(for_vllm)}")
    texts += [f"warning: {note}" for note in chip_notes(subject, chosen)]
    if {"gguf", "mlx"} & {*chosen}:
        texts.append("`qwlora run` checks architecture and tokenizer before it quantizes")
    return texts


def chip_notes(subject: Subject, chosen: Iterable[str]) -> list[str]:
    """Which grids of layers the chip of a target does not compute, where its files hold them."""
    # Names are keys, since several weights can have one problem.
    names_by_problem: dict[str, dict[str, None]] = {}
    for name, weight in product(chosen, subject.weights.values()):
        if (chip := TARGETS[name].chip) is None or weight.kind is LayerKind.EMBEDDING:
            continue
        if problem := _grid(chip, weight, subject.input_bits):
            names_by_problem.setdefault(problem, {})[name] = None
    return [f"{', '.join(names)}: {text}" for text, names in sorted(names_by_problem.items())]


def genie_notes(subject: Subject) -> Iterator[str]:
    """Which token Genie gets in place of one that the model lacks."""
    model: Any = subject.model
    if subject.layout is not None and model is not None:
        config = model.config.get_text_config()
        for key, token in genie_tokens(config, subject.tokenizer).items():
            if getattr(config, f"{key[:3]}_token_id", None) is None:
                yield f"layout genie: the model has no {key}; genie_config.json has token {token}"
