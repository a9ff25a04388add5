"""Every fault of a server is found, and rounding is none."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwlora.errors import FingerprintError, SourceError
from qwlora.system.parameter_names import BASE
from qwlora.targets.proof.canary import TOP, Answer, Canary, Context, write_canary
from qwlora.targets.proof.folder import write_record
from qwlora.targets.proof.server_check import (
    ANOTHER,
    AS_EXPECTED,
    MISSING,
    OTHER_NUMBERS,
    UNCLEAR,
    verify_server,
)
from targets.proof.toy_server import _piece, http_server, serving

VOCABULARY, CONTEXTS = 40, [tuple(range(number, number + 6)) for number in range(60)]
NAMES = BASE, "first", "second"
Logits = dict[tuple[int, ...], np.ndarray]


def _top(logits: np.ndarray, count: int = TOP) -> Answer:
    scores = logits - np.logaddexp.reduce(logits)
    return {int(t): round(float(scores[t]), 5) for t in np.argsort(-scores)[:count]}


class Job:
    """Random logits of a base and two adapters, and their canaries in a folder."""

    def __init__(self, folder: Path, seed: int = 0, effect: float = 3.0) -> None:
        self.folder, self.random = folder, np.random.default_rng(seed)
        shape = len(CONTEXTS), VOCABULARY
        base = self.random.normal(scale=3.0, size=shape)
        effects = {name: self.random.normal(scale=effect, size=shape) for name in NAMES[1:]}
        self.logits = {BASE: base} | {name: base + change for name, change in effects.items()}
        contexts = [Context(c, " ".join(map(str, c))) for c in CONTEXTS]
        pieces = {token: _piece(token) for token in range(VOCABULARY)}
        for name, logits in self.logits.items():
            (folder / name).mkdir(parents=True)
            write_canary(folder / name, Canary(contexts, [*map(_top, logits)], pieces), "f" * 64)
            write_record(folder / name, "gguf", "f" * 64)

    def model(self, name: str, strength: float = 1.0, noise: float = 0.03) -> Callable[..., Answer]:
        """A served model, whose logits have rounding noise."""
        logits = self.logits[BASE] + strength * (self.logits[name] - self.logits[BASE])
        logits = logits + self.random.normal(scale=noise, size=logits.shape)
        rows = dict(zip(CONTEXTS, logits, strict=True))
        return lambda ids: _top(rows[ids], 10)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


FORMS = ("vllm", "sglang", "llama-server", "native", "mlx_lm", "greedy")


@pytest.mark.parametrize("form", FORMS)
def test_a_right_server_passes(job: Job, form: str) -> None:
    # Of llama-server's own API, requests name no model.
    named = [name for name in NAMES if form != "native" or name == "first"]
    models = {name if form != "native" else "": job.model(name) for name in named}
    expected = {name: name for name in named} if form != "native" else {"first": ""}
    with serving(form, models) as url:
        rows = verify_server(job.folder, url, expected)
    assert [row["verdict"] for row in rows] == [AS_EXPECTED] * len(named)
    assert [row["answers_as"] for row in rows] == [row["expected"] for row in rows] == named
    assert sum(row["requests"] for row in rows) <= 48
    if form != "greedy":
        assert all(row["difference"] < 0.1 for row in rows)


FAULTS: dict[str, Callable[[Job], tuple[Callable[..., Answer], str, str | None]]] = {
    "the adapter is not loaded": lambda job: (job.model(BASE), ANOTHER, BASE),
    "adapters are swapped": lambda job: (job.model("second"), ANOTHER, "second"),
    "alpha is halved": lambda job: (job.model("first", 0.5), OTHER_NUMBERS, None),
    "another base": lambda job: (job.model("first", noise=0.6), OTHER_NUMBERS, None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_is_missed(tmp_path: Path, fault: str) -> None:
    for seed in range(50):
        job = Job(tmp_path / str(seed), seed)
        model, verdict, answers_as = FAULTS[fault](job)
        with serving("vllm", {"first": model}) as url:
            (row,) = verify_server(job.folder, url, {"first": "first"})
        assert (row["verdict"], row["answers_as"]) == (verdict, answers_as), seed


def test_greedy_tokens_show_an_adapter_that_is_not_active(job: Job) -> None:
    models = {"first": job.model(BASE), "second": job.model("second", 0.5)}
    with serving("greedy", models) as url:
        first, second = verify_server(job.folder, url, {"first": "first", "second": "second"})
    assert (first["verdict"], first["answers_as"]) == (ANOTHER, BASE)
    assert (second["verdict"], second["answers_as"]) == (OTHER_NUMBERS, None)


def test_an_adapter_that_changes_nothing_cannot_be_told_from_the_base(tmp_path: Path) -> None:
    job = Job(tmp_path, effect=0.01)
    with serving("vllm", {"first": job.model("first")}) as url:
        (row,) = verify_server(job.folder, url, {"first": "first"})
    assert row["verdict"] == UNCLEAR
    assert "base" in row["reason"]


def test_models_of_the_list(job: Job) -> None:
    with serving("vllm", {"some/model": job.model(BASE), "lora/first": job.model("first")}) as url:
        rows = verify_server(job.folder, url)
    assert {row["expected"]: row["verdict"] for row in rows} == {
        BASE: AS_EXPECTED,
        "first": AS_EXPECTED,
        "second": MISSING,
    }


def test_a_server_of_one_model_is_whichever_it_answers_as(job: Job) -> None:
    with serving("sglang", {"merged": job.model("second")}) as url:
        served, missing = verify_server(job.folder, url)
    assert (served["verdict"], served["answers_as"]) == (AS_EXPECTED, "second")
    assert (missing["expected"], missing["verdict"]) == ("first", MISSING)


def test_adapters_of_llama_server(job: Job) -> None:
    models = {"": job.model("first"), "lora:none": job.model(BASE)}
    models |= {"lora:0": job.model("first"), "lora:1": job.model("first")}
    adapters = [{"id": 0, "path": "/a/first/adapter.gguf"}, {"id": 1, "path": "second.gguf"}]
    with serving("llama-server", models, adapters) as url:
        rows = verify_server(job.folder, url)
    assert [(row["expected"], row["verdict"], row["answers_as"]) for row in rows] == [
        (None, AS_EXPECTED, "first"),
        (BASE, AS_EXPECTED, BASE),
        ("first", AS_EXPECTED, "first"),
        ("second", ANOTHER, "first"),
    ]


def _drip(wfile: Any) -> None:
    wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(300):
        wfile.write(b" ")
        wfile.flush()
        time.sleep(0.05)


def _logprobs(*values: Any) -> dict[str, Any]:
    tops = {f"token_id:{number}": value for number, value in enumerate(values)}
    return {"choices": [{"text": "x", "logprobs": {"tokens": ["x"], "top_logprobs": [tops]}}]}


BAD: dict[str, tuple[Any, str]] = {
    "drips": (lambda: _drip, "within 2 s"),
    "redirects": (lambda: (302, b"", ("Location", "http://127.0.0.1:1/")), "redirects"),
    "fails": (lambda: (500, b"\x1b[31mboom"), "status 500"),
    "no JSON": (lambda: (200, b"<html>"), "completion"),
    "another object": (lambda: (200, [1, 2]), "completion"),
    "no choices": (lambda: (200, {"choices": []}), "completion"),
    "deep": (lambda: (200, b"[" * 100_000), "completion"),
    "large": (lambda: (200, b" " * 2**21), "bytes"),
    "closes": (lambda: (-1, b""), "does not answer"),
    "no numbers": (lambda: (200, _logprobs("NaN", -1)), "log-probabilities"),
    "positive": (lambda: (200, _logprobs(3.0, -1)), "log-probabilities"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_server(job: Job, kind: str) -> None:
    answer, words = BAD[kind]
    began = time.monotonic()
    with http_server(lambda path, body: (404, b"") if body is None else answer()) as url:
        (row,) = verify_server(job.folder, url, {"first": "x"}, timeout=2)
    assert row["verdict"] == UNCLEAR
    assert words in row["reason"]
    assert "\x1b" not in row["reason"]
    assert time.monotonic() - began < 10


def test_a_redirect_is_not_followed(job: Job) -> None:
    asked = list[str]()

    def other(path: str, body: Any) -> tuple[int, bytes]:
        asked.append(path)
        return 200, b"{}"

    with http_server(other) as elsewhere:
        away = ("Location", f"{elsewhere}/v1/models")
        with (
            http_server(lambda path, body: (307, b"", away)) as url,
            pytest.raises(SourceError, match="redirects"),
        ):
            verify_server(job.folder, url)
    assert not asked


def test_the_environment_gives_the_key_and_no_proxy(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("QWLORA_SERVER_KEY", "secret")
    with serving("vllm", {"first": job.model("first")}, key="secret") as url:
        (row,) = verify_server(job.folder, url, {"first": "first"})
    assert row["verdict"] == AS_EXPECTED


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port", ""])
def test_an_address_that_is_none(job: Job, url: str) -> None:
    with pytest.raises(SourceError, match="address"):
        verify_server(job.folder, url)


def test_nothing_answers(job: Job) -> None:
    with pytest.raises(SourceError, match="does not answer"):
        verify_server(job.folder, "127.0.0.1:9")


def test_names_that_the_folder_lacks(job: Job) -> None:
    with pytest.raises(SourceError, match="first"):
        verify_server(job.folder, "127.0.0.1:9", {"frist": "x"})


def test_folders_without_canaries(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"export\.canary"):
        verify_server(tmp_path, "127.0.0.1:9")


def _changed(job: Job) -> None:
    path = job.folder / "first/canary.json"
    path.write_text(path.read_text().replace("-0.", "-1."))


def _of_another_base(job: Job) -> None:
    other = Job(job.folder / "other", 1)
    canary = json.loads((other.folder / "first/canary.json").read_text())
    canary["base_fingerprint"] = "e" * 64
    (job.folder / "first/canary.json").write_text(json.dumps(canary))
    write_record(job.folder / "first", "gguf", "e" * 64)


@pytest.mark.parametrize("damage", [_changed, _of_another_base])
def test_canaries_that_do_not_belong_together(job: Job, damage: Callable[[Job], None]) -> None:
    damage(job)
    with pytest.raises(FingerprintError, match="first"):
        verify_server(job.folder, "127.0.0.1:9")
