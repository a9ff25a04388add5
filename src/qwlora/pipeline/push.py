"""Upload a job's base or one of its adapters to the Hugging Face hub.

A repository holds what somebody else needs, and nothing that names a path of this machine:

    base                base.safetensors, base.json, configuration, tokenizer, model card
    TARGET/             the base as exported for a runtime that switches adapters
    adapter             adapter_model.safetensors, adapter_config.json, qwlora.json, model card
    TARGET/             the files of the adapter for each runtime it was exported for

Left out: second moments and other inputs of training, and exported files that are out of date or
failed their check. The upload is one commit, so a reader sees all of it or nothing.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwlora import strict_json
from qwlora.adapter.adapter_check import problems
from qwlora.adapter.adapter_folder import CONFIG, FILE
from qwlora.atomic import files_in, write_text
from qwlora.errors import DirectoryError, UploadError, described
from qwlora.export.registry import TARGETS
from qwlora.export.target import GraphTarget, UseCasesTarget
from qwlora.formats import manifest
from qwlora.formats.base_folder import RECORD, read_record
from qwlora.formats.card_mark import is_users_card
from qwlora.formats.model_origin import origin_of
from qwlora.formats.shard_writer import STEM
from qwlora.messages import listed, suggestion
from qwlora.pipeline.artifacts import MOMENTS, SOLVER_SCALES
from qwlora.pipeline.directory import CARD, Directory, as_directory_errors
from qwlora.pipeline.job_report import read_job
from qwlora.pipeline.model_cards import Places, adapter_card_text, base_card
from qwlora.pipeline.run_job import command_line, job_recipe
from qwlora.recipe import Recipe
from qwlora.report.job import Job

PUSHED = "pushed.json"  # in .qwlora/: where the base was uploaded to


@dataclass(frozen=True)
class Upload:
    """What would be uploaded.

    Args:
        what: in words.
        repository: `owner/name`.
        is_private: whether a new repository is private.
        files: by path in the repository.
        notes: what is left out, and why.
    """

    what: str
    repository: str
    is_private: bool
    files: dict[str, Path]
    notes: tuple[str, ...]

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
            incomplete or changed.
    """
    recipe, job, directory = job_recipe(folder), read_job(folder), Directory.read(folder)
    _check(recipe, directory, "quantize", "the base", "quantize")
    if adapter is not None:
        known = [a.name for a in recipe.adapters]
        if adapter not in known:
            raise DirectoryError(
                f"{str(folder)!r} has no adapter {adapter!r}{suggestion(adapter, known)}"
            )
        _check(recipe, directory, f"train/{adapter}", f"adapter {adapter!r}", "train")
    with tempfile.TemporaryDirectory(prefix="qwlora-push-") as scratch:
        exports, notes = _exports(job, directory, adapter)
        if adapter is None:
            files = _base_files(recipe, job, directory, Path(scratch), repository, license)
        else:
            own, lacking = _adapter_files(
                recipe, job, directory, Path(scratch), adapter, repository, license
            )
            files, notes = own, [*notes, *lacking]
        what = "the base" if adapter is None else f"adapter {adapter}"
        yield Upload(what, repository, is_private, files | exports, tuple(notes))


def send(upload: Upload, folder: Path) -> str:
    """Upload as one commit; returns its address.

    Raises:
        UploadError: the hub refuses, or cannot be reached, or the repository is public although it
            should be private.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise UploadError(
            "there is no token for the hub. Run `hf auth login`, or set HF_TOKEN to a token that "
            "may write"
        )
    api, repository = HfApi(), upload.repository
    try:
        api.create_repo(repository, private=upload.is_private, exist_ok=True)
        if upload.is_private and not api.model_info(repository).private:
            raise UploadError(
                f"{repository} is a public repository. Nothing was uploaded. Give --public to "
                "upload to it, or another --to"
            )
        there = api.list_repo_files(repository)
        added = [CommitOperationAdd(name, str(path)) for name, path in upload.files.items()]
        gone = [CommitOperationDelete(name) for name in there if _is_outdated(name, upload)]
        commit = api.create_commit(
            repository, [*added, *gone], commit_message=f"Upload {upload.what} with QWLoRA"
        )
    except UploadError:
        raise
    except Exception as error:  # the client raises many types: offline, forbidden, too large ...
        raise UploadError(_refused(error, repository)) from error
    if RECORD in upload.files:
        note = {"base": repository, "fingerprint": read_record(folder / "base")["fingerprint"]}
        with as_directory_errors(folder):
            write_text(folder / ".qwlora" / PUSHED, strict_json.dumps(note, indent=1) + "\n")
    return str(commit.commit_url)


def _is_outdated(name: str, upload: Upload) -> bool:
    """Whether a file in the repository is of an earlier upload: other shards, dropped targets."""
    if name in upload.files:
        return False
    return name.partition("/")[0] in TARGETS or name.startswith(f"{STEM}-")


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


def _check(recipe: Recipe, directory: Directory, stage: str, what: str, verb: str) -> None:
    if (reason := directory.problem(stage, None)) is not None:
        raise DirectoryError(
            f"{what} of {str(directory.path)!r} cannot be uploaded: {stage} {reason}. Run first: "
            f"{command_line(verb, directory.path)}"
        )


def _exports(
    job: Job, directory: Directory, adapter: str | None
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
        folder = directory.path / "export" / target / (adapter or "base")
        parity = job.section("parity", target, adapter or "")
        if (reason := directory.problem(stage, None)) is not None:
            notes.append(f"{stage} is left out: {reason}")
        elif parity and not parity.get("passed", True):
            notes.append(f"{stage} is left out: it failed its check")
        else:
            files |= {f"{target}/{name}": folder / name for name in files_in(folder)}
    return files, notes


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
        name: folder / name
        for name in files_in(folder)
        if name.partition("/")[0] not in unwanted and not name.startswith(".")
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
    files = {file: folder / file for file in files_in(folder) if not file.startswith(".")}
    config = json.loads((folder / CONFIG).read_text())
    write_text(
        scratch / CONFIG,
        strict_json.dumps({**config, "base_model_name_or_path": base}, indent=2),
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
    try:
        note = json.loads((folder / ".qwlora" / PUSHED).read_text())
        return str(note["base"]) if note["fingerprint"] == fingerprint else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
