"""Which files of a folder are its documents.

Without a split: all visible files of a supported kind, subfolders included. With a split: those
named after it, as on the hub. The split or a synonym stands between separators in the file's name
(`my_test.jsonl`, `train-00000-of-00001.parquet`) or, if that is true for no file, in the name of a
folder (`train/0.jsonl`).

A file of records that cannot be read (`file_kinds.refusal`: compressed, a spreadsheet,
`.jsonl.bak`) is refused if it belongs to the split. These files are ignored:

    hidden files, and files about other files (`a.csv.sha256`)
    a dataset's card (README.md, LICENSE.txt, dataset_infos.json) next to records
    files of any other kind (images, code)

A folder in which nothing but the card can be read is refused, so that nobody trains on the card.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from qwlora.data.file_kinds import RECORD_SUFFIXES, TEXT_SUFFIXES, refusal, suffix_of
from qwlora.errors import SourceError
from qwlora.messages import listed

_CARD_STEMS, _CARD_OF_RECORDS = ("readme", "license"), "dataset_infos.json"
_OF_ANOTHER_FILE = (
    ".asc",
    ".crc",
    ".dvc",
    ".idx",
    ".license",
    ".lock",
    ".md5",
    ".sha1",
    ".sha256",
    ".sha512",
    ".sig",
)
_OF_NO_ONE = ("thumbs.db",)
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def folder_files(folder: Path, split: str | None) -> list[Path]:
    """The files of `folder` with its documents, or with those of `split`, all of one kind.

    Raises:
        SourceError: there is no file but a card, none belongs to the split, one of them cannot
            be read, or there are both records and running text.
    """
    every = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and not any(n.startswith(".") for n in p.relative_to(folder).parts)
    )
    files = [p for p in every if _is_record(p) or _is_refused(p) or suffix_of(p) in TEXT_SUFFIXES]
    if any(_is_record(p) or _is_refused(p) for p in files):
        files = [p for p in files if not _is_card(p)]
    elif (
        files
        and all(map(_is_card, files))
        and (others := [p for p in every if p.suffix and p not in files])
    ):
        raise SourceError(
            f"data folder {str(folder)!r} holds a dataset's card ({files[0].name}) and no file of "
            f"a supported kind, only {_named(others, folder)}. Save the records as .jsonl, .csv or "
            ".parquet, or name the card's own file to train on it"
        )
    if not files:
        raise SourceError(
            f"data folder {str(folder)!r} holds no file of a supported kind: "
            f"{', '.join((*TEXT_SUFFIXES, *RECORD_SUFFIXES))}"
        )
    if split is not None:
        files = _of_split(folder, files, split)
    if refused := [p for p in files if _is_refused(p)]:
        raise SourceError(
            f"data folder {str(folder)!r} holds {_named(refused, folder)}: {refusal(refused[0])}; "
            "or move it out of the folder"
        )
    texts, records = ([p for p in files if _is_record(p) == wanted] for wanted in (False, True))
    if texts and records:
        raise SourceError(
            f"data folder {str(folder)!r} holds running text ({texts[0].name}) and records "
            f"({records[0].name}). Move one kind to another folder"
        )
    return files


def _is_card(file: Path) -> bool:
    return file.stem.lower() in _CARD_STEMS and suffix_of(file) in TEXT_SUFFIXES


def _is_record(file: Path) -> bool:
    return suffix_of(file) in RECORD_SUFFIXES and file.name.lower() != _CARD_OF_RECORDS


def _is_refused(file: Path) -> bool:
    return (
        refusal(file) is not None
        and suffix_of(file) not in _OF_ANOTHER_FILE
        and file.name.lower() not in _OF_NO_ONE
    )


def _named(files: Sequence[Path], folder: Path) -> str:
    return listed((file.relative_to(folder).as_posix() for file in files), 1)


def _of_split(folder: Path, files: Sequence[Path], split: str) -> list[Path]:
    words = "|".join(re.escape(word) for word in _WORDS.get(split, (split,)))
    has_it = re.compile(rf"(?:^|[-._ 0-9/])(?:{words})(?:[-._ 0-9/]|$)")
    for parts in (
        [p.name for p in files],
        [p.relative_to(folder).parent.as_posix() for p in files],
    ):
        if found := [p for p, part in zip(files, parts, strict=True) if has_it.search(part)]:
            return found
    names = listed((p.relative_to(folder).as_posix() for p in files), 4)
    raise SourceError(
        f"data folder {str(folder)!r}: no file or folder in it is named after the split {split!r} "
        f"(like {split}-0.parquet or {split}/0.parquet); there are {names}. Correct data.split, or "
        "remove it to read all files"
    )
