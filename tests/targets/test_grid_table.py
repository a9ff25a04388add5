"""Which targets hold which grid: before anything runs, with the nearest scheme that would do."""

from pathlib import Path
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
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedBase
from qwlora.targets.target_compatibility import (
    Grid,
    grid_problem,
    nearest,
    refusal,
    table_rows,
)

ALL = [
    Scheme(bits, symmetric, granularity)
    for bits in range(2, 9)
    for symmetric in (True, False)
    for granularity in (PerTensor(), PerChannel(), *(PerBlock(n) for n in (16, 32, 64, 96, 128)))
]
ALL += [Scheme(bits, True, SignedBlock(size)) for bits in range(2, 9) for size in (16, 32, 96)]


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
    nearest(scheme, list(TARGETS.values()))  # there always is one
    for target in TARGETS.values():
        found = nearest(scheme, [target])
        assert grid_problem(target, Grid(found, "search")) is None
        if grid_problem(target, Grid(scheme, "search")) is None:
            assert found == scheme


def test_a_refusal_names_each_target_and_a_remedy_that_is_none() -> None:
    targets = {name: TARGETS[name] for name in ("hf", "gguf")}
    grids = [Grid(parse_scheme("w3-block64-asymmetric"), "gptq"), Grid(Scheme(8, True), "gptq")]
    found = refusal(grids, targets)
    assert found is not None
    assert "gguf cannot hold int3 asymmetric per block 64" in found
    assert "w4-block64 instead of w3-block64-asymmetric, w8-block32 instead of w8-tensor" in found
    remedied = [Grid(parse_scheme(name), "gptq") for name in ("w4-block64", "w8-block32")]
    assert refusal(remedied, targets) is None


def test_a_conflict_between_layers_is_resolved_for_all_of_them() -> None:
    hf = {"hf": TARGETS["hf"]}
    grids = [Grid(parse_scheme(f"w{bits}-block32-asymmetric"), "rtn") for bits in (4, 8)]
    found = refusal(grids, hf)
    assert found is not None
    assert "w4-block32 instead of w4-block32-asymmetric" in found
    rows = list(table_rows(dict.fromkeys(grids, "here"), hf, ["hf"]))
    assert rows == [
        ("grid", "of", "hf*"),
        ("w4-block32-asymmetric", "here", "not together"),
        ("w8-block32-asymmetric", "here", "not together"),
    ]


def test_a_solver_that_leaves_scales_in_float32_is_refused_where_the_files_hold_float16() -> None:
    scheme, gguf = Scheme(4, True, PerBlock(32)), TARGETS["gguf"]
    assert "rtn leaves scales" in str(grid_problem(gguf, Grid(scheme, "rtn")))
    assert "float32" in str(grid_problem(gguf, Grid(Scheme(4, True, Lpbq(32)), "gptq")))
    for solver in (*ROUNDING_SOLVERS, None):  # None: the numbers are there, and checked on writing
        assert grid_problem(gguf, Grid(scheme, solver)) is None
    assert "solver search" in str(refusal([Grid(scheme, "rtn")], {"gguf": gguf}))


def test_an_embedding_that_is_written_as_floats_may_have_any_grid() -> None:
    scheme = Scheme(4, False, PerBlock(32), float_offset=True)
    assert grid_problem(TARGETS["hf"], Grid(scheme, None)) is not None
    assert grid_problem(TARGETS["hf"], Grid(scheme, None, of_embedding=True)) is None


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
    assert load_yaml(done.stdout)["base"]["weights"]["bitwidth"] == 3


def test_a_recipe_that_no_target_can_follow_is_refused_with_the_nearest(recipe_for: Any) -> None:
    path = recipe_for(base={"weights": "w7-block16"}, export={"targets": ["hf", "mlx"]})
    with pytest.raises(RecipeError, match=r"mlx cannot hold .*w8-block32 instead of w7-block16"):
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
    assert "mlx cannot hold int7 symmetric per channel" in done.stderr
