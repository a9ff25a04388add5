"""An object in a process of its own: what comes back, and how its end is told."""

import gc
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwlora.errors import ExportError, SourceError
from qwlora.system import isolated
from qwlora.system.isolated import Isolated

KIND = f"{__name__}:Doubled"


class Doubled:
    """What runs in the other process."""

    def __init__(self, file: Path):
        self.factor = int(file.read_text())

    def run(self, tensors: dict[str, Tensor], more: int) -> tuple[dict[str, Any], Any]:
        return {"pid": os.getpid()}, {n: t * self.factor + more for n, t in tensors.items()}

    def fail(self, tensors: dict[str, Tensor]) -> Any:
        raise SourceError("too much")

    def die(self, tensors: dict[str, Tensor], number: int) -> Any:
        print("last words", flush=True)
        os.kill(os.getpid(), number)

    def sleep(self, tensors: dict[str, Tensor]) -> Any:
        time.sleep(60)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "factor").write_text("2")
    return tmp_path / "factor"


def test_tensors_and_values_come_back_from_another_process(file: Path) -> None:
    made = Isolated(KIND, file)
    sent = {"a": torch.arange(3), "b": torch.zeros(2, 0)}
    for more in (1, 5):
        values, tensors = made.call("run", sent, more=more)
        assert torch.equal(tensors["a"], torch.arange(3) * 2 + more)
        assert tensors["b"].shape == (2, 0)
    assert values["pid"] != os.getpid()
    assert made.peak_bytes > 2**20
    with pytest.raises(ExportError, match="too much"):
        made.call("fail", {})
    assert made.call("run", sent, more=0)[0] == values  # it goes on after an error
    del made
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(values["pid"], 0)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_the_end_of_the_process_is_an_error_with_the_file(number: int, file: Path) -> None:
    made = Isolated(KIND, file)
    with pytest.raises(ExportError, match=rf"factor.*signal {int(number)} .*last words"):
        made.call("die", {}, number=int(number))
    with pytest.raises(ExportError, match=r"factor.*signal"):
        made.call("run", {}, more=0)


def test_what_cannot_be_opened_or_takes_too_long_is_an_error(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Isolated(KIND, file)
    monkeypatch.setattr(isolated, "_SECONDS", 0.2)
    with pytest.raises(ExportError, match=r"factor.*SIGKILL"):
        made.call("sleep", {})
    monkeypatch.undo()
    file.write_text("two")
    with pytest.raises(ExportError, match="two"):
        Isolated(KIND, file)
