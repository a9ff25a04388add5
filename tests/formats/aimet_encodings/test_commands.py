"""`qwlora encodings`: what it prints, and its exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from random_files import FILES

from cli.command_line import qwlora
from qwlora.formats.aimet_encodings import convert, read_encodings

NEW, OLD = (str(FILES / f"aimet-{v}.encodings") for v in ("2.0.0", "1.0.0"))


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `qwlora encodings ...`."""
    done = qwlora("encodings", *arguments)
    return done.returncode, done.stdout, done.stderr


def test_show_lists_every_encoding() -> None:
    code, out, _ = run("show", NEW)
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "version 2.0.0, by aimet-torch 2.42.0, 14 encodings"
    assert lines[1].split() == ["name", "section", "type", "granularity", "scale", "offset"]
    (block,) = (line for line in lines if line.startswith("block.weight_0 "))
    cells = ["block.weight_0", "-", "int4 symmetric", "block axis 0 of 4"]
    assert re.split(" {2,}", block) == [*cells, "0.0261785 .. 0.0502113", "-8"]
    assert any(line.startswith("channel.bias ") and line.endswith("-2147483648") for line in lines)
    assert len(lines) == 16
    assert re.search("block.weight_0 +parameter +int4 symmetric +block of 4 ", run("show", OLD)[1])


def test_show_json_has_the_same_fields_in_all_versions() -> None:
    code, out, _ = run("show", OLD, "--json")
    record = json.loads(out)
    assert code == 0
    assert (record["version"], len(record["encodings"])) == ("1.0.0", 13)
    assert "x" not in record["parameters"]
    entry = next(e for e in record["encodings"] if e["name"] == "x")
    numbers = {"bitwidth": 8, "scale": 0.014587393961846828, "offset": -149}
    layout = {"granularity": "tensor", "axis": None, "block_size": None, "zero_point_shift": 0.0}
    assert entry == {"name": "x", **numbers, "symmetric": False, "signed": None, **layout}


def test_validate_lists_the_problems_of_a_file(tmp_path: Path) -> None:
    assert run("validate", OLD) == (0, f"{OLD}: valid, version 1.0.0, 13 encodings\n", "")
    record = json.loads(Path(OLD).read_text())
    del record["param_encodings"][0]["bw"]
    record["activation_encodings"][0]["scale"] = [-1.0]
    (tmp_path / "bad.encodings").write_text(json.dumps(record))
    code, out, err = run("validate", str(tmp_path / "bad.encodings"))
    assert (code, out) == (2, "")
    assert f"{record['param_encodings'][0]['name']}, bw: is missing" in err
    assert f"{record['activation_encodings'][0]['name']}: scale must be above 0" in err


def test_convert_prints_or_writes(tmp_path: Path) -> None:
    code, out, _ = run("convert", NEW, "--to", "2.1.0")
    assert code == 0
    (tmp_path / "printed").write_text(out)
    assert read_encodings(tmp_path / "printed") == convert(read_encodings(NEW), "2.1.0")
    code, out, _ = run("convert", NEW, "--to", "2.1.0", "--out", str(tmp_path / "written"))
    assert (code, out) == (0, f"wrote {tmp_path / 'written'}, version 2.1.0, 14 encodings\n")
    assert read_encodings(tmp_path / "written") == read_encodings(tmp_path / "printed")


def test_convert_refuses_a_loss_until_it_is_accepted(tmp_path: Path) -> None:
    target = tmp_path / "out.encodings"
    code, out, err = run("convert", OLD, "--to", "0.6.1", "--out", str(target))
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "qwlora: encodings 1.0.0 -> 0.6.1 would lose this (accept it with --lossy, or lossy=True):",
        "  - block.weight_0: granularity block",
        "  - lpbq.weight_0: the whole encoding, LPBQ of 4 bits",
    ]
    assert not target.exists()
    assert run("convert", OLD, "--to", "0.6.1", "--out", str(target), "--lossy")[0] == 0
    assert len(read_encodings(target).encodings) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "none.encodings"], "none.encodings: 1 problem"),
        (["validate", __file__], "cannot be read"),
        (["convert", OLD, "--to", "3"], "'3' is not one of 0.6.1, 1.0.0, 2.0.0, 2.1.0"),
        (["convert", OLD, "--to", "2.1.0"], "Export the model again in version 2.1.0"),
        (["convert", OLD], "--to"),
    ],
)
def test_bad_input_exits_2(arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_the_command_line_answers_without_torch() -> None:
    program = (
        "import sys, qwlora.cli.encodings_commands;"
        "print(sorted({'torch', 'onnx', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"[]\n"
