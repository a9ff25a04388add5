"""Which files of a folder are its documents.

All files of the kinds that are read, below it, but hidden ones; or those of one split, by the hub's naming: the split, or a word that stands for it, between
separators in the file's name (`train-00000-of-00001.parquet`, `data/my_test.jsonl`), or if no file has it so, in that of a folder (`train/0.jsonl`).
Beside records, a dataset's card (README.md, dataset_infos.json) is none of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from qwlora.errors import SourceError

TEXT_SUFFIXES = (".txt", ".md")
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
RECORD_SUFFIXES = (*JSON_LINES_SUFFIXES, ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
SUFFIXES = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)
_CARD = ("readme.md", "dataset_infos.json")
_WORDS = {"train": ("train", "training"), "validation": ("validation", "valid", "dev", "val"), "test": ("test", "testing", "eval", "evaluation")}


def folder_files(folder: Path, split: str | None) -> list[Path]:
    """The files of `folder` with its documents, or with those of `split`; all of records, or all of running text.

    Raises:
        SourceError: there is none, none belongs to the split, or there are both kinds.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file() and not any(n.startswith(".") for n in p.relative_to(folder).parts))
    if any(_is_record(p) for p in files):
        files = [p for p in files if p.name.lower() not in _CARD]
    if not files:
        raise SourceError(f"data folder {str(folder)!r} holds no {' or '.join(TEXT_SUFFIXES)} file, and no {', '.join(RECORD_SUFFIXES)} either")
    if split is not None:
        files = _of_split(folder, files, split)
    texts, records = ([p for p in files if _is_record(p) == wanted] for wanted in (False, True))
    if texts and records:
        raise SourceError(f"data folder {str(folder)!r} holds running text ({texts[0].name}) and records ({records[0].name}); a source holds one kind")
    return files


def _is_record(file: Path) -> bool:
    return file.suffix in RECORD_SUFFIXES and file.name.lower() not in _CARD


def _of_split(folder: Path, files: Sequence[Path], split: str) -> list[Path]:
    words = "|".join(re.escape(word) for word in _WORDS.get(split, (split,)))
    has_it = re.compile(rf"(?:^|[-._ 0-9/])(?:{words})(?:[-._ 0-9/]|$)")
    for parts in ([p.name for p in files], [p.relative_to(folder).parent.as_posix() for p in files]):
        if found := [p for p, part in zip(files, parts, strict=True) if has_it.search(part)]:
            return found
    names = ", ".join(p.relative_to(folder).as_posix() for p in files[:4]) + (", ..." if len(files) > 4 else "")
    raise SourceError(
        f"data folder {str(folder)!r}: no file or folder in it is named after the split {split!r}, as {split}-0.parquet or {split}/0.parquet; "
        f"there are {names}: give data.split as they name it, or take it out of the recipe to read them all"
    )
