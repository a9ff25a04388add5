"""A bundle: the folder of one target, with everything needed to run and to prove it elsewhere.

    base/                     the base's integers; qwlora.json lists the digests of its files
    NAME/                     an adapter; the same
    proof/NAME/               reference.safetensors (`reference.py`) unless `export.proof` is none,
                              and proof.json with figures, checks and digests of both qwlora.json
    README.md                 what it is, how to run it, what was proven
    stage.json                in each folder: the job's record of it, which nothing here reads

Targets that hold base and adapter together have no base/, and targets of use cases no NAME/ either:
their files are the bundle itself.

A changed, missing or additional file is refused, and so is a base or an adapter of another bundle.
README.md, here or in a folder of files, may be edited; without its last line, `CARD_MARK`, no later
run replaces it. Hidden files next to that of the bundle (.gitattributes, .cache) are ignored.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from qwlora.errors import FingerprintError, QwloraWarning, SourceError, listed
from qwlora.formats import manifest
from qwlora.system.atomic import files_in, total_bytes, write_tensors
from qwlora.system.parameter_names import BASE
from qwlora.system.regular_files import check_plain
from qwlora.targets.proof.canary import Canary, write_canary
from qwlora.targets.proof.checks import Limits
from qwlora.targets.proof.contents import ADAPTER_FILE, RECORD, STAGE
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import PROOF, ExportedBase, ExportedGraph

README = "README.md"
# In a base's record: why the files have no key-value cache; the model's class in transformers.
WITHOUT_CACHE, MODEL_CLASS = "without_cache", "model_class"
ROUNDED = "rounded"  # the same of base and adapters: see `rounded_floats.py`
PROOF_RECORD, REFERENCE = "proof.json", "reference.safetensors"
TEXT, TEXTS = "text", ("generated", "held_out", "none")  # of the reference: `export.proof`
FORMAT = 1


def write_record(folder: Path, target: str, base_fingerprint: str | None, **facts: Any) -> None:
    """Write the record of exported files, with digests of all of them and these `facts`, if they
    are not None."""
    record = {"target": target, "base_fingerprint": base_fingerprint, **facts}
    known = {key: value for key, value in record.items() if value is not None}
    # A user may edit README.md.
    manifest.write(folder, RECORD, known, set(files_in(folder)) - {README})


def write_files(
    name: str,
    exported: Any,
    base_fingerprint: str,
    folder: Path,
    base: Path | None = None,
    canary: Canary | None = None,
    **about: Any,
) -> dict[str, Any]:
    """Write the files of a base or an adapter, and their record.

    Args:
        name: of the target.
        exported: what its `Backend` takes.
        folder: for the files; it may hold others, which the record lists, too.
        base: folder of the base that the adapter is for. None: write a base, or both together.
        canary: what the model answers, for `verify_server`.
        about: what else the record says.

    Returns:
        `bytes` of the model's files, and what the record says about a base.
    """
    # Model cards import this module, and need no torch.
    from qwlora.targets.rounded_floats import EMBEDDINGS, FACTORS, rounded

    target, facts = TARGETS[name], dict[str, Any]()
    if base is None and target.has_base:
        rounds = isinstance(exported, ExportedBase) and exported.embedding_bits == 8
        # Embeddings of the file that the base came from are copied.
        what = [EMBEDDINGS] if rounds and exported.gguf_file is None else []
        with ExitStack() as stack:
            done = stack.enter_context(rounded(exported.model, what)) if what else list[str]()
            facts[WITHOUT_CACHE] = target.backend.write_base(exported, folder)
        facts[ROUNDED] = done + [FACTORS] * target.rounds_adapters if rounds else None
    else:
        target.backend.write_adapter(exported, base or folder / BASE, folder)
    if isinstance(exported, ExportedBase):
        facts[MODEL_CLASS] = type(exported.model).__name__
    facts = {key: fact for key, fact in facts.items() if fact is not None}
    # Before the tokenizer is saved, which is no part of the model.
    size = total_bytes(folder.glob(target.model_files))
    if base is None and isinstance(exported, ExportedGraph) and exported.tokenizer is not None:
        exported.tokenizer.save_pretrained(folder)
    # The fingerprint is that of the base's integers. Grids of an adapter are of one calibration.
    of = record_digest(base) if base is not None and target.is_simulated else None
    if canary is not None:
        write_canary(folder, canary, base_fingerprint)
    write_record(folder, name, base_fingerprint, **facts, **about, base=of)
    return {"bytes": size, **facts}


def write_proof(
    folder: Path, reference: Mapping[str, Any] | None, record: Mapping[str, Any]
) -> None:
    """Write the reference, if there is one, and the record of one adapter into `folder`."""
    if reference is not None:
        write_tensors(folder / REFERENCE, dict(reference))
    files = [] if reference is None else [REFERENCE]
    manifest.write(folder, PROOF_RECORD, {"format": FORMAT, **record}, files)


def proof_record(target: str, bundle: Path, name: str, limits: Limits) -> dict[str, Any]:
    """What a proof says about the exported files that it is of."""
    base = manifest.read(bundle / BASE / RECORD)
    return {
        "target": target,
        "adapter": name,
        "of": _digests(target, bundle, name),
        "limits": {"perplexity_difference": limits.perplexity_difference},
        **{key: base[key] for key in (WITHOUT_CACHE, MODEL_CLASS, ROUNDED) if key in base},
    }


def renamed_proof(path: Path, name: str) -> str:
    """The content of a proof.json for another name of its adapter."""
    return manifest.text({**_read_proof(path), "adapter": name}, PROOF_RECORD)


def record_digest(folder: Path) -> str:
    """SHA-256 of a base's or an adapter's record, which lists the digests of its files."""
    return hashlib.sha256((folder / RECORD).read_bytes()).hexdigest()


def _digests(target: str, bundle: Path, name: str) -> dict[str, str]:
    parts = TARGETS[target].parts(bundle, name).items()
    return {part: record_digest(folder) for part, folder in parts}


def is_of_base(bundle: Path, adapter: str) -> bool:
    """Whether the adapter was exported for the base that is there, and is whole."""
    folder, base = bundle / adapter, manifest.read(bundle / BASE / RECORD)
    record = manifest.read(folder / RECORD)
    if not base or not record:
        return False
    digest = record_digest(bundle / BASE)
    is_of = record.get("base", digest) == digest
    if not is_of or record.get("base_fingerprint") != base.get("base_fingerprint"):
        return False
    # Of a simulated adapter, ONNX Runtime loads one file; the encodings are for other tools.
    loaded = (ADAPTER_FILE,) if "base" in record else None  # None: every file
    return not manifest.changed_files(folder, RECORD, only=loaded)


def is_bundle(folder: Path) -> bool:
    """Whether a folder has the layout of a bundle."""
    return (folder / PROOF).is_dir() and ((folder / BASE).is_dir() or bool(_proof_paths(folder)))


def proofs(bundle: Path) -> dict[str, dict[str, Any]]:
    """The records of all adapters of a bundle, by name."""
    return {path.parent.name: _read_proof(path) for path in _proof_paths(bundle)}


def current_proofs(bundle: Path) -> dict[str, dict[str, Any]]:
    """The records of the adapters whose proof is of the files that are there.

    Warns:
        QwloraWarning: one cannot be read, or changed; it is left out.
    """
    current = {}
    for path in _proof_paths(bundle):
        name = path.parent.name
        if not (bundle / name).is_dir():
            continue
        try:
            record = _read_proof(path)
            if _digests(str(record.get("target")), bundle, name) == record["of"]:
                current[name] = record
        except SourceError as error:
            message = f"{README} leaves out adapter {name}: {error}"
            warnings.warn(message, QwloraWarning, stacklevel=2)
        except (KeyError, OSError):  # an unknown target, or no files
            continue
    return current


def _proof_paths(bundle: Path) -> list[Path]:
    return sorted(bundle.glob(f"{PROOF}/*/{PROOF_RECORD}"))


def _read_proof(path: Path) -> dict[str, Any]:
    """A proof.json. Raises SourceError: it cannot be read, or is not as it was saved."""
    record, folder = manifest.read(path), path.parent
    listed_files = manifest.listed_files(folder, PROOF_RECORD)
    changed = manifest.changed_files(folder, PROOF_RECORD, only=())  # of the record itself
    limits, of, form = record.get("limits"), record.get("of"), record.get("format")
    text = record.get(TEXT)
    limit = limits.get("perplexity_difference") if isinstance(limits, dict) else None
    # A bundle brings its own limit, and a large one would let any files pass.
    is_limit = isinstance(limit, int | float) and not isinstance(limit, bool) and 0 < limit <= 1
    needed = {
        "no readable record": bool(record),
        f"format {form!r}, not {FORMAT}": form == FORMAT,
        f"limits.perplexity_difference {limit!r}, not a relative difference above 0 and up to 1": (
            is_limit
        ),
        "no of": isinstance(of, dict),
        f"{TEXT} {text!r}, not {listed(TEXTS)}": text in TEXTS,
        f"no digests of itself and of {REFERENCE}": (
            listed_files == [PROOF_RECORD, *[REFERENCE] * (text != "none")]
        ),
        "changed after saving": not changed,
    }
    if problem := next((problem for problem, holds in needed.items() if not holds), None):
        raise SourceError(f"{str(path)!r} has {problem}; copy it again, or verify the job again")
    return record


def check_complete(bundle: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises FingerprintError: a file, a folder or a use case of the bundle has no proof."""
    unknown = [path for path in (bundle / PROOF).iterdir() if path.name not in records]
    # Files of use cases are not in folders of their own: `check_files` compares the whole bundle
    # with its record, which also names them.
    if any(TARGETS[r["target"]].has_cases for r in records.values()):
        cases = manifest.read(bundle / RECORD).get("use_cases")
        names = map(str, cases if isinstance(cases, list) else ())
        if unproven := sorted(set(names) - records.keys()):
            raise FingerprintError(
                f"{str(bundle)!r} has no {PROOF}/NAME of use cases {listed(unproven)}; copy the "
                "whole bundle again, or verify the job that exported it"
            )
    else:
        known = {BASE, PROOF, README, STAGE, *records}
        unknown += [path for path in bundle.iterdir() if path.name not in known]
    seen = [path for path in unknown if not path.name.startswith(".")]
    if added := sorted(str(path.relative_to(bundle)) for path in seen):
        raise FingerprintError(
            f"{str(bundle)!r} holds files without a proof: {listed(added)}; remove them, or verify "
            "the job that exported them"
        )


def check_files(bundle: Path, name: str, record: Mapping[str, Any]) -> None:
    """Compare base, adapter and proof of a bundle with their digests and with each other."""
    proof = bundle / PROOF / name
    files = [file for file in files_in(proof) if file != STAGE]
    _check_sealed(proof, PROOF_RECORD, files, "verify the job again")
    if record.get("adapter") != name:
        raise FingerprintError(
            f"{PROOF}/{name} is the proof of adapter {record.get('adapter')!r}; copy the whole "
            "bundle again, or verify the job again"
        )
    target = TARGETS[record["target"]]
    for part, folder in target.parts(bundle, name).items():
        files = [file for file in files_in(folder) if file not in (README, STAGE)]
        if folder == bundle:  # without those of proofs, and what is hidden
            files = [file for file in files if not file.startswith((f"{PROOF}/", "."))]
        _check_sealed(folder, RECORD, files, "export it again")
        if record_digest(folder) != record["of"].get(part):
            raise FingerprintError(
                f"{str(folder)!r} differs from the one proven in {PROOF}/{name}. Copy the whole "
                "bundle again, or verify the job again"
            )


def _check_sealed(folder: Path, name: str, files: Sequence[str], remedy: str) -> None:
    known = {*manifest.listed_files(folder, name)} - {README}
    if name not in known:
        raise FingerprintError(f"{str(folder)!r} has no readable {name} with digests; {remedy}")
    manifest.check(folder, name, repr(str(folder)), remedy, only=known)
    if added := sorted(set(files) - known):
        raise FingerprintError(
            f"{str(folder)!r} holds files that were not exported: {listed(added)}; remove them"
        )


def checked_proofs(bundle: Path) -> dict[str, dict[str, Any]]:
    """The records of all adapters of a bundle, by name, after all its files were checked.

    Raises:
        FingerprintError: files and proofs are not those of each other.
        SourceError: the folder is not a bundle of a known target, holds what no export writes, or a
            proof cannot be read or has no text to run the files on.
    """
    # Before anything is read: a pipe would block, and a link leads out of the bundle.
    check_plain(bundle)
    records = proofs(bundle)
    if not records:
        raise SourceError(
            f"{str(bundle)!r} has no {PROOF}/NAME/{PROOF_RECORD}; verify the job that exported it"
        )
    targets = {str(record.get("target")) for record in records.values()}
    if unknown := sorted(targets - TARGETS.keys()):
        raise SourceError(
            f"{str(bundle)!r} is for target {listed(map(repr, unknown))}, which is unknown; copy "
            "it again, or export it again"
        )
    check_complete(bundle, records)
    for name, record in records.items():
        check_files(bundle, name, record)
    if silent := [name for name, record in records.items() if record.get(TEXT) == "none"]:
        raise SourceError(
            f"the files in {str(bundle)!r} are those that were proven, but cannot be run again: "
            f"{PROOF}/ of {listed(silent)} has no text, because the job that exported them has "
            "export.proof: none. Set it to generated, and run the job again"
        )
    return records
