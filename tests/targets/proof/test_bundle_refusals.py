"""What `qwlora verify BUNDLE` decides, with a runtime that computes what a test wants."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import flip_bit, reseal
from qwlora.data.sequences import IGNORED, Sequences
from qwlora.errors import FingerprintError, QwloraError, QwloraWarning, SourceError
from qwlora.targets.proof.folder import (
    checked_proofs,
    current_proofs,
    is_bundle,
    is_of_base,
    record_digest,
    write_proof,
    write_record,
)
from qwlora.targets.proof.prove import verify_bundle
from qwlora.targets.proof.reference import logits_of, make_reference
from qwlora.targets.registry import TARGETS
from targets.damage import edit_json, swap
from targets.proof.toy_runtime import TableRuntime, Trained

WORDS, TOKENS = 40, 24
GENERATOR = torch.Generator().manual_seed(3)
IDS = torch.randint(0, WORDS, (2, TOKENS), generator=GENERATOR)
LABELS = IDS.clone()
LABELS[:, :6] = IGNORED
TEXT = Sequences(IDS, LABELS)
# logits of the next token, by the last one
BASE, ADAPTED = (3 * torch.randn(WORDS, WORDS, generator=GENERATOR) for _ in range(2))
FILES = {
    "base": {"config.json": '{"model_type": "llama"}', "model.safetensors": "weights"},
    "first": {"adapter_config.json": '{"peft_type": "LORA"}', "adapter_model.safetensors": "A, B"},
}
FILES["second"] = {name: f"{content} " for name, content in FILES["first"].items()}
LIMIT = 0.003


class Runtime(TableRuntime):
    """Unless it `forgets`, an adapter changes what the base computes afterwards; `wrong` of the tokens
    that it decodes are not the likeliest. `decoded`: tokens before and of each call of `decode`."""

    def __init__(
        self, base: Tensor = BASE, adapted: Tensor = ADAPTED, forgets: bool = True, wrong: int = 0
    ):
        super().__init__({"": base, "first": adapted, "second": adapted})
        self.forgets, self.wrong = forgets, wrong
        self.decoded: list[tuple[int, int]] = []

    def switch_to(self, adapter: Path | None) -> None:
        if self.state and adapter is None and not self.forgets:
            self.tables[""] = self.tables[""] + 1e-6
        super().switch_to(adapter)

    def decode(self, ids: Tensor, count: int) -> list[int]:
        self.decoded.append((ids.shape[1], count))
        return super().decode(ids, count)

    def chosen(self, row: Tensor, number: int) -> int:
        return int(row.argmax() if number >= self.wrong else row.argmin())


def write(bundle: Path, name: str, content: str) -> None:
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_text(content)


def prove(
    bundle: Path, name: str, reference: dict[str, Tensor] | None = None, **changes: Any
) -> None:
    """Write the proof of an adapter that is there."""
    of = {"base": record_digest(bundle / "base"), "adapter": record_digest(bundle / name)}
    record = {"target": "hf", "adapter": name, "of": of, "text": "generated"}
    record["limits"] = {"perplexity_difference": LIMIT}
    (bundle / "proof" / name).mkdir(parents=True, exist_ok=True)
    ships = None if changes == {"text": "none"} else reference or says(TEXT)
    write_proof(bundle / "proof" / name, ships, {**record, **changes})


def says(text: Sequences, other: Tensor | None = None) -> dict[str, Tensor]:
    """The trained model's reference; `other`: what an equally valid computation gives."""
    model: Any = Trained(BASE, ADAPTED)
    rounded = None
    if other is not None:
        rounded = {"base": lambda ids: BASE[ids], "adapter": lambda ids: other[ids]}
    return make_reference(logits_of(model), text, rounded=rounded)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bundle"
    for part, files in FILES.items():
        for name, content in files.items():
            write(folder, f"{part}/{name}", content)
        write_record(folder / part, "hf", "0" * 64)
    for name in ("first", "second"):
        prove(folder, name)
    open_runtime = lambda self, base, case: Runtime()  # noqa: E731
    monkeypatch.setattr(type(TARGETS["hf"].backend), "open", open_runtime)
    return folder


@pytest.fixture
def proven(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    def prove_by(runtime: Any) -> Any:
        monkeypatch.setattr(type(TARGETS["hf"].backend), "open", lambda self, base, case: runtime)
        return verify_bundle(bundle)["first"]

    return prove_by


def test_an_untouched_bundle_passes(bundle: Path) -> None:
    found = verify_bundle(bundle)
    assert found.keys() == {"first", "second"}
    for proof in found.values():
        assert (proof["passed"], proof["problems"]) == (True, [])
        exact = proof["figures"]["exact"]
        assert exact["off_is_equal"]
        assert exact["decode_agreement"] == 1
        for state in ("base", "adapter"):
            assert exact[state]["max_log_prob_difference"] < 1e-5
            # that predict a token of the loss, or count themselves
            assert exact[state]["tokens"] == 38


LISTED = [f"{part}/{name}" for part, files in FILES.items() for name in files]
PROOFS = [f"proof/{name}/proof.json" for name in ("first", "second")]
PROOFS += [f"proof/{name}/reference.safetensors" for name in ("first", "second")]
RECORDS = [f"{part}/qwlora.json" for part in FILES]


@pytest.mark.parametrize("name", [*LISTED, *RECORDS, *PROOFS])
@pytest.mark.parametrize("how", ["changed", "removed"])
def test_a_file_that_is_not_the_proven_one_is_refused(name: str, how: str, bundle: Path) -> None:
    file = bundle / name
    edits = {"qwlora.json": ("0" * 64, "1" * 64), "proof.json": (str(LIMIT), "0.5")}
    if how == "removed":
        file.unlink()
    elif file.name in edits:
        file.write_text(file.read_text().replace(*edits[file.name]))
    else:
        flip_bit(file, -1)
    with pytest.raises((FingerprintError, SourceError), match=Path(name).parent.name):
        verify_bundle(bundle)


ADDED = ["notes.txt", "third/adapter_config.json", "first/notes.txt", "second/.hidden"]
ADDED += ["base/notes.txt", "base/.hidden", "base/deep/notes.txt", "proof/second/.hidden"]
ADDED += [f"proof/{name}" for name in ("notes.txt", "third/notes.txt", "first/notes.txt")]


@pytest.mark.parametrize("name", ADDED)
def test_a_file_that_was_not_exported_is_refused(name: str, bundle: Path) -> None:
    write(bundle, name, "mine")
    shown = "third" if "third" in name else re.escape(Path(name).name)
    with pytest.raises(QwloraError, match=shown):
        verify_bundle(bundle)
    (bundle / name).unlink()
    (bundle / name).symlink_to(bundle / "base" / "config.json")
    with pytest.raises(SourceError, match="is a link"):  # before anything is read
        verify_bundle(bundle)


@pytest.mark.parametrize("name", ["README.md", ".gitattributes", ".cache/x", "base/README.md"])
def test_a_readme_and_hidden_files_of_the_bundle_may_be_there(name: str, bundle: Path) -> None:
    write(bundle, name, "mine")
    assert verify_bundle(bundle)["first"]["passed"]


@pytest.mark.parametrize("part", ["base", "first"])
@pytest.mark.parametrize("is_proven", [False, True])
def test_sealed_files_of_another_bundle_are_refused(
    part: str, is_proven: bool, bundle: Path
) -> None:
    """A key that no export writes also if somebody makes a bundle of his own."""
    name = next(iter(FILES[part]))
    edit_json(name, lambda record: record.update(auto_map="evil"))(bundle / part)
    reseal(bundle / part, "qwlora.json")
    for adapter in ("first", "second") if is_proven else ():
        prove(bundle, adapter)
    error, said = (
        (SourceError, "auto_map")
        if is_proven
        else (FingerprintError, f"{part}.* differs from the one")
    )
    with pytest.raises(error, match=said):
        verify_bundle(bundle)


def test_adapters_that_were_swapped_with_their_proofs_are_refused(bundle: Path) -> None:
    for folder in (bundle, bundle / "proof"):
        swap("first", "second")(folder)
    with pytest.raises(FingerprintError, match=r"proof/first.*'second'"):
        verify_bundle(bundle)


OWN_LIMIT = r"limits\.perplexity_difference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "none"}, "'none'"),
        ({"target": None}, "target"),
        ({"target": ["hf"]}, "target"),
        ({"format": 2}, "format 2"),
        ({"format": None}, "format None"),
        ({"limits": None}, "limits"),
        ({"limits": {}}, OWN_LIMIT),
        ({"limits": [LIMIT]}, OWN_LIMIT),
        ({"limits": {"perplexity_difference": "0.003"}}, OWN_LIMIT),
        ({"limits": {"perplexity_difference": 0}}, f"{OWN_LIMIT} 0,"),
        ({"limits": {"perplexity_difference": 1.001}}, f"{OWN_LIMIT} 1.001,"),
        ({"text": None}, "text None, not generated"),
        ({"text": "none", "notes": []}, "no digests of itself"),  # but it has a reference
        ({"of": None}, " of"),
        ({"of": {}}, "differs from the one proven"),
        ({"of": {"base": "0", "adapter": "0"}}, "base.* differs from the one proven"),
    ],
)
def test_other_proofs_are_refused(change: dict[str, Any], message: str, bundle: Path) -> None:
    prove(bundle, "second", **change)
    with pytest.raises((FingerprintError, SourceError), match=message) as raised:
        verify_bundle(bundle)
    assert "bundle" in str(raised.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_a_proof_that_is_no_record_is_refused(content: str, bundle: Path) -> None:
    write(bundle, "proof/second/proof.json", content)
    with pytest.raises(SourceError, match=r"proof/second/proof\.json"):
        verify_bundle(bundle)


def test_a_bundle_that_ships_no_text_says_so(bundle: Path) -> None:
    shutil.rmtree(bundle / "proof/second")
    prove(bundle, "second", text="none")
    with pytest.raises(SourceError, match=r"second has no text.*export.proof: none"):
        verify_bundle(bundle)
    write(bundle, "second/adapter_config.json", "{}")
    with pytest.raises(FingerprintError, match="second"):
        verify_bundle(bundle)


def test_a_bundle_without_proofs_is_refused(bundle: Path) -> None:
    shutil.rmtree(bundle / "proof" / "second")
    with pytest.raises(FingerprintError, match="without a proof: second"):
        verify_bundle(bundle)
    shutil.rmtree(bundle / "proof")
    (bundle / "proof").mkdir()
    with pytest.raises(SourceError, match=r"no proof/NAME/proof\.json"):
        verify_bundle(bundle)


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    """A bundle of use cases, all in one folder."""
    folder = tmp_path / "qairt"
    for name in ("model.data", "README.md", "golden/logits.npy"):
        write(folder, name, name)
    write_record(folder, "qairt", None, use_cases=["first", "second"])
    record = {"target": "qairt", "of": {"files": record_digest(folder)}, "text": "held_out"}
    record["limits"] = {"perplexity_difference": LIMIT}
    for case in ("first", "second"):
        proof = folder / "proof" / case
        proof.mkdir(parents=True)
        write_proof(proof, {"ids": torch.zeros(1, 1)}, {**record, "adapter": case})
    return folder


def without_key(key: str) -> Callable[[Path], None]:
    """One bit of the key is enough to lose it."""

    def damage(folder: Path) -> None:
        path = folder / "proof" / "first" / "proof.json"
        before, name, after = path.read_text().rpartition(f'"{key}": ')
        path.write_text(before + name.replace(key[0], chr(ord(key[0]) ^ 1), 1) + after)

    return damage


def adding(name: str) -> Callable[[Path], None]:
    return lambda folder: write(folder, name, "changed")


OF_CASES: list[tuple[Callable[[Path], None], str]] = [
    *((adding(name), name) for name in ("model.data", "golden/logits.npy", "notes.txt")),
    *((adding(f"{name}/x"), name) for name in ("third", "proof/third", "proof")),
    (lambda f: shutil.rmtree(f / "proof/second"), "no proof/NAME of use cases second"),
    (lambda f: swap("first", "second")(f / "proof"), "first is the proof of adapter 'second'"),
    (without_key("files"), "first/proof.json"),
    (without_key("proof.json"), "first/proof.json"),
    (without_key("reference.safetensors"), "first/proof.json"),
]


@pytest.mark.parametrize(("damage", "said"), OF_CASES)
def test_use_cases_are_what_was_proven(
    damage: Callable[[Path], None], said: str, cases: Path
) -> None:
    for name in ("README.md", ".gitattributes", ".cache/huggingface/x.lock"):
        write(cases, name, "these are allowed")
    checked_proofs(cases)
    damage(cases)
    with pytest.raises((FingerprintError, SourceError), match=re.escape(said)):
        checked_proofs(cases)


WRONG: dict[str, tuple[Callable[[], Runtime], str]] = {
    "another base": (lambda: Runtime(base=ADAPTED), "likeliest token without"),
    "another adapter": (lambda: Runtime(adapted=BASE), "likeliest token with the adapter"),
    "no switching off": (lambda: Runtime(forgets=False), "switched off"),
    "wrong decoding": (lambda: Runtime(wrong=TOKENS), "decoded one by one"),
    "a wrong scale": (lambda: Runtime(1.01 * BASE, 1.01 * ADAPTED), "perplexity"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_runtime_that_computes_something_else_fails(what: str, proven: Any) -> None:
    make, words = WRONG[what]
    proof = proven(make())
    assert not proof["passed"]
    assert any(words in problem for problem in proof["problems"]), proof["problems"]


def test_settings_as_shipped_that_do_not_switch_off_fail(proven: Any) -> None:
    runtime: Any = Runtime()
    runtime.shipped = Runtime(1.01 * BASE, 1.01 * ADAPTED)
    assert proven(runtime)["passed"]  # only reported
    runtime.shipped = Runtime(forgets=False)
    proof = proven(runtime)
    assert not proof["passed"]
    assert any("shipped" in problem for problem in proof["problems"])


@pytest.mark.parametrize(("tokens", "prompt"), [(TOKENS, TOKENS - 16), (17, 1), (10, 1)])
def test_where_decoding_begins(tokens: int, prompt: int, bundle: Path, proven: Any) -> None:
    text, runtime = Sequences(IDS[:, :tokens], LABELS[:, :tokens]), Runtime()
    for name in ("first", "second"):
        prove(bundle, name, says(text))
    assert proven(runtime)["passed"]
    assert runtime.decoded[0] == (prompt, 16)


def test_a_runtime_that_cannot_switch_is_compared_with_the_adapter_alone(proven: Any) -> None:
    runtime = Runtime(base=ADAPTED)
    runtime.switches = False
    proof = proven(runtime)
    assert proof["passed"]
    assert proof["figures"]["exact"].keys() == {"adapter"}
    opened_with_one = Runtime()
    opened_with_one.state = "first"  # is switched off first
    assert proven(opened_with_one)["passed"]


def test_decoding_may_differ_as_often_as_two_valid_computations(bundle: Path, proven: Any) -> None:
    runtime = Runtime(wrong=2)  # of 16
    assert not proven(runtime)["passed"]
    other = ADAPTED.clone()
    for word in IDS.flatten()[::8].unique():  # here the likeliest word of the other is another
        other[word, ADAPTED[word].argmax()] -= 5
    prove(bundle, "first", says(TEXT, other))
    proof = proven(runtime)
    assert proof["passed"], proof["problems"]


def test_a_proof_says_if_the_base_alone_would_pass(bundle: Path, proven: Any) -> None:
    assert verify_bundle(bundle)["first"]["notes"] == []
    same = {n: t for n, t in says(TEXT).items() if not n.startswith("adapter.")}
    same |= {n.replace("base.", "adapter."): t.clone() for n, t in same.items() if "base" in n}
    prove(bundle, "first", same)
    (note,) = proven(Runtime(adapted=BASE))["notes"]
    assert "cannot tell the adapter from the base" in note


def test_what_a_bundle_is(bundle: Path) -> None:
    assert is_bundle(bundle)
    assert not is_bundle(bundle / "base")
    shutil.rmtree(bundle / "base")
    assert is_bundle(bundle)  # one of graphs or use cases has none
    shutil.rmtree(bundle / "proof")
    assert not is_bundle(bundle)
    (bundle / "proof").mkdir()
    assert not is_bundle(bundle)


def test_proofs_of_the_files_that_are_there_are_current(bundle: Path) -> None:
    assert current_proofs(bundle).keys() == {"first", "second"}
    shutil.rmtree(bundle / "second")
    assert current_proofs(bundle).keys() == {"first"}
    write(bundle, "first/adapter_config.json", '{"peft_type": "LORA", "r": 2}')
    reseal(bundle / "first", "qwlora.json")
    assert not current_proofs(bundle)
    prove(bundle, "first")
    assert current_proofs(bundle).keys() == {"first"}
    prove(bundle, "first", target="none")
    assert not current_proofs(bundle)


@pytest.mark.parametrize("how", ["edited", "no digests", "no record"])
def test_a_proof_that_was_edited_is_left_out_with_a_warning(how: str, bundle: Path) -> None:
    path = bundle / "proof" / "first" / "proof.json"
    record = json.loads(path.read_text()) | {"adapter": "other"}
    if how == "no digests":
        del record["files"]
    path.write_text("[]" if how == "no record" else json.dumps(record))
    with pytest.warns(QwloraWarning, match="leaves out adapter first"):
        assert current_proofs(bundle).keys() == {"second"}


def test_an_adapter_is_of_the_base_that_is_there(bundle: Path) -> None:
    assert is_of_base(bundle, "first")
    assert not is_of_base(bundle, "third")
    (bundle / "first" / "adapter_model.safetensors").write_text("C, D")
    assert not is_of_base(bundle, "first")
    assert is_of_base(bundle, "second")
    for content in ("[]", "{", '{"base_fingerprint": "1"}'):
        (bundle / "base" / "qwlora.json").write_text(content)
        assert not is_of_base(bundle, "second")


def test_a_bundle_chooses_no_limit_but_that_of_the_perplexity(bundle: Path) -> None:
    prove(bundle, "second", limits={"perplexity_difference": 1, "speed": 3.0, "sqnr": -1e9})
    assert verify_bundle(bundle)["second"]["passed"]
