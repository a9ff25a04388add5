"""Exported files that somebody else made are checked before any runtime sees them."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qwlora.errors import QwloraError, SourceError
from qwlora.targets.registry import TARGETS
from targets.proof.toy_runtime import TableRuntime

CODE = {"session_options": [{"custom_ops_library": "model.onnx.data"}], "auto_map": {"A": "x.Y"}}


def strange_file(folder: Path) -> None:
    (folder / "extension.so").write_bytes(b"\x7fELF")


def nested_file(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text("1")


def code_key(folder: Path) -> None:
    (folder / "qwlora.json").write_text(json.dumps(CODE))


def key_twice(folder: Path) -> None:
    (folder / "qwlora.json").write_text('{"target": 1, "target": 2}')


def link(folder: Path) -> None:
    (folder / "README.md").symlink_to("/etc/hostname")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "README.md")


def hidden_file(folder: Path) -> None:
    (folder / ".extension.so").write_bytes(b"\x7fELF")


def proof(folder: Path) -> None:
    (folder / "proof").mkdir(exist_ok=True)
    (folder / "proof" / "proof.json").write_text("{}")


BESIDE_CASES = [hidden_file, proof]  # what is next to the files of all use cases
ATTACKS = [strange_file, nested_file, code_key, key_twice, link, pipe, *BESIDE_CASES]
DATA = (".onnx_adapter", ".safetensors", ".gguf", ".data", ".bin")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_runtime_opens_what_no_export_writes(
    target: str, attack: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, opened = TARGETS[target], list[Any]()

    class Recorder(TableRuntime):
        def switch_to(self, adapter: Path | None) -> None:
            opened.append(adapter)

    def open_files(self: Any, folder: Path, case: str) -> Recorder:
        opened.append(folder)
        return Recorder({})

    monkeypatch.setattr(type(known.backend), "open", open_files)
    monkeypatch.setattr(type(known), "require_packages", lambda self: None)
    parts = [p for name in ("first", "second") for p in known.parts(tmp_path, name).values()]
    for folder in (tmp_path / "proof", *parts):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".model.onnx.part").write_bytes(b"of a killed writer")
    for folder in parts:
        contents = known.backend.contents
        patterns = contents.base if folder.name == "base" else contents.adapter
        written = folder / next(p for p in patterns if p.endswith(DATA)).replace("*", "a")
        written.parent.mkdir(exist_ok=True)
        written.touch()
        (folder / "stage.json").write_text("of the job that exported it")
    if known.has_cases and attack in BESIDE_CASES:
        attack(tmp_path)
    runtime = known.open(tmp_path, "first")
    assert opened
    if known.has_base:
        for alone in (None, "base"):
            opened.clear()
            known.open(tmp_path, alone)
            assert opened == [tmp_path / "base"]
    for folder in dict.fromkeys(() if known.has_cases and attack in BESIDE_CASES else parts):
        attack(folder)
        opened.clear()
        is_switch = folder.name == "second" and known.has_base  # while another adapter is open
        name = "second" if folder.name == "second" else "first"
        act = partial(runtime.use, folder) if is_switch else partial(known.open, tmp_path, name)
        with pytest.raises(SourceError, match=str(folder)):
            act()
        assert not any(place == folder for place in opened)
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()


@pytest.mark.parametrize("name", ["../base.safetensors", "/x.safetensors", "x.bin", "absent", 1])
def test_shards_are_files_of_the_folder(name: Any, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    index = tmp_path / "base" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(QwloraError, match=r"index\.json.*lm_head"):
        TARGETS["hf"].open(tmp_path)
