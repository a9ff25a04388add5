"""What a file's name says about its content, in upper or lower case.

a.txt, a.md                         running text; so is any single file of unknown kind (a.rst)
a.jsonl, .jsonlines, .ndjson        records, as in .json, .csv, .tsv, .parquet, .arrow, .feather
a.gz, a.zip, a.xlsx, a.pkl, ...     refused
a.jsonl.bak, a.csv~, a.json5        refused: records by the middle of the name, which would be
                                    trained on as running text
"""

from __future__ import annotations

import re
from pathlib import Path

TEXT_SUFFIXES = (".txt", ".md")
JSON_LINES_SUFFIXES = (".jsonl", ".jsonlines", ".ndjson")
RECORD_SUFFIXES = (*JSON_LINES_SUFFIXES, ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
SUFFIXES = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)
_UNPACK, _SAVE = "unpack it first", "save its records as .jsonl, .csv or .parquet"
_NOT_READ = {
    **dict.fromkeys(
        (
            ".gz",
            ".tgz",
            ".bz2",
            ".xz",
            ".zst",
            ".zip",
            ".tar",
            ".7z",
            ".rar",
            ".lz4",
            ".lzma",
            ".br",
        ),
        _UNPACK,
    ),
    **dict.fromkeys(
        (
            ".xlsx",
            ".xls",
            ".ods",
            ".orc",
            ".avro",
            ".pkl",
            ".pickle",
            ".sqlite",
            ".sqlite3",
            ".db",
            ".tfrecord",
        ),
        _SAVE,
    ),
}
_RECORD_WITHIN = re.compile(
    rf"({'|'.join(map(re.escape, sorted(RECORD_SUFFIXES, key=len, reverse=True)))})(?![a-z])"
)
_MADE_OF_RECORDS = (".py", ".sh", ".html", ".png", ".svg", ".jpg", ".jpeg", ".pdf")  # a.csv.py


def suffix_of(file: Path) -> str:
    """The last suffix, in lower case."""
    return file.suffix.lower()


def refusal(file: Path) -> str | None:
    """Why a file of this name is refused and what to do; None if it can be read."""
    suffix = suffix_of(file)
    if suffix in SUFFIXES:
        return None
    if suffix in _NOT_READ:
        return f"{suffix} files are not read: {_NOT_READ[suffix]}"
    if suffix not in _MADE_OF_RECORDS and (within := _RECORD_WITHIN.search(file.name.lower())):
        return (
            f"its name contains {within[1]} but does not end in it: rename it to end in "
            f"{within[1]}, or in .txt if it is running text"
        )
    return None
