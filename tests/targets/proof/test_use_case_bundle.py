"""Which files may be in a bundle of use cases."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from qwlora.errors import FingerprintError, SourceError
from qwlora.targets.proof.folder import (
    check_complete,
    check_files,
    proofs,
    record_digest,
    write_proof,
    write_record,
)
from targets.damage import swap


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "qairt"
    (folder / "golden").mkdir(parents=True)
    for name in ("model.data", "README.md", "golden/logits.npy"):
        (folder / name).write_text(name)
    write_record(folder, "qairt", None, use_cases=["first", "second"])
    of, limits = {"files": record_digest(folder)}, {"perplexity_difference": 0.003}
    for case in ("first", "second"):
        proof = folder / "proof" / case
        proof.mkdir(parents=True)
        record = {
            "target": "qairt",
            "adapter": case,
            "of": of,
            "limits": limits,
            "text": "held_out",
        }
        write_proof(proof, {"ids": torch.zeros(1, 1)}, record)
    return folder


def check(bundle: Path) -> None:
    records = proofs(bundle)
    check_complete(bundle, records)
    for case, record in records.items():
        check_files(bundle, case, record)


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("changed")


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", ".cache/huggingface/x.lock"])
def test_an_edited_readme_and_hidden_files_are_allowed(name: str, bundle: Path) -> None:
    write(bundle / name)
    check(bundle)


@pytest.mark.parametrize(
    "name", ["model.data", "golden/logits.npy", "notes.txt", "third/x", "proof/third/x", "proof/x"]
)
def test_a_file_without_a_proof_is_refused(name: str, bundle: Path) -> None:
    check(bundle)
    write(bundle / name)
    with pytest.raises(FingerprintError, match=rf"{re.escape(name.removesuffix('/x'))}"):
        check(bundle)


def test_a_use_case_without_its_proof_is_refused(bundle: Path) -> None:
    shutil.rmtree(bundle / "proof" / "second")
    with pytest.raises(FingerprintError, match=r"no proof/NAME of use cases second; .* again"):
        check(bundle)


def test_the_proof_of_another_use_case_is_refused(bundle: Path) -> None:
    swap("first", "second")(bundle / "proof")
    with pytest.raises(FingerprintError, match="proof/first is the proof of adapter 'second'"):
        check(bundle)


@pytest.mark.parametrize("key", ["files", "proof.json", "reference.safetensors"])
def test_a_proof_without_a_digest_is_refused(key: str, bundle: Path) -> None:
    """One bit of the key is enough to lose it."""
    path = bundle / "proof" / "first" / "proof.json"
    before, name, after = path.read_text().rpartition(f'"{key}": ')
    path.write_text(before + name.replace(key[0], chr(ord(key[0]) ^ 1), 1) + after)
    with pytest.raises(SourceError, match=r"first/proof\.json' has no digests of itself"):
        check(bundle)
