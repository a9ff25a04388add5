"""The process that runs ExecuTorch's programs, with a library that does what a test wants."""

import gc
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwlora.errors import ExportError
from qwlora.targets.weights import executorch_program
from qwlora.targets.weights.executorch import ExecutorchRuntime
from qwlora.targets.weights.executorch_program import ADAPTER, MODEL, NO_ADAPTER

# Logits are ids times the adapter's factor plus the number of past tokens. Id 9 ends the process by
# the signal in the program, id 8 raises, id 7 sleeps.
LIBRARY = """
import os, time, torch
from types import SimpleNamespace as Of
SIZES = [(1, 4), (1, 12), (1, 4), (1, 1, 8, 2)]
class Method:
    def __init__(self, number):
        self.number = number
        inputs = [Of(sizes=lambda s=s: s) for s in SIZES]
        self.metadata = Of(num_inputs=lambda: 5, input_tensor_meta=lambda i: inputs[i])
    def execute(self, inputs):
        ids, mask, positions, cache, factor = inputs
        if 9 in ids: os.kill(os.getpid(), self.number)
        if 8 in ids: raise RuntimeError("error 0x12")
        if 7 in ids: time.sleep(60)
        longer = torch.cat([cache, torch.zeros(1, 1, ids.shape[1], 2)], 2)
        assert mask.shape[1] == longer.shape[2] and positions[0, 0] == cache.shape[2]
        return ids.float()[..., None] * factor + cache.shape[2], longer
class Runtime:
    @staticmethod
    def get(): return Runtime()
    def load_program(self, file):
        return Of(load_method=lambda name: Method(int(open(file).read())))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "library" / "executorch").mkdir(parents=True)
    (tmp_path / "library" / "executorch" / "runtime.py").write_text(LIBRARY)
    (tmp_path / "library" / "executorch" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "library")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit('a module of the current folder ran')")
    (tmp_path / MODEL).write_text(str(int(signal.SIGSEGV)))
    save_file({"m.lora_A": torch.ones(1)}, tmp_path / NO_ADAPTER)
    (tmp_path / "first").mkdir()
    save_file({"m.lora_A": torch.full((1,), 3.0)}, tmp_path / "first" / ADAPTER)
    return tmp_path


def test_caches_are_kept_by_their_owners(folder: Path) -> None:
    runtime, ids = ExecutorchRuntime(folder), torch.tensor([[1, 2, 3, 4, 5]])
    for adapter, factor in ((None, 1), (folder / "first", 3), (None, 1)):
        runtime.use(adapter)
        logits, cache = runtime.extend(ids, {})
        past = torch.tensor([0.0, 0, 0, 0, 4])  # calls of at most 4 tokens
        assert torch.equal(logits[0, :, 0], ids[0] * factor + past)
        for _ in range(2):  # the same cache twice
            again = runtime.extend(ids[:, :1], cache)[0]
            assert again.item() == factor + 5
        del cache
    gc.collect()
    assert {*runtime._dropped} == {7, 9}  # earlier ones were dropped there by now
    assert runtime.process_bytes > 2**20
    with pytest.raises(ExportError, match="holds 8 past tokens"):
        runtime.extend(torch.ones(1, 13, dtype=torch.int64), {})
    with pytest.raises(ExportError, match=r"cannot run the program.*0x12"):
        runtime.logits(torch.tensor([[8]]))
    assert runtime.logits(ids[:, :1]).item() == 1  # it goes on
    number = runtime._process.pid
    del runtime
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_crash_is_an_error_that_names_the_file(number: int, folder: Path) -> None:
    (folder / MODEL).write_text(str(int(number)))
    runtime = ExecutorchRuntime(folder)
    for ids in ([[9]], [[1]]):  # and later calls
        with pytest.raises(ExportError, match=rf"{MODEL}'.*exit code -{int(number)};"):
            runtime.logits(torch.tensor(ids))


def test_an_interrupted_call_does_not_answer_the_next_one(folder: Path) -> None:
    runtime, before = ExecutorchRuntime(folder), signal.getsignal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            runtime.logits(torch.tensor([[7]]))
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ExportError, match=rf"{MODEL}'.*exit code -9"):
        runtime.logits(torch.tensor([[1]]))


def test_what_hangs_or_is_no_program_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = ExecutorchRuntime(folder)
    monkeypatch.setattr(executorch_program, "_SECONDS", 0.2)
    with pytest.raises(ExportError, match=rf"{MODEL}'.*exit code -9"):
        runtime.logits(torch.tensor([[7]]))
    monkeypatch.undo()
    monkeypatch.syspath_prepend(folder / "library")
    (folder / MODEL).write_text("no program")
    with pytest.raises(ExportError, match=rf"cannot load.*{MODEL}"):
        ExecutorchRuntime(folder)
