"""A bundle: the folder of one target, with everything needed to run and to prove it elsewhere.

    base/                     the base's integers; qwlora.json lists the digests of its files
    NAME/                     an adapter; the same
    proof/NAME/               see `proof.py`; proof.json has the digests of both qwlora.json
    README.md                 what it is, how to run it, what was proven

Targets that hold base and adapter together have no base/, and targets of use cases no NAME/ either:
their files are the bundle itself.

A changed, missing or additional file is refused, and so is a base or an adapter of another bundle.
README.md, here or in a folder of files, may be edited; without its last line, `CARD_MARK`, no later
run replaces it. Hidden files next to that of the bundle (.gitattributes, .cache) are ignored.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwlora.atomic import files_in, read_tensors, write_tensors, write_text
from qwlora.errors import FingerprintError, QwloraWarning, SourceError
from qwlora.export.bundle_contents import check_contents, check_plain
from qwlora.export.finite_figures import only_finite, shown
from qwlora.export.onnx_adapter import ADAPTER_FILE
from qwlora.export.registry import TARGETS
from qwlora.export.target import PROOF, BundleTarget, GraphTarget, Target, UseCasesTarget
from qwlora.formats import manifest
from qwlora.formats.card_mark import escaped, is_users_card, marked
from qwlora.messages import listed, size
from qwlora.progress import Track, untracked

BASE, README = "base", "README.md"
RECORD = "qwlora.json"  # of a base or an adapter: the base's fingerprint, and digests of the files
WITHOUT_CACHE = "without_cache"  # in a base's record: why the files have no key-value cache
PROOF_RECORD, REFERENCE = "proof.json", "reference.safetensors"
FORMAT = 1


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of exported files, with digests of all of them but README.md, which a user
    may edit."""
    manifest.write(folder, RECORD, record, _without_readme(files_in(folder)))


def _without_readme(files: Iterable[str]) -> list[str]:
    return [name for name in files if name != README]


def write_proof(folder: Path, reference: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Write the reference and the record of one adapter into `folder`."""
    write_tensors(folder / REFERENCE, dict(reference))
    manifest.write(folder, PROOF_RECORD, {"format": FORMAT, **record}, [REFERENCE])


def renamed_proof(path: Path, name: str) -> str:
    """The content of a proof.json for another name of its adapter.

    Raises:
        SourceError: see `proofs`.
    """
    return manifest.text({**_read_proof(path), "adapter": name}, PROOF_RECORD)


def record_digest(folder: Path) -> str:
    """SHA-256 of a base's or an adapter's record, which lists the digests of its files."""
    return hashlib.sha256((folder / RECORD).read_bytes()).hexdigest()


def is_of_base(bundle: Path, adapter: str) -> bool:
    """Whether the adapter was exported for the base that is there, and what its runtime loads is
    whole."""
    folder = bundle / adapter
    try:
        base, record = (json.loads((f / RECORD).read_text()) for f in (bundle / BASE, folder))
    except (OSError, ValueError):
        return False
    if not isinstance(base, dict) or not isinstance(record, dict):
        return False
    digest = record_digest(bundle / BASE)  # adapters of a switchable target have it
    is_of = record.get("base", digest) == digest
    if not is_of or record.get("base_fingerprint") != base.get("base_fingerprint"):
        return False
    loaded = (ADAPTER_FILE,) if "base" in record else None  # None: every file
    return not manifest.changed_files(folder, RECORD, only=loaded)


def without_cache(base: Path) -> str | None:
    """Why a base's files have no key-value cache; None: they have one, or always do."""
    found: str | None = json.loads((base / RECORD).read_text()).get(WITHOUT_CACHE)
    return found


def is_bundle(folder: Path) -> bool:
    """Whether a folder has the layout of a bundle."""
    return (folder / PROOF).is_dir() and ((folder / BASE).is_dir() or bool(_proof_paths(folder)))


def proofs(bundle: Path) -> dict[str, dict[str, Any]]:
    """The records of all adapters of a bundle, by name.

    Raises:
        SourceError: one cannot be read; see `_read_proof`.
    """
    return {path.parent.name: _read_proof(path) for path in _proof_paths(bundle)}


def current_proofs(bundle: Path, without: str | None = None) -> dict[str, dict[str, Any]]:
    """The records of the adapters whose proof is of the files that are there.

    Args:
        without: an adapter to leave out.

    Warns:
        QwloraWarning: one cannot be read, or was edited; it is left out.
    """
    found = {}
    for path in _proof_paths(bundle):
        name = path.parent.name
        if name == without or not (bundle / name).is_dir():
            continue
        try:
            record = _read_proof(path)
            if not _has_both_digests(path.parent) or manifest.changed_files(
                path.parent, PROOF_RECORD, only=()
            ):
                raise SourceError(f"{str(path)!r} changed after saving")
        except SourceError as error:
            warnings.warn(
                f"{README} leaves out adapter {name}: {error}", QwloraWarning, stacklevel=2
            )
            continue
        if _is_of_files(bundle, name, record):
            found[name] = record
    return found


def _has_both_digests(proof: Path) -> bool:
    """Whether the record of a proof has the digests of itself and of the reference."""
    return manifest.listed_files(proof, PROOF_RECORD) == sorted([PROOF_RECORD, REFERENCE])


def _is_of_files(bundle: Path, name: str, record: Mapping[str, Any]) -> bool:
    """Whether a proof is of the base and the adapter that are there."""
    if (target := TARGETS.get(str(record.get("target")))) is None:
        return False
    folders = proven_folders(target, bundle, name)
    try:
        return {part: record_digest(folder) for part, folder in folders.items()} == record["of"]
    except OSError:
        return False


def _proof_paths(bundle: Path) -> list[Path]:
    return sorted(bundle.glob(f"{PROOF}/*/{PROOF_RECORD}"))


def _read_proof(path: Path) -> dict[str, Any]:
    """A proof.json.

    Raises:
        SourceError: it cannot be read, has another format, or lacks the limits.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{str(path)!r} cannot be read ({error}); copy it again") from error
    again = "copy it again, or verify the job again"
    if not isinstance(record, dict):
        raise SourceError(f"{str(path)!r} holds no JSON object; {again}")
    if record.get("format") != FORMAT:
        raise SourceError(
            f"{str(path)!r} has format {record.get('format')!r}, not {FORMAT}; verify the job again"
        )
    limits, of = record.get("limits"), record.get("of")
    limit = limits.get("perplexity_difference") if isinstance(limits, dict) else None
    if not isinstance(limit, int | float) or not isinstance(of, dict):
        missing = "of" if not isinstance(of, dict) else "limits.perplexity_difference"
        raise SourceError(f"{str(path)!r} has no {missing}; {again}")
    if isinstance(limit, bool) or not 0 < limit <= 1:
        raise SourceError(
            f"{str(path)!r} has limits.perplexity_difference {limit}, not a relative difference "
            f"above 0 and up to 1; {again}"
        )
    return record


def check_complete(bundle: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that nothing is in the bundle but what the proofs are of.

    Files of use cases are not in folders of their own: `check_files` compares the whole bundle with
    its record, which also names them.

    Args:
        records: the proofs, by name of the adapter.

    Raises:
        FingerprintError: a file, a folder or a use case has no proof.
    """
    known = {BASE, PROOF, README, *records}
    parts = [(path, path.name in records) for path in (bundle / PROOF).iterdir()]
    if any(isinstance(TARGETS[r["target"]], UseCasesTarget) for r in records.values()):
        if unproven := sorted(set(_use_cases(bundle)) - records.keys()):
            raise FingerprintError(
                f"{str(bundle)!r} has no {PROOF}/NAME of use cases {listed(unproven)}; copy the "
                "whole bundle again, or verify the job that exported it"
            )
    else:
        parts += [(path, path.name in known) for path in bundle.iterdir()]
    added = sorted(
        str(path.relative_to(bundle))
        for path, is_known in parts
        if not is_known and not path.name.startswith(".")
    )
    if added:
        raise FingerprintError(
            f"{str(bundle)!r} holds files without a proof: {listed(added)}; remove them, or verify "
            "the job that exported them"
        )


def _use_cases(bundle: Path) -> list[str]:
    """The use cases that were exported; none if the record cannot be read (see `check_files`)."""
    try:
        record = json.loads((bundle / RECORD).read_text())
        return [str(case) for case in record["use_cases"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def check_files(bundle: Path, name: str, record: Mapping[str, Any]) -> None:
    """Compare base, adapter and proof of a bundle with their digests, with each other, and with
    what the target writes.

    Raises:
        FingerprintError: a file was changed, added or removed, or base and adapter are not those
            of the proof; or the proof has no digests, or is that of another adapter.
        SourceError: see `check_contents`.
    """
    if not _has_both_digests(bundle / PROOF / name):
        raise FingerprintError(
            f"{str(bundle / PROOF / name / PROOF_RECORD)!r} lacks the digests of itself and of "
            f"{REFERENCE}; copy it again, or verify the job again"
        )
    manifest.check(bundle / PROOF / name, PROOF_RECORD, f"proof of {name}", "verify the job again")
    if record.get("adapter") != name:
        raise FingerprintError(
            f"{PROOF}/{name} is the proof of adapter {record.get('adapter')!r}; copy the whole "
            "bundle again, or verify the job again"
        )
    target = TARGETS[record["target"]]
    for part, folder in proven_folders(target, bundle, name).items():
        what = f"{str(folder)!r}"
        if not manifest.has_digests(folder, RECORD):
            raise FingerprintError(f"{what} has no readable {RECORD} with digests; copy it again")
        known = _without_readme(manifest.listed_files(folder, RECORD))
        own = _without_readme(files_in(folder))
        if folder == bundle:
            own = [file for file in own if not _is_of_other(file)]
        manifest.check(folder, RECORD, what, "export it again", only=known)
        if record_digest(folder) != record.get("of", {}).get(part):
            raise FingerprintError(
                f"{what} is not the one that the proof in {PROOF}/{name} is of; copy the whole "
                "bundle again, or verify the job again"
            )
        if added := sorted(set(own) - set(known)):
            raise FingerprintError(
                f"{what} holds files that were not exported: {listed(added)}; remove them"
            )
        check_contents(target.contents, folder, own, part == BASE)
    if added := sorted(set(files_in(bundle / PROOF / name)) - {PROOF_RECORD, REFERENCE}):
        raise FingerprintError(
            f"{str(bundle / PROOF / name)!r} holds files of no proof: {listed(added)}; remove them"
        )


def _is_of_other(name: str) -> bool:
    """Whether a file of a bundle belongs to a proof, or is hidden or in a hidden folder."""
    return name.startswith((f"{PROOF}/", "."))


def proven_folders(target: Target, bundle: Path, name: str) -> dict[str, Path]:
    """The folders with a record that a proof is of, by what they are."""
    if isinstance(target, BundleTarget):
        return {BASE: bundle / BASE, "adapter": bundle / name}
    return {"files": bundle if isinstance(target, UseCasesTarget) else bundle / name}


def verify_bundle(bundle: Path, track: Track = untracked) -> dict[str, dict[str, Any]]:
    """Prove a bundle again: check its files, run them, and compare with the reference.

    Returns:
        figures by adapter, as in proof.json.

    Raises:
        FingerprintError: see `check_files` and `check_complete`.
        MissingExtraError: the target's program is not installed.
        ExportError: it refuses the files.
        SourceError: the folder is no bundle of a known target, holds what no export writes, or a
            proof cannot be read or proves nothing.
    """
    found = {}
    check_plain(bundle)
    records = proofs(bundle)
    if not records:
        raise SourceError(
            f"{str(bundle)!r} has no {PROOF}/NAME/{PROOF_RECORD}; verify the job that exported it"
        )
    targets = {name: TARGETS.get(str(record.get("target"))) for name, record in records.items()}
    for name, found_target in targets.items():
        if found_target is None:
            unknown = records[name].get("target")
            raise SourceError(f"{str(bundle)!r} is of target {unknown!r}: unknown")
    check_complete(bundle, records)
    for name, record in records.items():
        check_files(bundle, name, record)
    for name, record in track(records.items(), "verifying", len(records)):
        target = TARGETS[record["target"]]
        target.require_packages()
        reference, _ = read_tensors(bundle / PROOF / name / REFERENCE)
        found[name] = proven(target, bundle, name, reference, record["limits"])
    return found


def proven(
    target: Target,
    bundle: Path,
    name: str,
    reference: Mapping[str, Any],
    limits: Mapping[str, float],
) -> dict[str, Any]:
    """What running an adapter of a bundle gives: figures as far as they are finite, problems,
    program and machine."""
    from qwlora.export.graph_parity import DECODED
    from qwlora.export.proof import (
        SAME,
        broken_limits,
        client,
        is_told_apart,
        machine,
        measure,
        measure_logits,
        perplexity_limits,
    )

    if isinstance(target, BundleTarget):
        figures = measure(target, bundle / BASE, bundle / name, reference)
    elif isinstance(target, UseCasesTarget):
        figures = measure_logits(target.logits(bundle, name, DECODED), reference)
    else:
        assert isinstance(target, GraphTarget)
        figures = measure_logits(target.logits(bundle / name, DECODED), reference)
    problems = list(broken_limits(figures, reference, limits["perplexity_difference"]))
    allowed = perplexity_limits(reference, limits["perplexity_difference"])
    return {
        "client": client(target),
        "machine": machine(),
        "figures": only_finite(figures),
        "perplexity_limits": only_finite(allowed),
        "passed": not problems,
        "problems": problems,
        "notes": [] if is_told_apart(reference, limits["perplexity_difference"]) else [SAME],
    }


def facts(model: Any, source: str) -> dict[str, Any]:
    """What a README says about a packed base that was made from the model `source`."""
    from qwlora.formats.model_origin import origin_of
    from qwlora.grid.scheme import short_name
    from qwlora.nn.pack_at import packed_weights

    origin = origin_of(source)
    grids = Counter(short_name(layer.scheme) for layer in packed_weights(model).values())
    return {"model": origin.name, "license": origin.license, "grids": dict(grids)}


def write_readme(bundle: Path, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Write README.md from the records of all adapters, unless the user edited it.

    Without a record there is nothing to say: it is deleted.
    """
    if is_users_card(bundle / README):
        return
    if not records:
        (bundle / README).unlink(missing_ok=True)
        return
    names, some = sorted(records), next(iter(records.values()))
    target = TARGETS[some["target"]]
    assert isinstance(target, BundleTarget)
    sizes = {
        path: size(sum(f.stat().st_size for f in (bundle / path).rglob("*") if f.is_file()))
        for path in (BASE, *names)
    }
    grids = ", ".join(f"{count} of {grid}" for grid, count in some["grids"].items())
    adapters = "one LoRA adapter" if len(names) == 1 else f"{len(names)} LoRA adapters"
    parts = [
        f"# {escaped(some['model'])} for {some['target']}",
        f"A quantized base model and {adapters} trained on exactly these integers. "
        f"Weights: {grids}. Fingerprint of the base: `{some['base_fingerprint'][:16]}`.",
        "## Run\n\nIn this folder:",
        *_loading(target, names[0], some.get(WITHOUT_CACHE)),
        "| folder | what | size |\n|---|---|---|\n"
        + "\n".join(
            f"| `{path}/` | {'base' if path == BASE else 'adapter'} | {n} |"
            for path, n in sizes.items()
        ),
        "## Proof\n\n" + "\n".join(proof_table(records)),
        "`qwlora verify .` repeats this, on any machine that has the program.",
        f"## License\n\n{_license(some['license'])}",
    ]
    write_text(bundle / README, marked("\n\n".join(parts)))


def _loading(target: BundleTarget, adapter: str, without_cache: str | None) -> list[str]:
    if without_cache is None:
        return [target.loading(BASE, adapter)]
    return [
        target.loading_without_cache(BASE, adapter),
        f"The files have no key-value cache, so every token runs the whole sequence: "
        f"{without_cache}",
    ]


def _license(stated: str | None) -> str:
    if stated is None:
        return "That of the base model, whose files do not state one."
    return f"That of the base model: {escaped(stated)}."


def proof_table(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The figures of all adapters as lines of Markdown."""
    lines = [
        "Each file was run in the program and compared with the model that it is made of: the "
        "trained one, or its simulation where activations are on grids.",
        "",
        "| adapter | settings | perplexity, expected and here | KL | same likeliest token | "
        "log-probability off by, at most | tokens per second, prompt and new | switch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for name, record in records.items():
        if "not_run" in record:
            notes.append(f"{name}: written, not run. {escaped(record['not_run'])}")
            continue
        for settings in ("exact", "shipped"):
            if (found := record["figures"].get(settings)) is None:
                continue
            for state in ("base", "adapter"):
                if (of := found.get(state)) is None:
                    continue
                is_adapter = state == "adapter"
                speeds = (
                    f"{found['prefill_tokens_per_second']:.0f}, "
                    f"{found['decode_tokens_per_second']:.1f} | "
                    f"{1000 * found['switch_seconds']:.2g} ms"
                    if is_adapter and "switch_seconds" in found
                    else " | "
                )
                lines.append(
                    f"| {name if is_adapter else 'none'} | {settings} | "
                    f"{shown(of, 'reference_perplexity', '.3f')}, "
                    f"{shown(of, 'perplexity', '.3f')} | {shown(of, 'kl_divergence', '.2g')} | "
                    f"{of['top1_agreement']:.2%} | "
                    f"{shown(of, 'max_log_prob_difference', '.2g')} | {speeds} |"
                )
        clients = ", ".join(f"{n} {v}" for n, v in record["client"].items())
        memory, load = (record["figures"].get(k) for k in ("peak_memory_bytes", "load_seconds"))
        cost = "" if load is None else f"; {size(memory)} of memory, loaded in {load:.2g} s"
        failed = "; ".join(["FAILED", *map(escaped, record["problems"])])
        verdict = failed if record["problems"] else "passed"
        said = "".join(f" But {escaped(note)}." for note in record.get("notes", ()))
        notes.append(f"{name}: {verdict} on {record['machine']}, {clients}{cost}.{said}")
    return [*lines, "", *(f"- {note}" for note in notes)]
