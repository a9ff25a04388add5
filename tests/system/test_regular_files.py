"""Which files of a strange folder may be opened."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from qwlora.errors import SourceError
from qwlora.formats.aimet_encodings import read_encodings
from qwlora.formats.model_source import locate, user_path
from qwlora.system.regular_files import check_plain, check_readable, is_inside
from qwlora.system.strict_json import read_object


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


SPECIAL: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "socket": a_socket,
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_may_never_end_is_not_read(kind, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "linked").symlink_to("config.json")
    check_readable(tmp_path)
    path = Path("tokenizer.json")
    SPECIAL[kind](path)
    for read in (check_readable, read_object, read_encodings, lambda p: user_path(str(p))):
        with pytest.raises(Exception, match=r"tokenizer\.json.* is a pipe, a socket or a device"):
            read(path)
    with pytest.raises(SourceError, match=r"tokenizer\.json.* is a pipe"):
        locate(str(tmp_path))
    assert not is_inside(tmp_path, "tokenizer.json")


def test_a_name_leads_to_a_file_of_the_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    outside.write_text("mine")
    (folder / "link").symlink_to(outside)
    (folder / "up").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(folder)  # the folder itself may be linked
    for place in (folder, tmp_path / "linked"):
        for name in ("weights", "deep/weights", "absent/weights"):
            assert is_inside(place, name)
        strange = [str(outside), "../outside", "deep/../../outside", "link", "up/outside", "a\0b"]
        assert not [name for name in strange if is_inside(place, name)]


def test_links_of_the_hubs_cache_are_files_of_its_folder(tmp_path: Path) -> None:
    folder, blob = tmp_path / "snapshots" / "0123", tmp_path / "blobs" / "abc"
    folder.mkdir(parents=True)
    blob.parent.mkdir()
    blob.write_text("weights")
    (folder / "weights").symlink_to("../../blobs/abc")
    (folder / "other").symlink_to("/etc/hostname")
    assert is_inside(folder, "weights")
    assert not is_inside(folder, "other")
    with pytest.raises(SourceError, match=r"(other|weights)' is a link"):
        check_plain(folder)  # to be opened by a runtime, or uploaded
