"""What is renamed was flushed to disk before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwlora.system.atomic import (
    files_in,
    move_into_place,
    read_metadata,
    read_tensors,
    replacing,
    replacing_files,
    write_tensors,
    write_text,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were flushed, and "rename" where something was renamed."""
    found: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def flush(descriptor: int) -> None:
        found.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        found.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", rename)
    return found


def test_a_folder_is_flushed_with_all_its_files(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "scratch" / "below").mkdir(parents=True)
    for name in ("one", "below/two"):
        (tmp_path / "scratch" / name).write_text(name)
    move_into_place(tmp_path / "scratch", tmp_path / "target")
    assert set(calls[:-2]) == {"one", "two", "scratch", "below"}
    assert calls[-2:] == ["rename", tmp_path.name]
    assert (tmp_path / "target" / "below" / "two").read_text() == "below/two"


def test_text_is_flushed_and_replaces_the_old(tmp_path: Path, calls: list[str]) -> None:
    (tmp_path / "a").write_text("old")
    write_text(tmp_path / "a", "new")
    assert calls == [".a.part", "rename", tmp_path.name]
    assert (tmp_path / "a").read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_text_that_cannot_be_flushed_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_a_file_that_cannot_be_written_leaves_the_old(tmp_path: Path) -> None:
    def write_half() -> None:
        with replacing(tmp_path / "new" / "a") as scratch:
            scratch.write_text("half")
            raise OSError("full")

    write_tensors(tmp_path / "new" / "a", {"x": torch.zeros(2)})
    with pytest.raises(OSError, match="full"):
        write_half()
    assert load_file(tmp_path / "new" / "a")["x"].tolist() == [0, 0]
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a"]


def test_the_record_of_a_folder_is_written_last(tmp_path: Path, calls: list[str]) -> None:
    for name in ("a", "record", "kept"):
        (tmp_path / name).write_text("old")
    with replacing_files(tmp_path, last="record") as scratch:
        (scratch / "below").mkdir()
        for name in ("record", "z", "below/b", "a"):
            (scratch / name).write_text("new")
        assert (tmp_path / "record").read_text() == "old"
    assert [name for name in calls if name in ("a", "b", "record", "z")] == [
        "a",
        "b",
        "z",
        "record",
    ]
    assert {name: (tmp_path / name).read_text() for name in files_in(tmp_path)} == {
        "a": "new",
        "below/b": "new",
        "kept": "old",
        "record": "new",
        "z": "new",
    }


def test_an_interrupted_write_of_a_folder_changes_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with replacing_files(tmp_path, last="record") as scratch:
            (scratch / "a").write_text("new")
            raise OSError("full")

    (tmp_path / "record").write_text("old")
    with pytest.raises(OSError, match="full"):
        write_half()
    assert files_in(tmp_path) == ["record"]
    assert (tmp_path / "record").read_text() == "old"


def test_tensors_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "some.safetensors"
    tensors = {
        "a": torch.randn(3, 4).bfloat16(),
        "scalar": torch.tensor(2.5),
        "codes": torch.arange(7, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
    }
    write_tensors(path, tensors, {"layer": "x", "key": "y"})
    found, metadata = read_tensors(path)
    assert metadata == read_metadata(path) == {"layer": "x", "key": "y"}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    first = path.read_bytes()
    for _ in range(5):
        write_tensors(path, tensors, {"key": "y", "layer": "x"})
        assert path.read_bytes() == first


def test_a_changed_bit_of_tensors_or_metadata_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    write_tensors(path, {"a": torch.randn(3, 4), "b": torch.randn(3, 4)}, {"layer": "x"})
    whole = path.read_bytes()
    places = [whole.index(b"layer"), len(whole) - 1, len(whole) - 60]
    for place in places:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="changed after it was written"):
            read_tensors(path)


def test_a_file_without_a_digest_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors", metadata={"layer": "x"})
    with pytest.raises(ValueError, match="no digest"):
        read_tensors(tmp_path / "other.safetensors")


def test_files_get_the_mode_of_the_umask(tmp_path: Path) -> None:
    """safetensors creates its files for their owner alone."""
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)})
        (tmp_path / "part").mkdir()
        save_file({"a": torch.zeros(1)}, tmp_path / "part" / "b.safetensors")
        move_into_place(tmp_path / "part", tmp_path / "folder")
    finally:
        os.umask(before)
    modes = [
        (tmp_path / f).stat().st_mode & 0o777 for f in ("a.safetensors", "folder/b.safetensors")
    ]
    assert modes == [0o640, 0o640]
