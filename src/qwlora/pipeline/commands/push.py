"""Upload a job's base or one of its adapters to the Hugging Face hub.

    base                base.safetensors, base.json, configuration, tokenizer, model card
    TARGET/             the base as exported for a runtime that switches adapters
    adapter             adapter_model.safetensors, adapter_config.json, qwlora.json, model card
    TARGET/             the files of the adapter for each runtime it was exported for

Uploads the model card and files that the job's stages wrote, except exported files that are out of
date or failed their check. The upload is a single commit. It deletes only files that this job
uploaded there before (`PUSHED`).
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwlora.adapter.adapter_files import CONFIG, FILE
from qwlora.errors import DirectoryError, UploadError
from qwlora.formats import manifest
from qwlora.formats.base_files import RECORD, read_record
from qwlora.formats.model_card import is_users_card
from qwlora.pipeline.job import OpenJob, adapter_named, command_line, upstream
from qwlora.pipeline.results import collect_results, job_of
from qwlora.pipeline.stage import SOLVER_SCALES
from qwlora.pipeline.store import CARD, Store
from qwlora.report.model_cards import Repositories, card_text
from qwlora.report.results_view import Job
from qwlora.system import strict_json
from qwlora.system.atomic import write_text
from qwlora.system.hub import commit_files
from qwlora.system.output_path import as_directory_errors
from qwlora.system.regular_files import check_plain
from qwlora.targets.registry import TARGETS

PUSHED = "pushed.json"  # in .qwlora/: where the base was uploaded to, and which files went where


@dataclass(frozen=True)
class Upload:
    """The files to upload.

    Args:
        files: local files by path in the repository.
        notes: which files are skipped, and why.
        outdated: files that this job uploaded there before and that are no longer in `files`.
    """

    what: str
    repository: str
    files: dict[str, Path]
    notes: tuple[str, ...]
    outdated: tuple[str, ...] = ()


@contextmanager
def prepared(
    folder: Path, repository: str, adapter: str | None, license: str | None = None
) -> Iterator[Upload]:
    """The upload of the base, or of an adapter. Nothing is sent.

    Args:
        license: of the adapter or base, as the hub writes it; default: see `model_cards`.

    Raises:
        SourceError: there is a link, a pipe or a device in the job.
        DirectoryError: the base or adapter is not current.
    """
    # The job may come from somebody else. A link in it could lead to any file of the user, such as
    # a key, which would then be uploaded.
    check_plain(folder)
    opened = OpenJob(folder)
    recipe, store, judge = opened.recipe, opened.store, opened.judge
    job, stale = job_of(folder, recipe, collect_results(judge, recipe)), judge.stale
    what, stage = "the base", "quantize"
    if adapter is not None:
        adapter_named(recipe, adapter, folder)
        what, stage = f"adapter {adapter}", f"train/{adapter}"
    needed = (s.name for s in upstream(judge.plan, stage))
    if reasons := [f"{name}: {stale[name]}" for name in needed if name in stale]:
        raise DirectoryError(
            f"{what} of {str(folder)!r} cannot be uploaded: {'; '.join(reasons)}. Run first: "
            f"{command_line('run', folder)}"
        )
    exports, notes = _exports(job, store, stale, adapter)
    fingerprint, note = read_record(folder / "base")["fingerprint"], _pushed(folder)
    with tempfile.TemporaryDirectory(prefix="qwlora-push-") as temporary:
        scratch = Path(temporary)
        if adapter is None:
            artifact, hub = "base", Repositories(repository, license=license, exports=exports)
            files = _recorded(store, "base")
            files.pop(SOLVER_SCALES, None)  # only training here reads them
        else:
            artifact = f"adapters/{adapter}"
            base = str(note["base"]) if note.get("fingerprint") == fingerprint else None
            files = _adapter_files(store, scratch, adapter, base)
            hub = Repositories(base, repository, license, exports)
            if base is None:
                notes.append(
                    "the base is not on the hub yet, so the adapter cannot link to it. Push it "
                    f"first: {shlex.join(['qwlora', 'push', str(folder), '--to'])} OWNER/BASE"
                )
        files[CARD] = folder / artifact / CARD
        if not is_users_card(files[CARD]):
            files[CARD] = scratch / CARD
            write_text(files[CARD], card_text(job, recipe, adapter, hub))
        files |= exports
        before = note["files"].get(repository, [])
        outdated = tuple(name for name in before if name not in files)
        yield Upload(what, repository, files, tuple(notes), outdated)


def send(upload: Upload, folder: Path, is_private: bool = True) -> str:
    """Upload as one commit; returns its address. See `commit_files`."""
    repository, note = upload.repository, _pushed(folder)
    begun = {*note["files"].get(repository, []), *upload.files}

    def remember() -> None:
        # Written before the commit: if this process is killed meanwhile, a later upload still knows
        # which files may be on the hub.
        _write_note(folder, {**note, "files": {**note["files"], repository: sorted(begun)}})

    kinds = {RECORD: "a base", FILE: "an adapter"}
    others = {record: what for record, what in kinds.items() if record not in upload.files}
    try:
        url = commit_files(
            repository, upload.files, upload.outdated, upload.what, others, is_private, remember
        )
    except UploadError as error:
        if not error.may_have_happened:
            _write_note(folder, note)
        raise
    note["files"][repository] = sorted(upload.files)
    if RECORD in upload.files:
        note |= {"base": repository, "fingerprint": read_record(folder / "base")["fingerprint"]}
    _write_note(folder, note)
    return url


def _write_note(folder: Path, note: Mapping[str, Any]) -> None:
    file = folder / ".qwlora" / PUSHED
    with as_directory_errors(folder):
        if note["files"]:
            write_text(file, strict_json.dumps(note, indent=1) + "\n")
        else:
            file.unlink(missing_ok=True)


def _recorded(store: Store, place: str) -> dict[str, Path]:
    # Only files in the record: files that the user put next to them are not published.
    return {name: store.path / place / name for name in store.records[place].files}


def _exports(
    job: Job, store: Store, stale: Mapping[str, str], adapter: str | None
) -> tuple[dict[str, Path], list[str]]:
    files, notes = dict[str, Path](), list[str]()
    for target in job.targets:
        known = TARGETS[target]
        if known.has_cases:
            notes.append(
                f"export/{target} is skipped, because it contains the base and all adapters"
            )
            continue
        if adapter is None and not known.has_base:
            continue
        artifact = f"export/{target}/{adapter or 'base'}"
        stage = f"export/{target}" if adapter is None else artifact
        checks = [f"verify/{target}/{name}" for name in ([adapter] if adapter else job.adapters)]
        # The base of a simulation has a check of its own, as the zero adapter.
        if adapter is None and known.is_simulated:
            checks = [f"verify/{target}"]
        if (reason := stale.get(stage)) is not None:
            notes.append(f"{stage} is skipped: {reason}")
        # Any adapter's check also runs the base.
        elif all(check in stale for check in checks):
            notes.append(
                f"{stage} is skipped, because its check has not passed ({checks[0]}: "
                f"{stale[checks[0]]}). Run first: {command_line('run', store.path)}"
            )
        else:
            exported, card = _recorded(store, artifact), store.path / artifact / CARD
            # This README says how to use the files. The hub's model card is another, at the top.
            if card.is_file():
                exported[CARD] = card
            files |= {f"{target}/{name}": path for name, path in exported.items()}
            if adapter and (missing := job.get("parity", target, adapter, "not_run")):
                notes.append(f"{stage} was not run here: {missing}")
    return files, notes


def _adapter_files(store: Store, scratch: Path, name: str, base: str | None) -> dict[str, Path]:
    files = _recorded(store, f"adapters/{name}")
    # PEFT finds the base by the adapter's configuration; in the job, it names no base.
    if base is not None:
        config = json.loads(files[CONFIG].read_text()) | {"base_model_name_or_path": base}
        write_text(scratch / CONFIG, strict_json.dumps(config, indent=2))
        shutil.copy2(files[FILE], scratch / FILE)
        manifest.add(scratch, FILE, [CONFIG])
        files |= {file: scratch / file for file in (CONFIG, FILE)}
    return files


def _pushed(folder: Path) -> dict[str, Any]:
    """What was uploaded from this job: `base`, `fingerprint`, and `files` by repository."""
    try:
        return {"files": {}, **json.loads((folder / ".qwlora" / PUSHED).read_text())}
    except (OSError, ValueError, TypeError):
        return {"files": {}}
