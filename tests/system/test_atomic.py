"""What is renamed was flushed to disk before."""

import itertools
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from qwlora.system.atomic import (
    files_in,
    move_into_place,
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


def test_an_interrupted_write_leaves_the_old(tmp_path, monkeypatch) -> None:
    def write_half(file: Path) -> None:
        file.write_text("half")
        raise OSError("full")

    (tmp_path / "a").write_text("old")
    for folder in (tmp_path, tmp_path / "new" / "below"):
        with pytest.raises(OSError, match="full"), replacing_files(folder, last="a") as scratch:
            write_half(scratch / "b")
    with pytest.raises(OSError, match="full"), replacing(tmp_path / "a") as scratch:
        write_half(scratch)
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_record_of_a_folder_is_written_last(tmp_path, calls, monkeypatch) -> None:
    targets, replace = list[Path](), Path.replace
    monkeypatch.setattr(Path, "replace", lambda p, to: (targets.append(to), replace(p, to))[1])
    for name in ("a", "record", "kept"):
        (tmp_path / name).write_text("old")
    with replacing_files(tmp_path, last="record") as scratch:
        (scratch / "below").mkdir()
        for name in ("record", "z", "below/b", "a"):
            (scratch / name).write_text("new")
        assert (tmp_path / "record").read_text() == "old"
    # all are on disk before the first is moved; the old record goes first, the new one comes last
    assert {"a", "b", "record", "z"} <= set(calls[: calls.index("rename")])
    assert [t.name for t in targets] == ["record", "a", "a", "b", "z", "record"]
    found = {name: (tmp_path / name).read_text() for name in files_in(tmp_path)}
    assert found == {**dict.fromkeys(("a", "below/b", "record", "z"), "new"), "kept": "old"}


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
    assert metadata == {"layer": "x", "key": "y"}
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
    for place in (whole.index(b"layer"), len(whole) - 1, len(whole) - 60):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="changed after it was written"):
            read_tensors(path)
    save_file({"a": torch.ones(2)}, path, metadata={"layer": "x"})
    with pytest.raises(ValueError, match="no digest"):
        read_tensors(path)


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
    for name in ("a.safetensors", "folder/b.safetensors"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("number", range(1, 10))
def test_files_are_put_back_if_one_cannot_be_moved(number, tmp_path, monkeypatch) -> None:
    for name in ("a", "record", "old", "mine"):
        (tmp_path / name).write_text("old")
    (tmp_path / "empty").mkdir()
    before, moves, replace = sorted(tmp_path.rglob("*")), itertools.count(1), Path.replace

    def fails_once(path: Path, target: Path) -> Path:
        if next(moves) == number:
            raise KeyboardInterrupt
        return replace(path, target)

    def write() -> None:
        with replacing_files(tmp_path, last="record", obsolete=["old", "gone"]) as scratch:
            (scratch / "below" / "deeper").mkdir(parents=True)
            (scratch / "empty").mkdir()
            for name in ("record", "a", "below/record", "below/deeper/b", "empty/c"):
                (scratch / name).write_text("new")

    monkeypatch.setattr(Path, "replace", fails_once)
    if number < 9:  # three old files are moved away, five new ones in
        with pytest.raises(KeyboardInterrupt):
            write()
        assert sorted(tmp_path.rglob("*")) == before
        assert {path.read_text() for path in before if path.is_file()} == {"old"}
    else:
        write()
        new = ["a", "below/deeper/b", "below/record", "empty/c", "record"]
        assert files_in(tmp_path) == sorted([*new, "mine"])
        assert (tmp_path / "mine").read_text() == "old"
