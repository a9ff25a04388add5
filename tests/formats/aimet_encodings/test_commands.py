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

NEW, OLD, LEGACY = (str(FILES / f"aimet-{v}.encodings") for v in ("2.0.0", "1.0.0", "0.6.1"))
MODEL = str(FILES / "model.onnx")


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


def test_validate_exits_1_only_on_errors() -> None:
    code, out, _ = run("validate", OLD)
    assert (code, out) == (0, f"{OLD}: valid, no findings\n")
    pytest.importorskip("onnx")
    code, out, _ = run("validate", OLD, "--onnx", MODEL)
    assert code == 0
    assert out.endswith("3 warnings\n")
    code, out, _ = run("validate", LEGACY, "--onnx", MODEL)
    assert code == 1
    assert out.startswith("error: block.weight_0, scale: has shape [12]")
    assert out.endswith("2 errors, 3 warnings\n")


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
        "qwlora: encodings 1.0.0 -> 0.6.1",
        "would be lost (--lossy, or lossy=True, accepts that):",
        "  - block.weight_0: granularity block",
        "  - lpbq.weight_0: the whole encoding, LPBQ of 4 bits",
    ]
    assert not target.exists()
    assert run("convert", OLD, "--to", "0.6.1", "--out", str(target), "--lossy")[0] == 0
    assert len(read_encodings(target).encodings) == 12


def test_convert_takes_lacking_fields_from_model_and_options(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    target = str(tmp_path / "out.encodings")
    code, _, err = run("convert", NEW, "--to", "1.0.0", "--lossy", "--onnx", MODEL)
    assert code == 2
    assert "lpbq.weight_0: its decompressed bitwidth (--decompressed-bitwidth)" in err
    known = ("--onnx", MODEL, "--decompressed-bitwidth", "8", "--out", target)
    assert run("convert", NEW, "--to", "1.0.0", "--lossy", *known)[0] == 0
    converted, expected = (read_encodings(file).by_name["lpbq.weight_0"] for file in (target, OLD))
    assert converted == expected


def test_diff_exits_1_when_files_differ() -> None:
    assert run("diff", OLD, OLD)[:2] == (0, "no differences\n")
    code, out, _ = run("diff", OLD, NEW)
    assert code == 1
    assert out.endswith("4 differences\n")
    code, out, _ = run("diff", OLD, NEW, "--tolerance", "0.01")
    assert code == 1
    assert "y, scale" not in out
    assert out.endswith("3 differences\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "none.encodings"], "none.encodings: 1 problem"),
        (["validate", MODEL], "cannot be read"),
        (["validate", OLD, "--onnx", OLD], "is not an ONNX model"),
        (["convert", OLD, "--to", "3"], "'3' is not one of 0.6.1, 1.0.0, 2.0.0, 2.1.0"),
        (["diff", OLD, OLD, "--tolerance", "-1"], "tolerance"),
        (["diff", OLD, OLD, "--tolerance", "nan"], "tolerance"),
        (["convert", OLD], "--to"),
    ],
)
def test_bad_input_exits_2(arguments: list[str], message: str) -> None:
    if "--onnx" in arguments:
        pytest.importorskip("onnx")
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
