"""llama-server runs exported files, and `verify_server` finds each of 200 faults.

`make test-servers` builds the program. It rounds activations to 8 bits, which is no fault.
"""

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import qwlora
from conftest import byte_tokenizer, tiny_model
from qwlora.adapter.adapter_folder import save_adapter
from qwlora.analysis.generate_text import sample_sequences
from qwlora.analysis.token_scores import logits_of
from qwlora.system.parameter_names import BASE
from qwlora.targets.canonical_adapter import read_canonical
from qwlora.targets.proof.canary import contexts_of, make_canary, write_canary
from qwlora.targets.proof.folder import write_record
from qwlora.targets.proof.server_check import ANOTHER, AS_EXPECTED, OTHER_NUMBERS
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedBase

pytestmark = pytest.mark.server
NAMES = BASE, "first", "second"
JOBS = 25  # with eight faults each


def write_job(folder: Path, seed: int) -> Path:
    """A tiny base and two adapters for target gguf, with their canaries."""
    backend, tokenizer, model = TARGETS["gguf"].backend, byte_tokenizer(), tiny_model("llama", seed)
    texts = sample_sequences(model, tokenizer, 16, 24, seed=seed).tolist()
    contexts = contexts_of(texts, [], tokenizer)
    qwlora.quantize_(model, "w4-block32", "search")
    base_fingerprint = qwlora.fingerprint(model)
    for name in NAMES:
        (folder / name).mkdir(parents=True)
    backend.write_base(ExportedBase(model, tokenizer), folder / BASE)
    answering = {BASE: logits_of(model)}
    for name in NAMES:
        if name != BASE:
            torch.manual_seed(10 * seed + NAMES.index(name))
            config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
            adapted: Any = get_peft_model(model, config).eval()
            save_adapter(adapted, folder / "trained" / name)
            canonical = read_canonical(folder / "trained" / name)
            backend.write_adapter(canonical, folder / BASE, folder / name)
            answering = {name: logits_of(adapted)}
        canary = make_canary(answering[name], contexts, tokenizer)
        write_canary(folder / name, canary, base_fingerprint)
        write_record(folder / name, "gguf", base_fingerprint)
        if name != BASE:
            model = adapted.unload()
    return folder


@contextmanager
def llama_server(base: Path, *adapters: Path) -> Iterator[str]:
    """The address of a llama-server that has loaded these files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ["LLAMA_SERVER"], "--model", str(base / "base.gguf"), "--port", str(port)]
    for adapter in adapters:
        command += ["--lora", str(adapter / "adapter.gguf")]
    command += ["--ctx-size", "512", "--parallel", "1", "--threads", "2", "--no-warmup"]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as process:
        try:
            yield _when_ready(f"http://127.0.0.1:{port}", process)
        finally:
            process.kill()


def _when_ready(url: str, process: "subprocess.Popen[bytes]") -> str:
    for _ in range(600):
        assert process.poll() is None, "the server stopped"
        try:
            with urllib.request.urlopen(f"{url}/health"):
                return url
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server does not start")


def set_scales(url: str, *scales: float) -> None:
    """For requests that do not choose themselves."""
    body = json.dumps([{"id": number, "scale": scale} for number, scale in enumerate(scales)])
    request = urllib.request.Request(
        f"{url}/lora-adapters", body.encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request):
        pass


def verdicts(folder: Path, url: str, models: Mapping[str, str] | None) -> dict[str, Any]:
    """The verdict on each model and whose answers it gives, checked in less than 10 s."""
    began = time.monotonic()
    rows = qwlora.verify_server(folder, url, models)
    assert time.monotonic() - began < 10
    assert sum(row["requests"] for row in rows) <= 48
    return {row["expected"] or "as it is": (row["verdict"], row["answers_as"]) for row in rows}


def wrong(folder: Path, url: str, other: str) -> Iterator[tuple[str, tuple[str, Any], Any]]:
    """What is wrong, the verdict that is expected and the one found; `other` has another base."""
    for number, name in enumerate(NAMES[1:]):
        second = NAMES[2 - number]
        found = verdicts(folder, url, {name: "lora:none"})
        yield "not loaded", (ANOTHER, BASE), found[name]
        found = verdicts(folder, url, {name: f"lora:{1 - number}"})
        yield "swapped", (ANOTHER, second), found[name]
        set_scales(url, *(0.5 * (n == number) for n in range(2)))
        found = verdicts(folder, url, {name: ""})
        yield "half of alpha", (OTHER_NUMBERS, None), found[name]
        found = verdicts(folder, other, {name: f"lora:{number}"})
        yield "another base", (OTHER_NUMBERS, None), found[name]


@pytest.mark.parametrize("seed", range(JOBS))
def test_no_fault_is_missed_and_no_right_answer_is_called_a_fault(
    seed: int, tmp_path: Path
) -> None:
    job, stranger = (write_job(tmp_path / str(n), n) for n in (seed, seed + 1000))
    adapters = [job / name for name in NAMES[1:]]
    with (
        llama_server(job / BASE, *adapters) as url,
        llama_server(stranger / BASE, *adapters) as other,
    ):
        set_scales(url, 0, 0)
        right = {name: (AS_EXPECTED, name) for name in NAMES}
        assert verdicts(job, url, None) == right | {"as it is": (AS_EXPECTED, BASE)}
        found = [(fault, expected, seen) for fault, expected, seen in wrong(job, url, other)]
    assert [row for row in found if row[1] != row[2]] == []
    assert len(found) == 8
