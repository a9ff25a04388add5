"""Upload a job's base or one of its adapters to the Hugging Face hub.

A repository holds what somebody else needs, and nothing that names a path of this machine:

    base                base.safetensors, base.json, configuration, tokenizer, model card
    TARGET/             the base as exported for a runtime that switches adapters
    adapter             adapter_model.safetensors, adapter_config.json, qwlora.json, model card
    TARGET/             the files of the adapter for each runtime it was exported for

Uploaded are the files that the job's stages wrote, and the model card. Left out: second moments and
other inputs of training, and exported files that are out of date or did not pass their check. The
upload is one commit, so a reader sees all of it or nothing. It deletes only files that this job
uploaded there before (`PUSHED`).
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qwlora import strict_json
from qwlora.adapter.adapter_check import problems
from qwlora.adapter.adapter_folder import FILE
from qwlora.adapter.peft_support import CONFIG
from qwlora.atomic import write_text
from qwlora.errors import DirectoryError, QwloraError, UploadError, described
from qwlora.export.registry import TARGETS
from qwlora.export.target import GraphTarget, SwitchableTarget, UseCasesTarget
from qwlora.formats import manifest
from qwlora.formats.base_files import RECORD, read_record
from qwlora.formats.card_mark import is_users_card
from qwlora.formats.model_origin import origin_of
from qwlora.messages import listed, suggestion
from qwlora.pipeline.artifacts import MOMENTS, SOLVER_SCALES
from qwlora.pipeline.directory import CARD, Directory
from qwlora.pipeline.directory_errors import as_directory_errors
from qwlora.pipeline.existing_job import job_recipe
from qwlora.pipeline.job_texts import JobTexts
from qwlora.pipeline.model_cards import Places, adapter_card_text, base_card
from qwlora.pipeline.plan import make_plan, resolve_compute
from qwlora.pipeline.results import collect_results, job_of
from qwlora.pipeline.stage import Stage
from qwlora.pipeline.stale_stages import find_stale, upstream
from qwlora.recipe import Recipe
from qwlora.report.job import Job

PUSHED = "pushed.json"  # in .qwlora/: where the base was uploaded to, and which files went where
_BASE_PATH = "base_model_name_or_path"  # in adapter_config.json
_TEXTS = (".json", ".yaml", ".md", ".txt", ".py")  # files that may name a path


@dataclass(frozen=True)
class Upload:
    """What would be uploaded.

    Args:
        what: in words.
        repository: `owner/name`.
        is_private: whether a new repository is private.
        files: by path in the repository.
        notes: what is left out, and why.
        outdated: files that this job uploaded there before, and that are not among `files`.
    """

    what: str
    repository: str
    is_private: bool
    files: dict[str, Path]
    notes: tuple[str, ...]
    outdated: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes of the files."""
        return sum(file.stat().st_size for file in self.files.values())


@contextmanager
def prepared(
    folder: Path,
    repository: str,
    adapter: str | None,
    *,
    is_private: bool = True,
    license: str | None = None,
) -> Iterator[Upload]:
    """The upload of the base, or of an adapter. Nothing is sent.

    Args:
        folder: the job's directory.
        license: of the adapter or base, as the hub writes it; default: see `model_cards`.

    Raises:
        DirectoryError: the folder is not a job directory, or what is asked for is not there,
            incomplete, changed, or of another recipe than the one that is there now; or a file
            to upload names a path of this machine.
        SourceError: the model or a text of the recipe is not there any more.
    """
    recipe, directory = resolve_compute(job_recipe(folder)), Directory.read(folder)
    plan = make_plan(recipe, JobTexts(recipe), directory.digests)
    stale = find_stale(plan, directory)
    job = job_of(folder, recipe, collect_results(directory, recipe, plan, stale))
    _check(directory, plan, stale, "quantize", "the base")
    if adapter is not None:
        known = [a.name for a in recipe.adapters]
        if adapter not in known:
            raise DirectoryError(
                f"{str(folder)!r} has no adapter {adapter!r}{suggestion(adapter, known)}"
            )
        _check(directory, plan, stale, f"train/{adapter}", f"adapter {adapter!r}")
    with tempfile.TemporaryDirectory(prefix="qwlora-push-") as scratch:
        exports, notes = _exports(job, directory, stale, adapter)
        fingerprint = read_record(folder / "base")["fingerprint"]
        exports = _without_paths(
            exports, Path(scratch) / "export", _pushed_base(folder, fingerprint)
        )
        if adapter is None:
            files = _base_files(recipe, job, directory, Path(scratch), repository, license)
        else:
            own, lacking = _adapter_files(
                recipe, job, directory, Path(scratch), adapter, repository, license
            )
            files, notes = own, [*notes, *lacking]
        files |= exports
        _check_no_path(folder, files)
        what = "the base" if adapter is None else f"adapter {adapter}"
        before = _pushed(folder)["files"].get(repository, [])
        outdated = tuple(name for name in before if name not in files)
        yield Upload(what, repository, is_private, files, tuple(notes), outdated)


def send(upload: Upload, folder: Path) -> str:
    """Upload as one commit; returns its address.

    Raises:
        UploadError: the hub refuses, or cannot be reached, or the repository is public although it
            should be private, or holds a base where an adapter is uploaded, or the reverse.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise UploadError(
            "there is no token for the hub. Run `hf auth login`, or set HF_TOKEN to a token that "
            "may write"
        )
    api, repository, note = HfApi(), upload.repository, _pushed(folder)
    # Listed first, so that a later upload knows the files if this process is killed in between.
    begun = {*note["files"].get(repository, []), *upload.files}
    try:
        api.create_repo(repository, private=upload.is_private, exist_ok=True)
        if upload.is_private and not api.model_info(repository).private:
            raise UploadError(
                f"{repository} is a public repository. Nothing was uploaded. Give --public to "
                "upload to it, or another --to"
            )
        there = api.list_repo_files(repository)
        _check_kind(upload, there)
        _write_note(folder, {**note, "files": {**note["files"], repository: sorted(begun)}})
        added = [CommitOperationAdd(name, str(path)) for name, path in upload.files.items()]
        gone = [CommitOperationDelete(name) for name in upload.outdated if name in there]
        commit = api.create_commit(
            repository, [*added, *gone], commit_message=f"Upload {upload.what} with QWLoRA"
        )
    except QwloraError:
        raise
    except Exception as error:  # the client raises many types: offline, forbidden, too large ...
        _write_note(folder, note)
        raise UploadError(_refused(error, repository)) from error
    note["files"][repository] = sorted(upload.files)
    if RECORD in upload.files:
        note |= {"base": repository, "fingerprint": read_record(folder / "base")["fingerprint"]}
    _write_note(folder, note)
    return str(commit.commit_url)


def _write_note(folder: Path, note: Mapping[str, Any]) -> None:
    file = folder / ".qwlora" / PUSHED
    with as_directory_errors(folder):
        if note["files"]:
            write_text(file, strict_json.dumps(note, indent=1) + "\n")
        else:
            file.unlink(missing_ok=True)


def _check_kind(upload: Upload, there: Collection[str]) -> None:
    """Check that the repository does not hold a base if an adapter is uploaded, or the reverse."""
    for record, what in ((RECORD, "a base"), (FILE, "an adapter")):
        if record in there and record not in upload.files:
            raise UploadError(
                f"{upload.repository} holds {what} ({record}), and {upload.what} would mix with "
                "it. Nothing was uploaded. Give another --to"
            )


def _refused(error: Exception, repository: str) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    match status:
        case 401:
            why = "the hub does not accept the token. Run `hf auth login`, or set HF_TOKEN"
        case 403:
            why = "the token may not write there. Use one that may, or another --to"
        case None:
            why = f"{described(error)}. Check the network and HF_ENDPOINT, then run it again"
        case _:
            why = f"the hub answered {described(error)}"
    return f"{repository}: nothing was uploaded: {why}"


def _check(
    directory: Directory, plan: list[Stage], stale: Mapping[str, str], stage: str, what: str
) -> None:
    """Check that a stage, and all that it needs, is current for the recipe as it is now."""
    if found := [f"{s.name} {stale[s.name]}" for s in upstream(plan, stage) if s.name in stale]:
        raise DirectoryError(
            f"{what} of {str(directory.path)!r} cannot be uploaded: {'; '.join(found)}. Run first: "
            f"{_run_line(directory.path)}"
        )


def _run_line(folder: Path) -> str:
    return shlex.join(["qwlora", "run", str(folder / "recipe.yaml"), "--out", str(folder)])


def _recorded(directory: Directory, stage: str, artifact: str) -> dict[str, Path]:
    """The files that a stage wrote, by path in its artifact. What others put there is not one."""
    prefix = f"{artifact}/"
    return {
        file.removeprefix(prefix): directory.path / file
        for file in directory.records[stage].files
        if file.startswith(prefix) and not file.endswith(f"/{CARD}")
    }


def _exports(
    job: Job, directory: Directory, stale: Mapping[str, str], adapter: str | None
) -> tuple[dict[str, Path], list[str]]:
    """Exported files by their path in the repository, and what is left out."""
    files, notes = dict[str, Path](), list[str]()
    for target in job.targets:
        kind = TARGETS[target]
        if isinstance(kind, UseCasesTarget):
            notes.append(f"export/{target} is left out: it holds the base and all adapters")
            continue
        if isinstance(kind, GraphTarget) and adapter is None:
            continue
        stage = f"export/{target}" if adapter is None else f"export/{target}/{adapter}"
        checks = [f"verify/{target}/{name}" for name in ([adapter] if adapter else job.adapters)]
        if adapter is None and isinstance(kind, SwitchableTarget):  # it has a check of its own
            checks = [f"verify/{target}"]
        unchecked = [check for check in checks if check in stale]
        if (reason := stale.get(stage)) is not None:
            notes.append(f"{stage} is left out: {reason}")
        elif len(unchecked) == len(checks):  # a base is checked with any of its adapters
            check = unchecked[0]
            notes.append(
                f"{stage} is left out: it has not passed its check ({check}: {stale[check]}). "
                f"Run first: {_run_line(directory.path)}"
            )
        else:
            artifact = f"export/{target}/{adapter or 'base'}"
            folder = directory.path / artifact
            own = _recorded(directory, stage, artifact)
            is_ours = f"{artifact}/{CARD}" in directory.records[stage].files
            if is_ours and (folder / CARD).is_file():  # how to use it; no card of the hub
                own[CARD] = folder / CARD
            files |= {f"{target}/{name}": path for name, path in own.items()}
            if adapter and (missing := job.get("parity", target, adapter, "not_run")):
                notes.append(f"{stage} was not run here: {missing}")
    return files, notes


def _without_paths(files: dict[str, Path], scratch: Path, base: str | None) -> dict[str, Path]:
    """The files, but adapter configurations name the base on the hub, not its path here.

    The records next to them, and above them, list the files as they are uploaded.
    """
    files = dict(files)
    for name in [name for name in files if PurePosixPath(name).name == CONFIG]:
        config = json.loads(files[name].read_text())
        if config.get(_BASE_PATH) is not None:
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(scratch / name, strict_json.dumps({**config, _BASE_PATH: base}, indent=2))
            files[name] = scratch / name
    records = [name for name in files if PurePosixPath(name).name == FILE]
    for name in sorted(records, key=lambda name: -name.count("/")):
        folder = (scratch / name).parent
        record, prefix = json.loads(files[name].read_text()), name.removesuffix(FILE)
        listed_files = list(record.get(manifest.FILES, {}))
        gone = [file for file in listed_files if prefix + file not in files]
        changed = [file for file in listed_files if (folder / file).is_file()]
        if gone or changed:
            record[manifest.FILES] = {
                f: d for f, d in record[manifest.FILES].items() if f not in gone
            }
            folder.mkdir(parents=True, exist_ok=True)
            write_text(scratch / name, strict_json.dumps(record, indent=1) + "\n")
            manifest.add(folder, FILE, changed)
            files[name] = scratch / name
    return files


def _check_no_path(folder: Path, files: Mapping[str, Path]) -> None:
    """Check that no text file names the job's folder or a file in the user's home folder."""
    paths = [str(folder.absolute()), str(folder.resolve())]
    if Path.home() != Path(Path.home().anchor):
        paths.append(f"{Path.home()}/")
    written = {form for path in paths for form in (path, json.dumps(path)[1:-1])}
    for name, file in files.items():
        if file.suffix in _TEXTS:
            text = file.read_text(encoding="utf-8", errors="replace")
            if found := next((path for path in sorted(written) if path in text), None):
                raise DirectoryError(
                    f"{name} ({str(file)!r}) names {found!r}, a path of this machine. Nothing was "
                    "uploaded. Remove it from the file, or from the recipe and run it again"
                )


def _base_files(
    recipe: Recipe,
    job: Job,
    directory: Directory,
    scratch: Path,
    repository: str,
    license: str | None,
) -> dict[str, Path]:
    folder = directory.path / "base"
    unwanted = (MOMENTS, SOLVER_SCALES.partition("/")[0])
    files = {
        name: path
        for name, path in _recorded(directory, "quantize", "base").items()
        if name.partition("/")[0] not in unwanted
    }
    record = read_record(folder)
    origin = origin_of(recipe.model.source)
    changed = {**record, "source": origin.repository or origin.name}
    files |= _resealed(folder, RECORD, changed, scratch)
    if not is_users_card(folder / CARD):
        places = Places(
            exported_base="base/{target}",
            use_cases=None,
            hub_base=repository,
            license=license,
        )
        write_text(scratch / CARD, base_card(job, recipe, places))
        files[CARD] = scratch / CARD
    else:
        files[CARD] = folder / CARD
    return files


def _adapter_files(
    recipe: Recipe,
    job: Job,
    directory: Directory,
    scratch: Path,
    name: str,
    repository: str,
    license: str | None,
) -> tuple[dict[str, Path], list[str]]:
    folder, notes = directory.path / "adapters" / name, list[str]()
    fingerprint = read_record(directory.path / "base")["fingerprint"]
    if found := problems(folder, fingerprint, "refuse"):
        raise DirectoryError(f"adapter {name!r} cannot be uploaded: {listed(found)}")
    base = _pushed_base(directory.path, fingerprint)
    if base is None:
        notes.append(
            "the base was not uploaded from this job, so nothing can say where it is. Upload it "
            "first: leave --adapter out"
        )
    files = _recorded(directory, f"train/{name}", f"adapters/{name}")
    config = json.loads((folder / CONFIG).read_text())
    write_text(
        scratch / CONFIG,
        strict_json.dumps({**config, _BASE_PATH: base}, indent=2),
    )
    record = json.loads((folder / FILE).read_text())
    files[CONFIG] = scratch / CONFIG
    files |= _resealed(folder, FILE, record, scratch)
    if not is_users_card(folder / CARD):
        places = Places(
            adapter=name,
            exported_base="base/{target}",
            use_cases=None,
            exported=f"{name}/{{target}}",
            hub_base=base,
            hub_adapter=repository,
            license=license,
        )
        write_text(scratch / CARD, adapter_card_text(job, recipe, name, places))
        files[CARD] = scratch / CARD
    else:
        files[CARD] = folder / CARD
    return files, notes


def _resealed(folder: Path, name: str, record: dict[str, Any], scratch: Path) -> dict[str, Path]:
    """The record `name` with other content, and digests of the files as they are uploaded."""
    listed_files = [file for file in record.pop(manifest.FILES, {}) if file != name]
    for file in listed_files:
        if not (scratch / file).exists():
            (scratch / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / file, scratch / file)
    manifest.write(scratch, name, record, listed_files)
    return {name: scratch / name}


def _pushed_base(folder: Path, fingerprint: str) -> str | None:
    """Where the base was uploaded to, if it is still this one."""
    note = _pushed(folder)
    return str(note["base"]) if note.get("fingerprint") == fingerprint else None


def _pushed(folder: Path) -> dict[str, Any]:
    """What was uploaded from this job: `base`, `fingerprint`, and `files` by repository."""
    try:
        note = json.loads((folder / ".qwlora" / PUSHED).read_text())
        return {"files": {}, **note}
    except (OSError, ValueError, TypeError):
        return {"files": {}}
