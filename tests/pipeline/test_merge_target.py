"""The folder of a merged model. Nothing is merged here."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwlora.errors import DirectoryError
from qwlora.pipeline.merge_target import check_target, new_folder


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_users_folders_next_to_it_stay(tmp_path: Path) -> None:
    (tmp_path / ".merged.part").mkdir()
    (tmp_path / ".merged.part" / "mine.txt").touch()
    with new_folder(tmp_path / "merged") as folder:
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "merged" / "config.json").exists()
    assert names(tmp_path) == [
        ".merged.part",
        ".merged.part/mine.txt",
        "merged",
        "merged/config.json",
    ]


def interrupted_in(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    raise KeyboardInterrupt


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "empty"])
def test_a_failed_merge_leaves_what_was_there(tmp_path: Path, is_there: bool) -> None:
    place = tmp_path / "a" / "merged"
    if is_there:
        place.mkdir(parents=True)
    before = names(tmp_path)
    with pytest.raises(KeyboardInterrupt), new_folder(place) as folder:
        interrupted_in(folder)
    assert names(tmp_path) == before


def test_a_second_merge_into_the_folder_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    place = tmp_path / "merged"
    with new_folder(place) as folder:
        (folder / "config.json").write_text("{}")
        with pytest.raises(DirectoryError, match="is in use"), new_folder(place):
            pass
    assert names(place) == ["config.json"]
    with pytest.raises(DirectoryError, match="is not empty"), new_folder(place):
        pass
    assert names(tmp_path) == ["merged", "merged/config.json"]


def test_what_a_killed_merge_left_is_replaced(tmp_path: Path) -> None:
    half = tmp_path / "merged" / ".qwlora-merge" / "model"
    half.mkdir(parents=True)
    (half / "half.safetensors").touch()
    (half.parent / "lock").touch()
    with new_folder(tmp_path / "merged") as folder:
        (folder / "config.json").write_text("{}")
    assert names(tmp_path) == ["merged", "merged/config.json"]


def test_the_current_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in (Path(), tmp_path):
        with pytest.raises(DirectoryError, match="is the current directory"):
            check_target(place)
