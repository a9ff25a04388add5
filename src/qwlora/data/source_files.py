"""Which files hold documents: what a file's name says, and which files of a folder are read.

    a.txt, a.md                         running text; so is any single file of unknown kind (a.rst)
    a.jsonl, .jsonlines, .ndjson        records, as in .json, .csv, .tsv, .parquet, .arrow, .feather
    a.gz, a.zip, a.xlsx, a.pkl, ...     refused
    a.jsonl.bak, a.csv~, a.json5        refused: records by the middle of the name, which would be
                                        trained on as running text

Of a folder, all visible files of these kinds are read, subfolders included; with a split, those
named after it, as on the hub: the split or a synonym stands between separators in the file's name
(`my_test.jsonl`, `train-00000-of-00001.parquet`) or, if that is true for no file, in the name of a
folder (`train/0.jsonl`). A file that is refused is an error if it belongs to the split. Ignored are
hidden files, files about other files (`a.csv.sha256`), a dataset's card next to records, and files
of any other kind (images, code). A folder in which nothing but the card can be read is refused, so
that nobody trains on the card.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from qwlora.errors import SourceError
from qwlora.messages import listed

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (
    *(".jsonl", ".jsonlines", ".ndjson", ".json"),
    *(".csv", ".tsv", ".parquet", ".arrow", ".feather"),
)
_COMPRESSED = re.compile(r"\.(gz|tgz|bz2|xz|zst|zip|tar|7z|rar|lz4|lzma|br)")
_TABLE = re.compile(r"\.(xlsx|xls|ods|orc|avro|pkl|pickle|sqlite3?|db|tfrecord)")
_RECORD_WITHIN = re.compile(
    rf"({'|'.join(map(re.escape, sorted(RECORD_SUFFIXES, key=len, reverse=True)))})(?![a-z])"
)
_MADE_OF_RECORDS = re.compile(r"\.(py|sh|html|png|svg|jpe?g|pdf)")  # a.csv.py
_ABOUT_A_FILE = re.compile(r"\.(asc|crc|dvc|idx|license|lock|md5|sha1|sha256|sha512|sig)")
_CARDS = ("readme", "license")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def refusal(file: Path) -> str | None:
    """Why a file of this name is refused and what to do; None if it can be read."""
    suffix = file.suffix.lower()
    if suffix in (*TEXT_SUFFIXES, *RECORD_SUFFIXES):
        return None
    if _COMPRESSED.fullmatch(suffix):
        return f"{suffix} files are not read: unpack it first"
    if _TABLE.fullmatch(suffix):
        return f"{suffix} files are not read: save its records as .jsonl, .csv or .parquet"
    within = _RECORD_WITHIN.search(file.name.lower())
    if within and not _MADE_OF_RECORDS.fullmatch(suffix):
        return (
            f"its name contains {within[1]} but does not end in it: rename it to end in "
            f"{within[1]}, or in .txt if it is running text"
        )
    return None


def folder_files(folder: Path, split: str | None) -> list[Path]:
    """The files of `folder` with its documents, or with those of `split`, all of one kind.

    Raises:
        SourceError: there is no file but a card, none belongs to the split, one of them cannot
            be read, or there are both records and running text.
    """
    where = f"data folder {str(folder)!r}"
    every = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and not any(n.startswith(".") for n in p.relative_to(folder).parts)
    )
    records = [p for p in every if _is_record(p)]
    refused = [p for p in every if _is_refused(p)]
    texts = [p for p in every if p.suffix.lower() in TEXT_SUFFIXES]
    cards = [p for p in texts if p.stem.lower() in _CARDS]
    if records or refused:
        texts = [p for p in texts if p not in cards]
    elif texts and texts == cards and (others := [p for p in every if p.suffix and p not in texts]):
        raise SourceError(
            f"{where} holds a dataset's card ({texts[0].name}) and no file of "
            f"a supported kind, only {_named(others, folder)}. Save the records as .jsonl, .csv or "
            ".parquet, or name the card's own file to train on it"
        )
    if not (files := sorted([*records, *refused, *texts])):
        raise SourceError(
            f"{where} holds no file of a supported kind: "
            f"{', '.join((*TEXT_SUFFIXES, *RECORD_SUFFIXES))}"
        )
    if split is not None:
        files = _of_split(folder, files, split)
    if wrong := [p for p in files if p in refused]:
        raise SourceError(
            f"{where} holds {_named(wrong, folder)}: {refusal(wrong[0])}; or move it out of the "
            "folder"
        )
    kinds = {p in records: p.name for p in reversed(files)}
    if len(kinds) == 2:
        raise SourceError(
            f"{where} holds running text ({kinds[False]}) and records ({kinds[True]}). Move one "
            "kind to another folder"
        )
    return files


def _is_record(file: Path) -> bool:
    return file.suffix.lower() in RECORD_SUFFIXES and file.name.lower() != "dataset_infos.json"


def _is_refused(file: Path) -> bool:
    is_about_others = (
        _ABOUT_A_FILE.fullmatch(file.suffix.lower()) or file.name.lower() == "thumbs.db"
    )
    return refusal(file) is not None and not is_about_others


def _named(files: Sequence[Path], folder: Path, most: int = 1) -> str:
    return listed((file.relative_to(folder).as_posix() for file in files), most)


def _of_split(folder: Path, files: Sequence[Path], split: str) -> list[Path]:
    words = "|".join(re.escape(word) for word in _SPLITS.get(split, (split,)))
    has_it = re.compile(rf"(?:^|[-._ 0-9/])(?:{words})(?:[-._ 0-9/]|$)")
    for part_of in (lambda p: p.name, lambda p: p.relative_to(folder).parent.as_posix()):
        if found := [p for p in files if has_it.search(part_of(p))]:
            return found
    raise SourceError(
        f"data folder {str(folder)!r}: no file or folder in it is named after the split {split!r} "
        f"(like {split}-0.parquet or {split}/0.parquet); there are {_named(files, folder, 4)}. "
        "Correct data.split, or remove it to read all files"
    )
