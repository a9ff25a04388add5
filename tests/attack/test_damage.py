"""Damaged and swapped files: each is noticed by what reads it, or harmless with a reason."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import qwlora as package

from .damage import HOWS, damage, kinds
from .jobs import Job, artifacts, differences, fresh, without_times
from .record import Record
from .targets import Target, stage_target
from .victims import (
    Ended,
    killed_at_change,
    parallel,
    python,
    qwlora,
    seeds,
    start,
)

pytestmark = pytest.mark.attack


@dataclass(frozen=True)
class Reader:
    """What reads files of a job.

    Args:
        reads: a regular expression for kinds of files.
        run: given the job's directory, the damaged file's path in it, and a folder for logs.
        harmless: by regular expression for kinds, why damage there needs no notice.
        jobs: where it succeeds when nothing is damaged.
    """

    name: str
    reads: str
    run: Callable[[Path, Path, Path], Ended]
    harmless: dict[str, str]
    jobs: tuple[str, ...] = ("tuned", "qwa", "shared")


CARD = {r"README\.md$": "a model card is for people; the next run writes it again"}
STAGE = {r"stage\.json$": "the job's record; only commands of the job read it"}
BASE = CARD | {
    r"^base/(moments|second_moments|tuning)/": (
        "inputs of adapters' starts, read by `train`, whose record covers them"
    )
}
JOB = CARD | {
    r"^(results\.json|report\.html)$": "written, never read; the next verb writes it again",
    r"^recipe\.yaml$": (
        "a change that is still valid is an edit of the recipe, and what depends on it is out of "
        "date"
    ),
    r"^\.qwlora/lock$": "its content is never read",
    r"/proof/": "`verify` says that it has changed, and makes it again",
    r"^\.qwlora/seen\.json$": "a cache with a checksum; a damaged one is not used",
    r"^\.qwlora/status\.json$": "a checksum; a damaged one counts as none",
    r"^\.qwlora/stages/": (
        "each record has a checksum; a stage whose record is damaged runs again when it is needed"
    ),
}


def _load_base(job: Path, file: Path, logs: Path) -> Ended:
    return python(lambda: package.load_base(job / "base"), logs)


def _adapted(job: Path, folder: Path) -> Any:
    return package.load_adapter(package.load_base(job / "base"), folder).eval()


def _load_adapter(job: Path, file: Path, logs: Path) -> Ended:
    return python(lambda: _adapted(job, (job / file).parent), logs)


def _load_simulation(job: Path, file: Path, logs: Path) -> Ended:
    folder = job / "simulation" / file.parts[1]
    load = package.load_simulation
    return python(lambda: load(folder, _adapted(job, folder / "adapter")), logs)


def _merge(job: Path, file: Path, logs: Path) -> Ended:
    adapter = file.parts[1] if file.parts[0] == "adapters" else "first"
    return qwlora("merge", job, adapter, logs=logs)


def _verb(*words: str) -> Callable[[Path, Path, Path], Ended]:
    return lambda job, file, logs: qwlora(*words, job, logs=logs)


MEASURED = r"^(base|base_simulation|adapters|simulation/NAME)/"
READERS = (
    Reader("load_base", r"^base/", _load_base, BASE | STAGE),
    Reader("load_adapter", r"^adapters/|/NAME/adapter/", _load_adapter, CARD | STAGE),
    Reader("load_simulation", r"^simulation/NAME/", _load_simulation, CARD | STAGE),
    Reader("adapters check", r"^adapters/", _verb("adapters", "check"), CARD | STAGE),
    Reader("merge", r"^(adapters|base)/", _merge, BASE),
    Reader("train", r"^(base|base_simulation)/", _verb("train"), CARD),
    Reader("evaluate", MEASURED, _verb("evaluate"), CARD, jobs=("qwa", "shared")),
    Reader("verify", "", _verb("verify"), JOB, jobs=("qwa",)),
)


def test_undamaged_files_are_read(tuned: Job, qwa: Job, shared: Job, tmp_path: Path) -> None:
    """Else the attacks below would prove nothing."""
    trials = [(reader, job) for reader in READERS for job in (tuned, qwa, shared)]

    def read(trial: tuple[Reader, Job], folder: Path) -> str:
        reader, job = trial
        place = fresh(job.finished, folder / "job")
        found = kinds(place)
        for kind, files in found.items():
            if re.search(reader.reads, kind) and job.name in reader.jobs:
                ended = reader.run(place, files[0], folder / "logs")
                return f"{reader.name}: {job.name}: {ended.err}" if ended.code else ""
        return ""

    assert not [problem for problem in parallel(read, trials, tmp_path) if problem]


def _judge(reader: Reader, kind: str, ended: Ended, job: Path, reference: Path) -> str:
    """Why this is wrong; empty if the damage was noticed or did no harm."""
    if ended.has_traceback or ended.code not in (0, 1, 2):
        return f"exit code {ended.code}: {(ended.out + ended.err).strip()[-400:]}"
    if reader.name == "adapters check" and ended.code:  # it lists what it found, with code 1 or 2
        return "" if ended.out else ended.refused()
    if ended.code == 2:
        return ended.refused()
    may_pass = any(re.search(pattern, kind) for pattern in reader.harmless)
    if not may_pass:
        return f"not noticed (exit code {ended.code}): {(ended.out + ended.err).strip()[-200:]}"
    if reader.name == "verify" and not kind.endswith("recipe.yaml"):
        unequal = differences(artifacts(job), artifacts(reference))
        return f"harms: {unequal}" if unequal else _false_numbers(job, reference)
    return ""


def _false_numbers(job: Path, reference: Path) -> str:
    """Whether results.json says something that it should not; it may say less."""

    def false(found: Any, true: Any, where: str) -> list[str]:
        if isinstance(found, dict) and isinstance(true, dict):
            return [x for k in found for x in false(found[k], true.get(k), f"{where}/{k}")]
        return [] if found == true else [f"{where}: {found!r:.60} is not {true!r:.60}"]

    found, true = (json.loads((folder / "results.json").read_text()) for folder in (job, reference))
    wrong = false(without_times(found), without_times(true), "")
    return f"false numbers: {wrong}" if wrong else ""


def test_damaged_files_are_noticed_by_what_reads_them(
    tuned: Job, qwa: Job, shared: Job, seed: int, record: Record, tmp_path: Path
) -> None:
    found: dict[str, tuple[Job, list[Path]]] = {}
    for job in (qwa, shared, tuned):
        for kind, files in kinds(job.finished).items():
            found.setdefault(kind, (job, files))
    trials = [(kind, how) for kind in found for how in HOWS]

    def attack(trial: tuple[str, str], folder: Path) -> list[tuple[str, str, str]]:
        kind, how = trial
        job, files = found[kind]
        generator = seeds(seed, "damage", kind, how)
        file = generator.choice(files)
        place = fresh(job.finished, folder / "job")
        if how == "flip 1":
            _remember_digests(place, folder)
        done = damage(place / file, how, generator)
        readers = [r for r in READERS if job.name in r.jobs and re.search(r.reads, kind)]
        if readers and how not in ("cut", "swap"):  # each reader gets some of these
            readers = [readers[HOWS.index(how) % len(readers)]]
        counted = []
        for reader in readers if done else []:
            ended = reader.run(place, file, folder / "logs")
            problem = _judge(reader, kind, ended, place, job.finished)
            how = f"seed {seed}: {job.name}: {file}: {done}: {reader.name}"
            counted.append((f"`{kind}`", problem, how))
        return counted

    for reader in READERS:
        for pattern, why in reader.harmless.items():
            for kind in found:
                if re.search(reader.reads, kind) and re.search(pattern, kind):
                    record.add_harmless("damage", kind, reader.name, why)
    record.attack("damage", trials, attack, tmp_path)


REPORTED = ("flip 0", "flip 1", "cut", "empty", "delete", "swap")
GOOD = ("ok", "warn")  # classes of the verdicts that let files be shipped


def test_reports_of_damaged_jobs_ship_nothing_that_changed(
    qwa: Job, seed: int, record: Record, tmp_path: Path
) -> None:
    """A report says that files may be shipped only if they are those that were proven."""
    found = {kind: files for kind, files in kinds(qwa.finished).items() if kind != "report.html"}
    trials = [("nothing", "nothing"), *((kind, how) for kind in found for how in REPORTED)]

    def attack(trial: tuple[str, str], folder: Path) -> list[tuple[str, str, str]]:
        kind, how = trial
        generator = seeds(seed, "report", kind, how)
        place = fresh(qwa.finished, folder / "job")
        if how == "nothing":
            file, done = place, "undamaged"
        else:
            file = place / generator.choice(found[kind])
            done = damage(file, how, generator)
        (place / "report.html").unlink()
        ended = qwlora("report", place, logs=folder / "logs")
        problem = ended.refused() if ended.code else ""
        if not ended.code:
            classes = re.findall(r'class="vk (\w+)"', (place / "report.html").read_text())
            verdict = classes[0] if classes else ""
            unequal = differences(artifacts(place), artifacts(qwa.finished))
            if how == "nothing" and verdict not in GOOD:
                problem = f"an undamaged job gets verdict {verdict!r}"
            elif verdict in GOOD and unequal:
                problem = f"the verdict is {verdict!r}, but {unequal}"
        return [(f"`{kind}`", problem, f"seed {seed}: {file.relative_to(folder)}: {done}")]

    record.attack("reports", trials, attack, tmp_path)


def _remember_digests(job: Path, folder: Path) -> None:
    """Let the product see the files undamaged, as it has in a directory that is in use.

    It remembers digests of files only once they are two seconds old.
    """
    time.sleep(2.1)
    ended = qwlora("train", job, logs=folder / "logs")
    assert ended.code == 0, ended.err


def test_a_base_resumes_from_damaged_blocks_to_the_same_artifacts(
    tuned: Job, seed: int, record: Record, place: Path, tmp_path: Path
) -> None:
    """For the checkpoints of training, see adapter/test_train.py."""
    target = stage_target(tuned, "quantize", "unfinished")
    interrupted = _interrupt(target, place / "unfinished")
    found = kinds(interrupted / "job", ".qwlora/work")
    assert found, "nothing is kept to resume from"

    def attack(trial: tuple[str, str], folder: Path) -> list[tuple[str, str, str]]:
        kind, how = trial
        generator = seeds(seed, "unfinished", kind, how)
        file = generator.choice(found[kind])
        work = fresh(interrupted, folder / "trial")
        done = damage(work / "job" / file, how, generator)
        ended = start(target.action(work), folder / "logs").wait()
        problem = ended.refused()
        if problem and not ended.code:
            problem = "; ".join(target.unequal(work, ended))
        return [(f"`{kind}`", problem, f"seed {seed}: {file}: {done}")]

    trials = [(kind, how) for kind in found for how in HOWS[2:]]
    record.attack("unfinished", trials, attack, tmp_path)


def _interrupt(target: Target, place: Path) -> Path:
    """Kill the stage at the change to the disk at which the most files to resume from are there."""
    best, most = place / "none", 0
    for moment in range(target.changes // 4, target.changes, max(1, target.changes // 12)):
        trial = place / str(moment)
        target.put(trial)
        start(killed_at_change(target.action(trial), trial, moment), place / "logs").wait()
        work = trial / "job" / ".qwlora" / "work"
        count = sum(path.is_file() for path in work.rglob("*"))
        if count >= most:
            best, most = trial, count
    return best
