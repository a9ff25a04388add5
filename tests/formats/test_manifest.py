"""What QWLoRA wrote is noticed when it changes; what it did not write is said to be unverified."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from conftest import flip_bit, packed_model
from formats.models import edit_json
from qwlora import load_adapter, save_adapter
from qwlora.errors import FingerprintError, NonFiniteError
from qwlora.formats import manifest
from qwlora.formats.manifest import UnverifiedWarning
from qwlora.system.strict_json import dumps


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(b"\x00\x01")
    (tmp_path / "README.md").write_text("mine")
    manifest.write(tmp_path, "record.json", {"alpha": 1.5}, ["weights"])
    return tmp_path


def check(folder: Path, **options: Any) -> None:
    manifest.check(folder, "record.json", "thing 'x'", "make it again", **options)


def edit_alpha(folder: Path) -> None:
    record = (folder / "record.json").read_text()
    (folder / "record.json").write_text(record.replace("1.5", "2.5"))


def relink(file: Path) -> None:
    """Replace a file by a link to the same content."""
    file.rename(file.parent.with_name("elsewhere"))
    file.symlink_to(file.parent.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "weights").write_bytes(b"\x00\x00"), r"weights changed"),
        (lambda f: (f / "weights").unlink(), r"weights \(missing\) changed"),
        (edit_alpha, r"record.json changed"),
        # names that no file can have
        (lambda f: edit_json(f / "record.json", files={"[" * 300: "0"}), r"\[{300} \(missing\)"),
        # names that lead elsewhere, or to what may never end
        *(
            (lambda f, n=name: edit_json(f / "record.json", files={n: "0"}), rf"'.*{end}' \(not a")
            for name, end in (("a\0b", "b"), ("/dev/zero", "zero"), ("../x/weights", "weights"))
        ),
        (lambda f: relink(f / "weights"), r"'weights' \(not a regular file"),
    ],
)
def test_a_changed_file_is_named_with_the_remedy(folder, damage, named) -> None:
    check(folder)
    damage(folder)
    with pytest.raises(FingerprintError, match=rf"thing 'x': {named} .* make it again"):
        check(folder)


def test_only_files_that_are_listed_and_chosen_count(folder: Path) -> None:
    (folder / "README.md").write_text("edited")
    (folder / "notes.txt").write_text("new")
    check(folder)
    (folder / "weights").write_bytes(b"mine")
    check(folder, only=["not listed"])
    with pytest.raises(FingerprintError, match="weights changed"):
        check(folder, only=["weights"])
    record = json.loads((folder / "record.json").read_text())
    del record["files"]["weights"]  # how an edit is accepted
    (folder / "record.json").write_text(json.dumps(record))
    check(folder)
    edit_alpha(folder)
    with pytest.raises(FingerprintError, match=r"'x': record\.json changed"):
        check(folder, only=[])


def test_a_record_is_extended_with_its_own_digest(folder: Path) -> None:
    (folder / "more").write_text("x")
    manifest.add(folder, "record.json", ["more"])
    assert manifest.listed_files(folder, "record.json") == ["more", "record.json", "weights"]
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(manifest.text(record | {"alpha": 2.5}, "record.json"))
    check(folder)
    (folder / "more").write_text("y")
    with pytest.raises(FingerprintError, match="more changed"):
        check(folder)


def test_a_record_without_digests_was_changed(folder: Path) -> None:
    for record in ('{"alpha": 1.5}', "[]", "{"):
        (folder / "record.json").write_text(record)
        with pytest.raises(FingerprintError, match=r"record.json changed"):
            check(folder)
    (folder / "record.json").unlink()
    with pytest.warns(UnverifiedWarning, match=r"thing 'x' is unverified: record.json"):
        check(folder)


def test_numbers_that_json_cannot_hold_are_named_by_their_path() -> None:
    assert json.loads(dumps({"a": [1.0, {"b": 2}]})) == {"a": [1.0, {"b": 2}]}
    with pytest.raises(NonFiniteError, match=r"perplexity.base\[1\] is nan"):
        dumps({"perplexity": {"base": [1.0, float("nan")]}})


def test_changes_of_an_adapter_are_noticed(tmp_path: Path) -> None:
    settings = LoraConfig(r=2, lora_alpha=32, target_modules=["v_proj", "q_proj", "up_proj"])
    save_adapter(get_peft_model(packed_model("llama", layers=1), settings), tmp_path / "first")
    config = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "up_proj", "v_proj"]  # sets are sorted
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    load_adapter(packed_model("llama", layers=1), tmp_path / "first")
    flip_bit(tmp_path / "first" / "adapter_model.safetensors")
    edit_json(tmp_path / "second" / "adapter_config.json", lora_alpha=64)
    for folder, file in (("first", "adapter_model.safetensors"), ("second", "adapter_config.json")):
        with pytest.raises(FingerprintError, match=rf"{file} changed after .* train it again"):
            load_adapter(packed_model("llama", layers=1), tmp_path / folder)


def test_the_command_line_gives_a_warning_in_one_line() -> None:
    code = """
import warnings
from qwlora.cli import main
from qwlora.formats import manifest
main.app = lambda *_, **options: warnings.warn("a is unverified", manifest.UnverifiedWarning)
main.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stderr == b"qwlora: warning: a is unverified\n"
