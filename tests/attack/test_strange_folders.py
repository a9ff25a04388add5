"""Folders that somebody else made, read by the Python API, and records that list strange files."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qwlora
from qwlora.formats import manifest

from .jobs import STAGE, Job, fresh
from .record import Record
from .victims import command, inside, python, start

pytestmark = pytest.mark.attack


def _adapted(job: Path) -> Any:
    base = qwlora.load_base(job / "base")
    return qwlora.load_adapter(base, job / "adapters" / "first", unknown_base="accept")


def _verify(job: Path) -> None:
    qwlora.verify(job / "export" / "onnx", _adapted(job), torch.ones(1, 8, dtype=torch.int64))


# by name: the folder that is attacked, its record, what reads it, and the command that does
CALLS: dict[str, tuple[str, str, Callable[[Path], Any], tuple[str, ...]]] = {
    "load_base": (
        "base",
        "base.json",
        lambda job: qwlora.load_base(job / "base"),
        ("merge", ".", "first"),
    ),
    "load_adapter": ("adapters/first", "qwlora.json", _adapted, ("merge", ".", "first")),
    "load_simulation": (
        "simulation/first",
        "simulation.json",
        lambda job: qwlora.load_simulation(job / "simulation" / "first", _adapted(job)),
        ("verify", "."),
    ),
    "verify": ("export/onnx/base", "qwlora.json", _verify, ("verify", "export/onnx")),
}
MAKES: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a link to a device": lambda file: file.symlink_to("/dev/zero"),
}
LISTED = ("/dev/zero", "/dev/stdin", "/etc/hostname", "../../../outside", "a/../../x", "pipe", "\0")


def test_pipes_and_devices_are_refused(qwa: Job, record: Record, tmp_path: Path) -> None:
    trials = [
        (call, file.name, how)
        for call, (folder, *_) in CALLS.items()
        for file in sorted((qwa.finished / folder).iterdir())
        if file.is_file() and file.name != STAGE  # which only the job reads
        for how in MAKES
    ]

    def attack(trial: tuple[str, str, str], own: Path) -> list[tuple[str, str, str]]:
        call, name, how = trial
        job, (folder, _, read, _) = fresh(qwa.finished, own / "job"), CALLS[call]
        (job / folder / name).unlink()
        MAKES[how](job / folder / name)
        ended = python(lambda: read(job), own / "logs")
        return [(f"{call}: {how}", ended.problem(), f"{call}: {name}: {how}")]

    record.attack("folders", trials, attack, tmp_path)


def test_records_that_list_files_elsewhere_are_refused(
    qwa: Job, record: Record, tmp_path: Path
) -> None:
    trials = [(call, listed) for call in CALLS for listed in LISTED]

    def attack(trial: tuple[str, str], own: Path) -> list[tuple[str, str, str]]:
        call, listed = trial
        job, (folder, name, read, arguments) = fresh(qwa.finished, own / "job"), CALLS[call]
        (own / "outside").write_text("mine")
        content = json.loads((job / folder / name).read_text())
        content[manifest.FILES][listed] = "0" * 64
        (job / folder / name).write_text(manifest.text(content, name))
        if listed == "pipe":  # elsewhere it may stand in a folder that nobody reads
            os.mkfifo(job / folder / "pipe")
        ways = {
            "python": python(lambda: read(job), own / "logs"),
            "command": start(inside(job, command(*arguments)), own / "logs").wait(),
        }
        shutil.rmtree(job)
        return [
            (f"{call}: records", ended.problem(), f"{way}: {call}: {listed!r}")
            for way, ended in ways.items()
        ]

    record.attack("records", trials, attack, tmp_path)
