"""`qwlora encodings`: what it prints, and its exit codes."""

import json
import re
from pathlib import Path

import pytest
from random_files import FILES

from cli.command_line import qwlora

NEW, OLD = (str(FILES / f"aimet-{v}.encodings") for v in ("2.0.0", "1.0.0"))


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `qwlora encodings ...`."""
    done = qwlora("encodings", *arguments)
    return done.returncode, done.stdout, done.stderr


def test_show_lists_every_encoding_in_text_and_json() -> None:
    code, out, _ = run(NEW)
    lines = out.splitlines()
    assert (code, len(lines)) == (0, 16)
    assert lines[0] == "version 2.0.0, by aimet-torch 2.42.0, 14 encodings"
    (block,) = (line for line in lines if line.startswith("block.weight_0 "))
    cells = ["block.weight_0", "-", "int4 symmetric", "block axis 0 of 4"]
    assert re.split(" {2,}", block) == [*cells, "0.0261785 .. 0.0502113", "-8"]
    assert re.search("block.weight_0 +parameter +int4 symmetric +block of 4 ", run(OLD)[1])
    code, out, _ = run(OLD, "--json")
    record = json.loads(out)
    assert (code, record["version"], len(record["encodings"])) == (0, "1.0.0", 13)
    assert "x" not in record["parameters"]
    entry = next(e for e in record["encodings"] if e["name"] == "x")
    numbers = {"bitwidth": 8, "scale": 0.014587393961846828, "offset": -149}
    layout = {"granularity": "tensor", "axis": None, "block_size": None, "zero_point_shift": 0.0}
    assert entry == {"name": "x", **numbers, "symmetric": False, "signed": None, **layout}


def test_show_lists_the_problems_of_an_invalid_file(tmp_path: Path) -> None:
    record = json.loads(Path(OLD).read_text())
    parameter, activation = record["param_encodings"][0], record["activation_encodings"][0]
    del parameter["bw"]
    activation["scale"] = [-1.0]
    (tmp_path / "bad.encodings").write_text(json.dumps(record))
    code, out, err = run(str(tmp_path / "bad.encodings"))
    assert (code, out) == (2, "")
    assert f"{parameter['name']}, bw: is missing" in err
    assert f"{activation['name']}: scale must be above 0" in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["none.encodings"], "none.encodings: 1 problem"),
        ([__file__], "cannot be read"),
    ],
)
def test_bad_input_exits_2(arguments: list[str], named: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert named in err
