"""Bundles that somebody else made: files changed, replaced and added, with digests that agree."""

import hashlib
import json
import os
import pickle
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwlora.data.sequences import Sequences
from qwlora.formats import manifest
from qwlora.system.atomic import files_in
from qwlora.targets.proof.folder import record_digest, write_proof, write_record
from qwlora.targets.proof.reference import logits_of, make_reference
from qwlora.targets.registry import TARGETS
from targets.weights.test_weights_targets import bundle_of

from .damage import damage
from .hostile_models import Evil
from .jobs import fresh, write_recipe
from .record import Record
from .victims import Ended, parallel, python, qwlora, seeds

pytestmark = pytest.mark.attack
SECONDS = 120.0  # of processor time and waiting, until a bundle must be refused
RECORD, PROOF_RECORD, REFERENCE = "qwlora.json", "proof.json", "reference.safetensors"
CODE = "from pathlib import Path\nPath({marker!r}).write_text('ran')\n"
LIBRARY = b"\x7fELF\x02\x01\x01" + bytes(57)
# how a file of a bundle is changed; all digests are made to agree where that is possible
HOWS = ("one bit", "other bytes", "a program", "a folder", "a link", "a pipe", "removed")
ONCE = ("a folder", "a pipe")  # for one file of a target: no reader tells files apart before that
ADDED = ("evil.so", "modeling_evil.py", "custom_generate/generate.py", "a link", "a pipe")
# Where a change may pass, and why.
HARMLESS = {
    r"README\.md$": "for people; no program reads it, and it may be edited",
    r"stage\.json$": "the job's record; nothing that opens a bundle reads it",
    r"(^|/)(openvino_)?(tokenizer|special_tokens|added_tokens|chat_template|vocab|merges|detokenizer)[^/]*$": (
        "a proof is of token ids: `verify` opens no tokenizer"
    ),
    r"\.encodings$": "for other tools; the runtime reads the ONNX file, which holds the same grids",
    r"^NAME/adapter/": "the trained adapter, for PEFT; the runtime reads the exported one",
    r"(^|/)golden/": "what a device's outputs are compared with; `verify` computes them itself",
    r"/none\.onnx_adapter$": "`verify` opens a session without an adapter for the base",
    r"/session_options\.json$": "what they change in the runtime is measured",
}
# What may be missing, and why.
DISPENSABLE = {
    r"/canary\.json$": "for a proof on a running server; `verify` does not read it",
    r"/(generation_|adapter_)?config\.json$": (
        "the runtime computes the same without it; other programs may miss it"
    ),
    r"/submit_aihub\.py$": "a script for people; no runtime reads it",
    r"/qairt_recipe\.yaml$": "for Qualcomm's pipeline, which `verify` does not run",
    r"/(index\.html|model\.mjs)$": "the page of `web`; `verify` runs the copy in the package",
}
PROVEN = [name for name, target in TARGETS.items() if target.has_proof]


@pytest.fixture(scope="session")
def bundles(warm: None, place: Path, one_layer: Path, corpus: Path) -> dict[str, Path]:
    """The bundle of every target, by target."""
    folder = place / "bundles"
    folder.mkdir()
    # gguf needs a model from a GGUF file, executorch grids of its own
    targets = [name for name in PROVEN if name not in ("gguf", "executorch")]
    jobs: dict[str, tuple[list[str], dict[str, Any]]] = {
        # aimet and qairt have graphs with a cache
        "job": (targets, {"simulation": {"residual_adds": "quantize"}}),
        "executorch": (["executorch"], {"base": {"weights": "w4-bf16block32", "solver": "search"}}),
    }
    for job, (names, sections) in jobs.items():
        sections = {**sections, "export": {"targets": names}}
        recipe = write_recipe(folder / f"{job}.yaml", one_layer, corpus, **sections)
        for verb in ("quantize", "train", "calibrate", "export", "verify"):
            ended = qwlora(verb, recipe, "--out", folder / job, timeout=1800)
            assert not ended.code, ended.err
    ended = python(lambda: _write_gguf(folder / "gguf"), folder / "logs")
    assert not ended.code, ended.err
    written = {name: folder / job / "export" / name for job, (ns, _) in jobs.items() for name in ns}
    return {"gguf": folder / "gguf", **written}


def _write_gguf(bundle: Path) -> None:
    """A bundle of a tiny model from a GGUF file."""
    bundle.mkdir()
    adapted = bundle_of("gguf", bundle)
    for name in ("second", "trained"):
        shutil.rmtree(bundle / name)
    for name in ("base", "first"):
        write_record(bundle / name, "gguf", "0" * 64)
    ids = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(5))
    of = {"base": record_digest(bundle / "base"), "adapter": record_digest(bundle / "first")}
    known = {"target": "gguf", "adapter": "first", "of": of, "model": "tiny", "license": None}
    known |= {"grids": {}, "base_fingerprint": "0" * 64, "text": "generated"}
    known |= {"limits": {"perplexity_difference": 0.01}}
    proof = bundle / "proof" / "first"
    proof.mkdir(parents=True)
    write_proof(proof, make_reference(logits_of(adapted), Sequences(ids, ids.clone())), known)


def seal(bundle: Path) -> None:
    """Let every record list the files that are there now, as an attacker would."""
    for proof in (bundle / "proof").iterdir():
        try:
            record = json.loads((proof / PROOF_RECORD).read_text())
            holds_both = "files" in record["of"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # it is what was damaged
        parts = {"base": bundle / "base", "adapter": bundle / proof.name}
        if holds_both:
            alone = (bundle / proof.name / RECORD).exists()
            parts = {"files": bundle / proof.name if alone else bundle}
        record["of"] = {part: _sealed(folder, bundle) for part, folder in parts.items()}
        record.pop("files", None)
        manifest.write(proof, PROOF_RECORD, record, [REFERENCE])


def _sealed(folder: Path, bundle: Path) -> str:
    """The digest of a record, after the folder's files were listed in it again."""
    try:
        record = json.loads((folder / RECORD).read_text())
        record.pop("files", None)
        if "base" in record:  # what changes with an adapter is for one base
            record["base"] = _digest(bundle / "base" / RECORD)
        names = [n for n in files_in(folder) if _is_listed(n, folder == bundle)]
        manifest.write(folder, RECORD, record, [n for n in names if (folder / n).is_file()])
        return _digest(folder / RECORD)
    except (OSError, ValueError, AttributeError):  # the record itself was damaged
        return _digest(folder / RECORD)


def _is_listed(name: str, is_bundle: bool) -> bool:
    return name not in ("README.md", "stage.json", RECORD) and not (
        is_bundle and name.startswith(("proof/", "."))
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "0" * 64


def change(file: Path, how: str, marker: Path, generator: random.Random) -> str:
    """Change one file; returns what was done, empty if it is not possible."""
    content = file.read_bytes()
    if how in ("one bit", "other bytes", "a program") and not content:
        return ""
    match how:
        case "one bit":
            return damage(file, "flip 0", generator)
        case "other bytes":
            file.write_bytes(generator.randbytes(min(len(content), 2**20)))
        case "a program":
            file.write_bytes(_program(file, content, marker))
        case "a folder":
            file.unlink()
            file.mkdir()
            (file / "data").write_bytes(content)
        case "a link":
            elsewhere = marker.with_name("elsewhere")
            elsewhere.write_bytes(content)
            file.unlink()
            file.symlink_to(elsewhere)
        case "a pipe":
            file.unlink()
            os.mkfifo(file)
        case "removed":
            return damage(file, "delete", generator)
    return how


def _program(file: Path, content: bytes, marker: Path) -> bytes:
    """What runs when a careless library reads the file."""
    code, library = file.with_name("evil.py"), file.with_name("evil.so")
    if file.suffix in (".jinja", ".txt", ".xml", ".md"):
        calls = "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
        return calls.encode()
    if file.suffix != ".json":
        return pickle.dumps(Evil(marker))
    code.write_text(CODE.format(marker=str(marker)))
    library.write_bytes(LIBRARY)
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    keys = {"auto_map": names, "custom_ops_library": str(library), "model_file": str(code)}
    keys["_attn_implementation"] = keys["attn_implementation"] = "somebody/kernel"
    keys |= {"session_options": {"custom_ops_library": str(library)}}
    try:
        found = json.loads(content)
    except ValueError:
        return content
    return json.dumps({**found, **keys} if isinstance(found, dict) else keys).encode()


def add(folder: Path, name: str, marker: Path) -> str:
    """Add a file that no export writes."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if name == "a link":
        (folder / "linked.bin").symlink_to("/etc/hostname")
    elif name == "a pipe":
        os.mkfifo(folder / "pipe.bin")
    else:
        is_code = file.suffix == ".py"
        file.write_bytes(CODE.format(marker=str(marker)).encode() if is_code else LIBRARY)
    return f"added {name}"


def _kind(name: str, adapters: set[str]) -> str:
    """The path without adapters' names and numbers."""
    parts = [
        "NAME" if re.split(r"[.+]", part)[0] in adapters else part for part in Path(name).parts
    ]
    return re.sub(r"\d+", "N", "/".join(parts))


def _problem(ended: Ended, marker: Path, *, may_pass: bool) -> str:
    if not ended.code and not marker.exists():
        return "" if may_pass else f"passed: {ended.out.strip()[-200:]}"
    said = replace(ended, code=2) if ended.code == 1 else ended  # 1: refused by the proof
    return said.problem(marker, SECONDS)


def test_changed_bundles_are_refused_before_they_are_run(
    bundles: dict[str, Path], seed: int, record: Record, tmp_path: Path
) -> None:
    trials: list[tuple[str, str, str, str]] = []
    for target, bundle in bundles.items():
        adapters = {path.name for path in (bundle / "proof").iterdir()}
        names = sorted(p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file())
        one_of = {_kind(name, adapters): name for name in reversed(names)}
        once = next(kind for kind in one_of if not kind.startswith("proof"))
        trials += [
            (target, kind, name, how)
            for kind, name in one_of.items()
            for how in HOWS
            if kind == once or how not in ONCE
        ]
        folders = {Path(name).parts[0] for name in names if "/" in name} - {"proof", "golden"}
        trials += [
            (target, f"{_kind(folder, adapters)}/", folder, f"add {name}")
            for folder in sorted(folders)
            for name in ADDED
        ]

    def attack(trial: tuple[str, str, str, str], folder: Path) -> list[tuple[str, str, str]]:
        target, kind, name, how = trial
        generator = seeds(seed, "bundle", target, kind, how)
        work, marker = folder / "trial", folder / "trial" / "marker"
        shutil.rmtree(work, ignore_errors=True)
        bundle = fresh(bundles[target], work / target)
        if how.startswith("add "):
            done = add(bundle / name, how.removeprefix("add "), marker)
        else:
            done = change(bundle / name, how, marker, generator)
        if how not in ("a link", "a pipe"):  # their digests are those of what they point to
            seal(bundle)
        ended = qwlora("verify", bundle, logs=folder / "logs")
        may_pass = not done or how == "one bit" or bool(_reasons(kind, how))
        problem = _problem(ended, marker, may_pass=may_pass)
        return [(target, problem, f"seed {seed}: {target}: {name}: {done}")]

    for target, kind, _, how in trials:
        for why in _reasons(kind, how):
            record.add_harmless("bundles", kind, target, why)
    record.attack("bundles", trials, attack, tmp_path)


def _reasons(kind: str, how: str) -> list[str]:
    """Why this change may pass; a bit may also be one of a number that changes too little."""
    reasons = {**HARMLESS, **DISPENSABLE} if how == "removed" else HARMLESS
    is_regular = how in ("one bit", "other bytes", "a program", "removed")
    return [why for pattern, why in reasons.items() if is_regular and re.search(pattern, kind)]


def test_untouched_bundles_pass(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Else the attacks above would prove nothing; sealing alone changes nothing."""

    def verify(target: str, folder: Path) -> dict[str, Any]:
        bundle = Path(shutil.copytree(bundles[target], folder / target))
        seal(bundle)
        ended = qwlora("verify", bundle, logs=folder / "logs")
        return {"problem": f"{target}: {ended.err}" if ended.code else ""}

    results = parallel(verify, list(bundles), tmp_path)
    assert not [r for r in results if r.get("error") or r["problem"]]
