"""Which targets hold which grid: before anything runs, with the nearest scheme that would do."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cli.command_line import qwlora
from conftest import byte_tokenizer, tiny_model
from qwlora import quantize_
from qwlora.errors import RecipeError
from qwlora.grid.scheme import (
    Lpbq,
    PerBlock,
    PerChannel,
    PerTensor,
    Scheme,
    SignedBlock,
    parse_scheme,
)
from qwlora.quantize.solvers import ROUNDING_SOLVERS
from qwlora.recipe import load_recipe
from qwlora.recipe.yaml_core import load_yaml
from qwlora.targets.refusals import Subject, Weight, nearest, refusals, refused, table
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedBase, LayerKind

ALL = [
    Scheme(bits, symmetric, granularity)
    for bits in range(2, 9)
    for symmetric in (True, False)
    for granularity in (PerTensor(), PerChannel(), *(PerBlock(n) for n in (16, 32, 64, 96, 128)))
]
ALL += [Scheme(bits, True, SignedBlock(size)) for bits in range(2, 9) for size in (16, 32, 96)]


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
    ],
)
def test_the_nearest_scheme_that_all_hold(asked: str, targets: list[str], best: str) -> None:
    found = nearest(parse_scheme(asked), [TARGETS[name] for name in targets])
    assert found == parse_scheme(best)


@pytest.mark.parametrize("scheme", ALL, ids=str)
def test_the_nearest_scheme_is_held_and_none_is_nearer(scheme: Scheme) -> None:
    for_all = nearest(scheme, list(TARGETS.values()))  # there always is one
    assert not any(problems(name, Weight(for_all, "search")) for name in TARGETS)
    for name, target in TARGETS.items():
        found = nearest(scheme, [target])
        assert not problems(name, Weight(found, "search"))
        if not problems(name, Weight(scheme, "search")):
            assert found == scheme


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
    header, *rows = table(subject, ["hf"])
    assert header[:2] == ("grid", "of")
    assert [row[:2] for row in rows] == [(name, name) for name in names]
    assert [row[header.index("hf*")] for row in rows] == ["not together"] * 2


def test_a_solver_that_leaves_scales_in_float32_is_refused_where_the_files_hold_float16() -> None:
    scheme = Scheme(4, True, PerBlock(32))
    assert "its scales are float32" in problems("gguf", Weight(scheme, "rtn"))
    assert "float32" in problems("gguf", Weight(Scheme(4, True, Lpbq(32)), "gptq"))
    for solver in (*ROUNDING_SOLVERS, None):  # None: the numbers are there, and checked on writing
        assert not problems("gguf", Weight(scheme, solver))
    (found,) = refused(["gguf"], Subject(weights={"all": Weight(scheme, "rtn")}))
    assert "gptq round" in found


def test_an_embedding_that_is_written_as_floats_may_have_any_grid() -> None:
    scheme = Scheme(4, False, PerBlock(32), float_offset=True)
    assert problems("hf", Weight(scheme))
    assert not problems("hf", Weight(scheme, kind=LayerKind.EMBEDDING))


def test_check_prints_the_table_as_comments_of_the_recipe(recipe_for: Any) -> None:
    base = {"weights": "w3-block32"}
    done = qwlora("check", recipe_for(base=base, export={"targets": ["mlx"]}))
    assert done.returncode == 0
    comments = [line for line in done.stdout.splitlines() if line.startswith("#")]
    header = next(line for line in comments if line.startswith("#   grid")).split()
    assert header == ["#", "grid", "of", *(f"{n}*" if n == "mlx" else n for n in TARGETS)]
    row = next(line for line in comments if line.startswith("#   w3-block32")).split()
    cells = dict(zip(header, row, strict=True))
    assert (cells["hf"], cells["mlx*"], cells["gguf"]) == ("holds", "holds", "w4-block32")
    assert load_yaml(done.stdout)["base"]["weights"] == "w3-block32"


def test_a_recipe_that_no_target_can_follow_is_refused_with_the_nearest(recipe_for: Any) -> None:
    path = recipe_for(base={"weights": "w7-block16"}, export={"targets": ["hf", "mlx"]})
    with pytest.raises(RecipeError, match=r"target mlx: .*w8-block32 instead of w7-block16"):
        load_recipe(path)


def test_integers_of_the_model_that_a_target_cannot_hold_are_refused_by_check(
    recipe_for: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama", layers=1)
    quantize_(model, Scheme(7, True, PerChannel()), "rtn")
    (tmp_path / "kept").mkdir()
    TARGETS["hf"].backend.write_base(ExportedBase(model, byte_tokenizer()), tmp_path / "kept")
    path = recipe_for(export={"targets": ["onnx", "hf"]}, base={"solver": "keep"})
    source = ("--set", f"model.source={tmp_path / 'kept'}")
    done = qwlora("check", path, *source)
    assert done.returncode == 0
    assert "#   w7-channel" in done.stdout
    done = qwlora("check", path, *source, "--set", "export.targets=[mlx]")
    assert done.returncode == 2
    assert "int7 symmetric per channel: MLX has" in done.stderr


def test_what_genie_lacks_is_known_before_anything_is_written() -> None:
    config = SimpleNamespace(bos_token_id=None, eos_token_id=2)
    config.get_text_config = lambda: config
    model: Any = SimpleNamespace(config=config)
    subject = Subject(model=model, layout="genie", takes_tokens=False)
    found = refusals(TARGETS["qnn"], subject)
    for reason, said in zip(found, ("token ids", "bos_token_id", "tokenizer.json"), strict=True):
        assert said in reason
    assert not refusals(TARGETS["onnx"], subject)
