"""Which files may be in a bundle of use cases."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from qwlora.atomic import files_in
from qwlora.errors import FingerprintError
from qwlora.export.bundle import (
    RECORD,
    check_complete,
    check_files,
    proofs,
    record_digest,
    write_proof,
)
from qwlora.formats import manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "qairt"
    (folder / "golden").mkdir(parents=True)
    for name in ("model.data", "README.md", "golden/logits.npy"):
        (folder / name).write_text(name)
    manifest.write(folder, RECORD, {}, files_in(folder))
    proof = folder / "proof" / "first"
    proof.mkdir(parents=True)
    of, limits = {"files": record_digest(folder)}, {"perplexity_difference": 0.003}
    record = {"target": "qairt", "adapter": "first", "of": of, "limits": limits}
    write_proof(proof, {"ids": torch.zeros(1, 1)}, record)
    return folder


def check(bundle: Path) -> None:
    records = proofs(bundle)
    check_complete(bundle, records)
    check_files(bundle, "first", records["first"])


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
