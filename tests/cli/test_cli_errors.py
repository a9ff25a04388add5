"""Whatever is raised below the command line ends as one message, with the file that was read."""

import errno
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.command_line import qwlora, refused
from qwlora.errors import SourceError, foreign_as, reading


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, recipe_for: Any) -> Any:
    """Arguments of a command that fails with a given error while it reads a file."""

    def fail_with(error: BaseException) -> list[str]:
        def fail(*arguments: Any) -> None:
            with reading("weights.bin"):
                raise error

        monkeypatch.setattr("qwlora.recipe.load_recipe", fail)
        return ["check", str(recipe_for())]

    return fail_with


def test_an_unforeseen_error_names_the_file_and_debug(failing: Any) -> None:
    errors = refused(*failing(ZeroDivisionError("division by zero")))
    assert errors.count("\n") == 1
    for fact in ("weights.bin", "ZeroDivisionError", "division by zero", "--debug"):
        assert fact in errors


@pytest.mark.parametrize("first", [True, False])
def test_debug_shows_the_traceback_wherever_it_stands(failing: Any, first: bool) -> None:
    arguments = failing(KeyError("x"))
    done = qwlora(*(["--debug", *arguments] if first else [*arguments, "--debug"]))
    assert done.returncode == 2
    assert re.search("(?s)Traceback.*in fail", done.stderr)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (RuntimeError("No space left on device (os error 28)"), "no space left"),
        (EOFError("Ran out of input"), "EOFError: Ran out"),
    ],
)
def test_a_small_machine_says_so(failing: Any, error: Any, problem: str) -> None:
    said = refused(*failing(error))
    assert (problem in said, "weights.bin" in said) == (True, True)


@pytest.mark.parametrize(
    "entries",
    [
        {"num_attention_heads": 0},
        {"vocab_size": None},
        {"rope_parameters": "no"},
        {"hidden_act": "silly"},
        {"vocab_size": 3 * 10**9},
        {"dtype": "float17"},
        {"rms_norm_eps": float("nan")},
        {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
    ],
)
def test_impossible_configurations_name_the_model(
    recipe_for: Any, checkpoints: dict[str, Path], tmp_path: Path, entries: dict[str, Any]
) -> None:
    model = Path(shutil.copytree(checkpoints["llama"], tmp_path / "model"))
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    recipe = recipe_for(model={"source": str(model)})
    errors = refused("run", recipe, "--out", tmp_path / "out")
    assert "unexpected" not in errors
    assert str(model) in errors or "config.json" in errors
    (key,) = entries
    scalar = isinstance(entries[key], int | float) or entries[key] in ("silly", "float17")
    assert key in errors or not scalar  # a value that is wrong by itself is named
    assert not (tmp_path / "out").exists()


def test_a_library_that_exits_is_an_error() -> None:  # as mlx-lm does for OLMo
    with (
        pytest.raises(SourceError, match="mlx-lm: SystemExit: 1"),
        foreign_as(SourceError, "mlx-lm"),
    ):
        sys.exit(1)
