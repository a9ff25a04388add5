"""Which targets hold which grid: before anything runs, with the nearest scheme that would do."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cli.command_line import answered
from cli.command_line import refused as refused_command
from qwlora.grid.scheme import Lpbq, PerBlock, Scheme, parse_scheme
from qwlora.quantize.solvers import ROUNDING_SOLVERS
from qwlora.recipe.yaml_core import load_yaml
from qwlora.targets.refusals import Subject, Weight, nearest, refusals, refused
from qwlora.targets.registry import TARGETS, VLLM
from qwlora.targets.target import LayerKind

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
        ("w4-block16", ["mlx"], "w4-block32"),
        ("w4-block48", ["mlx"], "w4-block64"),
        ("w4-block32-asymmetric", ["gguf"], "w4-block32"),
        ("w4-channel", ["gguf"], "w4-block32"),  # GGUF has float16 scales
        ("w6-block64-asymmetric", ["gguf", "hf"], "w5-block64"),
        ("w4-signed32", ["onnx", "genai", "hf", "gguf", "mlx", "openvino"], "w4-signed32"),
        ("w3-signed32", ["gguf"], "w4-signed32"),
        ("w4-signed16", ["aimet", "qairt"], "w4-signed16"),
        ("w4-signed64", ["hf", "qairt_pipeline"], "w4-signed64"),
        ("w4-signed64", ["hf", "qnn"], "w4-block64"),
        ("w2-channel", ["qnn"], "w2-block32"),
        ("w2-tensor", ["qnn"], "w2-block32"),
        ("w4-channel-asymmetric", ["qnn"], "w4-channel"),
        ("w16-block16", ["qnn"], "w8-block16"),
        ("w3-channel", ["qnn"], "w4-channel"),
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


HELD = {
    "qnn": "w4-channel w8-tensor w4-block16 w2-block16 w16-channel w8-block16 w4-lpbq16",
    "qnn EMBEDDING": "w8-tensor",
    "vllm": "w4-block32 w4-signed128 w8-channel w4-block64-asymmetric",
    "executorch": "w4-bf16block32 w8-channel",
}
LACKING = [
    ("qnn", "w2-channel", "4, 8, 16 bits with scales per channel"),
    ("qnn", "w2-tensor", "4, 8, 16 bits with scales per tensor"),
    ("qnn", "w4-channel-asymmetric", "no integer zero points"),
    ("qnn", "w16-block16", "2, 4, 8 bits with blocks"),
    ("qnn", "w3-channel", "2, 4, 8, 16 bits"),
    ("qnn", "w4-signed32", "no signed scales"),
    *(("qnn 8", n, "input 16 bits") for n in ("w8-block16", "w4-lpbq16", "w16-channel")),
    *(("qnn EMBEDDING", n, "weights: w8-tensor") for n in ("w4-channel", "w4-tensor")),
    *(("qnn EMBEDDING", n, "weights: w8-tensor") for n in ("w8-channel", "w8-block32")),
    ("vllm", "w8-block32-asymmetric", "4 bits with integer zero points"),
    ("vllm", "w3-block64", "4, 8 bits"),
    ("vllm", "w4-block16", "blocks of 32, 64"),
    ("vllm", "w4-tensor", "no scales per tensor"),
    ("vllm", "w4-block32 w8-channel", "need one scheme"),
    ("executorch", "w4-block32", "blocks of kind bf16block"),
    ("executorch", "w8-bf16block32", "4 bits with blocks"),
    ("executorch", "w4-channel-asymmetric", "no integer zero points"),
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
    assert "w4-block32" in refused_command(
        "check", recipe_for(base=base, export={"targets": ["gguf"]})
    )


def test_what_genie_lacks_is_known_before_anything_is_written() -> None:
    config = SimpleNamespace(bos_token_id=None, eos_token_id=2)
    config.get_text_config = lambda: config
    model: Any = SimpleNamespace(config=config)
    subject = Subject(model=model, layout="genie", takes_tokens=False)
    found = refusals(TARGETS["qnn"], subject)
    for reason, said in zip(found, ("token ids", "bos_token_id", "tokenizer.json"), strict=True):
        assert said in reason
    assert not refusals(TARGETS["onnx"], subject)
