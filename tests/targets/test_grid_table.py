"""Which targets hold which grid and architecture: before anything runs, with the nearest scheme that
would do, and as docs/support.md says."""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cli.command_line import answered
from cli.command_line import refused as refused_command
from qwlora.grid.scheme import Lpbq, PerBlock, Scheme, parse_scheme
from qwlora.quantize.solvers import ROUNDING_SOLVERS
from qwlora.recipe.yaml_core import load_yaml
from qwlora.targets.refusals import (
    Subject,
    Weight,
    genie_notes,
    genie_tokens,
    held_grids,
    nearest,
    refusals,
    refused,
)
from qwlora.targets.registry import TARGETS, VLLM
from qwlora.targets.target import LayerKind
from targets.client_programs import TARGETS_OF_CLIENTS
from targets.support_matrix import ARCHITECTURES, WEIGHTS, cell, outcome, scheme_table, written

KINDS = ("tensor", "channel", "block16", "block32", "block64", "block96", "block128")
ALL = [
    f"w{bits}-{kind}{end}" for bits in range(2, 9) for kind in KINDS for end in ("", "-asymmetric")
]
ALL += [f"w{bits}-signed{size}" for bits in range(2, 9) for size in (16, 32, 96)]


def problems(target: str, weight: Weight) -> str:
    return "; ".join(refusals(TARGETS[target], Subject(weights={"all": weight})))


@pytest.mark.parametrize(
    ("asked", "targets", "best"),
    [
        ("w4-block32", ["hf", "gguf", "mlx"], "w4-block32"),
        ("w3-block32", ["gguf"], "w4-block32"),
        ("w7-block32", ["mlx"], "w8-block32"),  # more bits win over fewer
        ("w4-block48", ["mlx"], "w4-block64"),
        ("w4-block32-asymmetric", ["gguf"], "w4-block32"),
        ("w4-channel", ["gguf"], "w4-block32"),  # GGUF has float16 scales
        ("w6-block64-asymmetric", ["gguf", "hf"], "w5-block64"),
        ("w4-signed32", ["onnx", "genai", "hf", "gguf", "mlx", "openvino"], "w4-signed32"),
        ("w3-signed32", ["gguf"], "w4-signed32"),
        ("w4-signed16", ["aimet", "qairt"], "w4-signed16"),
        ("w4-signed64", ["hf", "qairt_pipeline"], "w4-signed64"),
        ("w4-signed64", ["hf", "qnn"], "w4-block64"),
        ("w2-tensor", ["qnn"], "w2-block32"),
        ("w4-channel-asymmetric", ["qnn"], "w4-channel"),
        ("w16-block16", ["qnn"], "w8-block16"),
        ("w4-block32", ["executorch"], "w4-bf16block32"),
        ("w8-bf16block32", ["executorch"], "w8-channel"),
        ("w4-channel-asymmetric", ["executorch"], "w4-channel"),
    ],
)
def test_the_nearest_scheme_that_all_hold(asked: str, targets: list[str], best: str) -> None:
    found = nearest(parse_scheme(asked), [TARGETS[name] for name in targets])
    assert found == parse_scheme(best)


@pytest.mark.parametrize("asked", ALL)
def test_the_nearest_scheme_is_held_and_none_is_nearer(asked: str) -> None:
    scheme = parse_scheme(asked)
    for_all = nearest(scheme, list(TARGETS.values()))  # there always is one
    assert not any(problems(name, Weight(for_all, "search")) for name in TARGETS)
    for name, target in TARGETS.items():
        found = nearest(scheme, [target])
        assert not problems(name, Weight(found, "search"))
        if not problems(name, Weight(scheme, "search")):
            assert found == scheme


HELD = {  # of those that docs/support.md leaves out
    "qnn": "w8-tensor w4-block16 w2-block16 w16-channel w8-block16 w4-lpbq16",
    "qnn EMBEDDING": "w8-tensor",
}
LACKING = [
    ("qnn", "w2-channel", "4, 8, 16 bits with scales per channel"),
    ("qnn", "w2-tensor", "4, 8, 16 bits with scales per tensor"),
    ("qnn", "w4-channel-asymmetric", "no integer zero points"),
    ("qnn", "w16-block16", "2, 4, 8 bits with blocks"),
    ("qnn", "w4-signed32", "no signed scales"),
    *(("qnn 8", n, "input 16 bits") for n in ("w8-block16", "w4-lpbq16", "w16-channel")),
    *(("qnn EMBEDDING", n, "weights: w8-tensor") for n in ("w4-channel", "w4-tensor")),
    *(("qnn EMBEDDING", n, "weights: w8-tensor") for n in ("w8-channel", "w8-block32")),
    ("vllm", "w8-block32-asymmetric", "4 bits with integer zero points"),
    ("vllm", "w4-block16", "blocks of 32, 64"),
    ("vllm", "w4-tensor", "no scales per tensor"),
    ("vllm", "w4-block32 w8-channel", "need one scheme"),
    ("executorch", "w4-block32", "blocks of kind bf16block"),
    ("genai", "w4-block8", "blocks"),
]
CASES = [(kind, name, "") for kind, names in HELD.items() for name in names.split()] + LACKING


@pytest.mark.parametrize(("kind", "names", "problem"), CASES)
def test_what_a_target_holds_is_known(kind: str, names: str, problem: str) -> None:
    """With inputs of 8 bits, or of an embedding, where its name says so."""
    name, _, more = kind.partition(" ")
    target = replace(TARGETS["hf"], limits=VLLM) if name == "vllm" else TARGETS[name]
    layer = LayerKind.EMBEDDING if more == "EMBEDDING" else LayerKind.LINEAR
    weights = {each: Weight(parse_scheme(each), kind=layer) for each in names.split()}
    subject = Subject(weights=weights, input_bits=8 if more == "8" else 16)
    found = "; ".join(refusals(target, subject))
    assert problem in found
    assert bool(found) == bool(problem)


def test_a_refusal_names_each_target_and_a_remedy_that_is_none() -> None:
    grids = {"all": Weight(parse_scheme("w3-block64-asymmetric"), "gptq")}
    grids["head"] = Weight(Scheme(8, True), "gptq")
    _, found = refused(["hf", "gguf"], Subject(weights=grids))
    assert "target gguf: all: int3 asymmetric per block 64: GGUF has no" in found
    assert "hf and gguf can hold: w4-block64 instead of w3-block64-asymmetric, w8-block32" in found
    remedied = {name: Weight(parse_scheme(name), "gptq") for name in ("w4-block64", "w8-block32")}
    assert not [*refused(["hf", "gguf"], Subject(weights=remedied))]


def test_embeddings_are_floats_where_a_target_stores_floats() -> None:
    weights = {"table": Weight(Scheme(8), None, LayerKind.EMBEDDING), "q": Weight(Scheme(8))}
    subject = Subject(weights=weights)
    assert [*held_grids(TARGETS["hf"], subject)] == ["floats (table)", "w8-tensor (q)"]
    assert [*held_grids(TARGETS["onnx"], subject)] == ["w8-tensor (table)", "w8-tensor (q)"]


def test_a_conflict_between_layers_is_resolved_for_all_of_them() -> None:
    names = [f"w{bits}-block32-asymmetric" for bits in (4, 8)]
    subject = Subject(weights={name: Weight(parse_scheme(name), "rtn") for name in names})
    (found,) = refused(["hf"], subject)
    assert "w4-block32 instead of w4-block32-asymmetric" in found


def test_a_solver_that_leaves_scales_in_float32_is_refused_where_the_files_hold_float16() -> None:
    scheme = Scheme(4, True, PerBlock(32))
    assert "its scales are float32" in problems("gguf", Weight(scheme, "rtn"))
    assert "float32" in problems("gguf", Weight(Scheme(4, True, Lpbq(32)), "gptq"))
    for solver in (*ROUNDING_SOLVERS, None):  # None: the numbers are there, and checked on writing
        assert not problems("gguf", Weight(scheme, solver))
    (found,) = refused(["gguf"], Subject(weights={"all": Weight(scheme, "rtn")}))
    assert "gptq round" in found
    float_offset = Scheme(4, False, PerBlock(32), float_offset=True)
    assert problems("hf", Weight(float_offset))
    assert not problems("hf", Weight(float_offset, kind=LayerKind.EMBEDDING))  # written as floats


def test_check_names_the_targets_of_the_recipe_only(recipe_for: Any) -> None:
    base, export = {"weights": "w3-block32"}, {"targets": ["mlx"]}
    said = answered("check", recipe_for(base=base, export=export))
    assert "# mlx holds w3-block32 (base.weights)\n" in said
    assert not [name for name in TARGETS if name != "mlx" and f" {name} " in said]
    assert load_yaml(said)["base"]["weights"] == "w3-block32"
    # A grid that a target lacks is refused, with the nearest that it holds.
    recipe = recipe_for(base=base, export={"targets": ["gguf"]})
    assert "w4-block32" in refused_command("check", recipe)


GRAPHS = [(512, 1024), (1, 1024), (1, 512)]


def test_what_genie_lacks_is_known_before_anything_is_written() -> None:
    config = SimpleNamespace(rope_parameters={"rope_type": "yarn"}, sliding_window=512)
    config.get_text_config = lambda: config
    model: Any = SimpleNamespace(config=config)
    subject = Subject(model=model, layout="genie", takes_tokens=False, graphs=GRAPHS)
    said = ["token ids", "tokens, but the tokenizer has no", "yarn", "at most 512"]
    said += ["(512 and 1024)", "tokenizer.json"]
    for reason, words in zip(refusals(TARGETS["qnn"], subject), said, strict=True):
        assert words in reason
    assert not refusals(TARGETS["onnx"], subject)


@pytest.mark.parametrize(
    ("of_model", "of_tokenizer", "tokens", "noted"),
    [
        ({"bos": 1, "eos": [2, 3]}, {"bos": 8, "pad": 9}, (1, [2, 3]), ""),
        ({"eos": 2, "pad": None}, {"pad": 9}, (9, 2), "bos-token.* token 9"),
        ({"eos": [2, 3]}, {}, (2, [2, 3]), "bos-token.* token 2"),
        ({}, {"bos": 1, "eos": 2}, (1, 2), "bos-token.* 1.*eos-token.* 2"),
        ({"pad": 0}, {}, (0, 0), "bos-token.* 0.*eos-token.* 0"),  # 0 is an id
    ],
)
def test_genie_begins_a_text_of_a_model_without_bos_with_another_token(
    of_model: Any, of_tokenizer: Any, tokens: tuple[Any, Any], noted: str
) -> None:
    config, tokenizer = (
        SimpleNamespace(**{f"{kind}_token_id": token for kind, token in ids.items()})
        for ids in (of_model, of_tokenizer)
    )
    assert tuple(genie_tokens(config, tokenizer).values()) == tokens
    config.get_text_config, tokenizer.backend_tokenizer = lambda: config, object()
    model: Any = SimpleNamespace(config=config)
    subject = Subject(model=model, tokenizer=tokenizer, layout="genie")
    assert not refusals(TARGETS["qnn"], subject)
    found = "; ".join(genie_notes(subject))
    assert re.search(noted, found)
    assert bool(found) == bool(noted)


# what is quickest to show to be out of date, in every run; the rest takes minutes
FAST = {("Llama", "hf"), ("GPT-2", "hf"), ("Mixtral", "hf")}


def marks(architecture: str, name: str) -> list[pytest.MarkDecorator]:
    slow = [] if (architecture, name) in FAST else [pytest.mark.slow]
    return [*slow, *([pytest.mark.client] if name in TARGETS_OF_CLIENTS else [])]


RUNS = [
    pytest.param(architecture, name, marks=marks(architecture, name))
    for architecture in ARCHITECTURES
    for name in WEIGHTS
]


def test_the_table_of_schemes_is_up_to_date() -> None:
    assert scheme_table() in written("Schemes")


@pytest.mark.parametrize(("architecture", "name"), RUNS)
def test_the_table_of_architectures_is_what_runs(architecture: str, name: str) -> None:
    assert outcome(architecture, name) == cell(architecture, name)
