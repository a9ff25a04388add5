"""What QWLoRA wrote is noticed when it changes; what it did not write is said to be unverified."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from conftest import byte_tokenizer, packed_model
from formats.models import edit_json
from qwlora import Scheme, load_adapter, load_base, save_adapter
from qwlora.errors import FingerprintError, NonFiniteError
from qwlora.formats import manifest
from qwlora.formats.base_files import BaseCheckpoint
from qwlora.formats.base_folder import save_base
from qwlora.formats.manifest import UnverifiedWarning
from qwlora.grid.encoding import measure
from qwlora.simulation.saved_simulation import load_encodings, save_encodings
from qwlora.system.strict_json import dumps

IDS = torch.arange(24).view(2, 12)


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
def test_a_changed_file_is_named_with_the_remedy(
    folder: Path, damage: Callable[[Path], None], named: str
) -> None:
    check(folder)
    damage(folder)
    with pytest.raises(FingerprintError, match=rf"thing 'x': {named} .* make it again"):
        check(folder)


def test_only_listed_files_count(folder: Path) -> None:
    (folder / "README.md").write_text("edited")
    (folder / "notes.txt").write_text("new")
    check(folder)
    (folder / "weights").write_bytes(b"mine")
    record = json.loads((folder / "record.json").read_text())
    del record["files"]["weights"]  # how an edit is accepted
    (folder / "record.json").write_text(json.dumps(record))
    check(folder)


def test_a_record_is_extended_with_its_own_digest(folder: Path) -> None:
    (folder / "more").write_text("x")
    manifest.add(folder, "record.json", ["more"])
    assert manifest.listed_files(folder, "record.json") == ["more", "record.json", "weights"]
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(manifest.text(record | {"alpha": 2.5}, "record.json"))
    assert json.loads((folder / "record.json").read_text())["alpha"] == 2.5
    check(folder)
    (folder / "more").write_text("y")
    with pytest.raises(FingerprintError, match="more changed"):
        check(folder)


def test_chosen_files_are_compared_and_the_record(folder: Path) -> None:
    (folder / "weights").write_bytes(b"\x00\x00")
    check(folder, only=["not listed"])
    with pytest.raises(FingerprintError, match="weights changed"):
        check(folder, only=["weights"])
    edit_alpha(folder)
    with pytest.raises(FingerprintError, match=r"'x': record\.json changed"):
        check(folder, only=[])


def test_a_folder_without_a_record_is_said_to_be_unverified(folder: Path) -> None:
    (folder / "record.json").unlink()
    with pytest.warns(UnverifiedWarning, match=r"thing 'x' is unverified: record.json"):
        check(folder)


@pytest.mark.parametrize("record", ['{"alpha": 1.5}', "[]", "{"])
def test_a_record_without_digests_was_changed(folder: Path, record: str) -> None:
    (folder / "record.json").write_text(record)
    with pytest.raises(FingerprintError, match=r"record.json changed"):
        check(folder)


def test_numbers_that_json_cannot_hold_are_named_by_their_path() -> None:
    assert json.loads(dumps({"a": [1.0, {"b": 2}]})) == {"a": [1.0, {"b": 2}]}
    with pytest.raises(NonFiniteError, match=r"perplexity.base\[1\] is nan"):
        dumps({"perplexity": {"base": [1.0, float("nan")]}})


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def base() -> Any:
    return packed_model("llama", layers=1)


def adapted() -> PeftModel:
    torch.manual_seed(0)
    settings = LoraConfig(r=2, lora_alpha=32, target_modules=["v_proj", "q_proj", "up_proj"])
    return get_peft_model(base(), settings).eval()


def test_an_adapter_that_changed_is_not_loaded(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    config = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "up_proj", "v_proj"]  # sets are sorted
    load_adapter(base(), tmp_path / "first")
    flip_a_bit(tmp_path / "first" / "adapter_model.safetensors")
    edit_json(tmp_path / "second" / "adapter_config.json", lora_alpha=64)
    for folder, file in (("first", "adapter_model.safetensors"), ("second", "adapter_config.json")):
        with pytest.raises(FingerprintError, match=rf"{file} changed after .* train it again"):
            load_adapter(base(), tmp_path / folder)


def test_two_swapped_tokens_of_a_base_are_noticed(tmp_path: Path) -> None:
    save_base(base(), tmp_path, byte_tokenizer(), source="somewhere")
    load_base(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    edit_json(tmp_path / "tokenizer.json", **tokenizer)
    for read in (load_base, BaseCheckpoint):
        with pytest.raises(FingerprintError, match=r"tokenizer.json changed .* quantize again"):
            read(tmp_path)


def test_encodings_that_were_edited_are_not_loaded(tmp_path: Path) -> None:
    save_encodings({"a": measure(torch.ones(2, 2), Scheme(8))}, tmp_path)
    assert load_encodings(tmp_path).keys() == {"a"}
    path = tmp_path / "simulation.encodings"
    path.write_text(path.read_text().replace('"y_scale": ', '"y_scale":  '))
    with pytest.raises(FingerprintError, match=r"n.encodings changed .* calibrate again"):
        load_encodings(tmp_path)


def test_the_command_line_gives_a_warning_in_one_line() -> None:
    warn = "warnings.warn('a is unverified', manifest.UnverifiedWarning)"
    lines = [
        "import warnings",
        "from qwlora.cli import main",
        "from qwlora.formats import manifest",
    ]
    lines += [f"main.app = lambda *_, **options: {warn}", "main.main()"]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stderr == b"qwlora: warning: a is unverified\n"
