"""The folder of a merged model. Nothing is merged here."""

import os
from pathlib import Path

import pytest

from qwlora.errors import DirectoryError
from qwlora.system import output_path
from qwlora.system.output_path import new_folder


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_users_folders_next_to_it_stay(tmp_path: Path) -> None:
    (tmp_path / ".merged.part").mkdir()
    (tmp_path / ".merged.part" / "mine.txt").touch()
    before = names(tmp_path)
    with new_folder(tmp_path / "merged") as folder:
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "merged" / "config.json").exists()
    assert names(tmp_path) == [*before, "merged", "merged/config.json"]


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


@pytest.mark.parametrize("is_moving", [False, True])
def test_what_a_killed_merge_left_is_replaced(tmp_path: Path, is_moving: bool) -> None:
    """Killed while it writes, or before the model takes the folder's place."""
    place = tmp_path / "merged"
    if not (child := os.fork()):
        try:
            with pytest.MonkeyPatch.context() as patched, new_folder(place) as folder:
                (folder / "config.json").write_text("old")
                (folder / "half.safetensors").touch()
                if not is_moving:
                    os._exit(9)
                patched.setattr(output_path, "move_into_place", lambda *_: os._exit(9))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert any(name.endswith("config.json") for name in names(tmp_path))
    with new_folder(place) as folder:
        (folder / "config.json").write_text("new")
    assert names(tmp_path) == ["merged", "merged/config.json"]
    assert (place / "config.json").read_text() == "new"


def test_a_merge_about_to_finish_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is gone by then with the folder that held it."""
    place = tmp_path / "merged"

    def move(part: Path, target: Path) -> None:
        with pytest.raises(DirectoryError, match="is in use"), new_folder(place):
            pass
        real(part, target)

    real = output_path.move_into_place
    with monkeypatch.context() as patched, new_folder(place) as folder:
        (folder / "config.json").write_text("{}")
        patched.setattr(output_path, "move_into_place", move)
    assert names(tmp_path) == ["merged", "merged/config.json"]
