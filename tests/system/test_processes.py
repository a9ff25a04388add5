"""Processes that share a job: results are those of one process, and one that fails ends the job."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import UserDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapter.test_recipes import LAUNCHERS, started
from conftest import tiny_model
from qwlora import BitBudget, Schemes, fingerprint, observe_moments, quantize_, simulate
from qwlora.analysis.token_scores import logits_of, score_tokens
from qwlora.errors import CalibrationError
from qwlora.grid.second_moments import MomentStore
from qwlora.system import processes
from qwlora.system.processes import by_first, divided, gathered, is_mine, joint

IDS = torch.randint(0, 250, (5, 12), generator=torch.Generator().manual_seed(0))


def in_processes(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(number)` returns in each of `count` threads that share a stage as processes do."""
    own, barrier, sent = threading.local(), threading.Barrier(count), dict[int, bytes]()

    def collect(name: str, *arguments: Any, **_: Any) -> None:
        parts, value = arguments if name == "all_gather_object" else arguments[::-1]
        sent[own.number] = pickle.dumps(value)
        barrier.wait()
        values = [pickle.loads(sent[number]) for number in range(count)]
        barrier.wait()
        if parts is not None:
            parts[:] = values

    def run(number: int) -> Any:
        own.number = number
        with joint():
            return work(number)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(count) as threads:
        patch.setattr(processes, "_state", type("", (threading.local, UserDict), {})())
        patch.setattr(processes, "process_count", lambda: count)
        patch.setattr(processes, "_rank", lambda: own.number)
        patch.setattr(processes, "_collect", collect)
        return list(threads.map(run, range(count)))


def test_each_item_is_of_one_process_and_values_arrive_in_order() -> None:
    def work(number: int) -> Any:
        own = [item for item in range(8) if is_mine(item)]
        costs = {"k": 1, "up": 6, "down": 12, "v": 1, "gate": 6}
        at_second = gathered(own, receiver=1)
        return own, divided(costs), gathered(number), at_second, by_first(lambda: gathered(number))

    owned, done_by, of_all, at_second, of_first = zip(*in_processes(3, work), strict=True)
    assert done_by == ({"down": 0, "up": 1, "gate": 2, "k": 1, "v": 2},) * 3
    assert sorted(item for own in owned for item in own) == list(range(8))
    assert at_second == ([], list(owned), [])
    assert (of_all, of_first) == (([0, 1, 2],) * 3, ([0],) * 3)  # while others wait, it is alone
    with joint():
        assert gathered(work)[0] is gathered(work, receiver=0)[0] is by_first(lambda: work) is work


@pytest.mark.parametrize("budget", [None, BitBudget(bits=5)], ids=["gptq", "budget"])
def test_a_base_is_that_of_one_process(budget: BitBudget | None) -> None:
    models, options = [tiny_model("llama", layers=1) for _ in range(3)], {"budget": budget}

    def solve(number: int) -> Any:
        model, moments = models[number], MomentStore()
        report = quantize_(model, "w4-block32", "gptq", calibration=IDS, moments=moments, **options)
        return fingerprint(model), report, moments, observe_moments(model, IDS)

    first, second, alone = *in_processes(2, solve), solve(2)
    assert first[:2] == second[:2] == alone[:2]
    for stored, expected in zip(first[2:], alone[2:], strict=True):
        assert stored.keys() == expected.keys() != set()
        assert all(all(map(torch.equal, stored[layer], expected[layer])) for layer in expected)
    assert not second[2].data | second[3].data  # the first process writes
    with pytest.raises(CalibrationError, match=r"1 calibration sequences .* 2 processes"):
        in_processes(2, lambda number: observe_moments(models[number], IDS[:1]))


@pytest.mark.parametrize("rows", [[40] * 5, [40, 7, 40, 7], [40]], ids=["alike", "differ", "few"])
def test_encodings_are_those_of_one_process(rows: list[int]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 640), nn.ReLU(), nn.Linear(640, 32)).eval()
    quantize_(model, "w4-block32", "rtn")
    batches = [{"input": torch.randn(n, 32) * (1 + i)} for i, n in enumerate(rows)]
    example, schemes = {"input": torch.randn(2, 32)}, Schemes(observer="sqnr")
    simulations = [simulate(copy.deepcopy(model), example, schemes) for _ in range(3)]

    def calibrate(number: int) -> Any:
        simulations[number].observe(batches[:1])  # further calls add to the statistics
        return simulations[number].calibrate(batches), simulations[number].encodings

    *shared, (report, encodings) = *in_processes(2, calibrate), calibrate(2)
    for its_report, its_encodings in shared:
        assert its_report == report
        assert all(its_encodings[name].equals(e) for name, e in encodings.items())


def test_scores_are_those_of_one_process() -> None:
    model, other = (logits_of(tiny_model("llama", seed, layers=1)) for seed in (0, 1))
    expected = score_tokens(model, IDS, "", reference=other).to_json()
    shared = in_processes(3, lambda _: score_tokens(model, IDS, "", reference=other).to_json())
    assert shared == [expected] * 3


FAILING = """
import os, sys
from qwlora.analysis import token_scores
from qwlora.cli.main import main
score, failing = token_scores._score_row, sys.argv.pop(1)
def fails(*arguments):
    if os.environ["RANK"] == failing:
        raise token_scores.NonFiniteError("planted")
    return score(*arguments)
token_scores._score_row = fails
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_process_that_fails_ends_the_job(recipe_for: Any, tmp_path: Path, failing: str) -> None:
    path, script = recipe_for("one-layer llama"), tmp_path / "failing.py"
    script.write_text(FAILING)
    words = [script, failing, "run", path, "--out", tmp_path / "out"]
    result = started(LAUNCHERS["torchrun"], [*map(str, words)])
    assert result.returncode
    assert result.stderr.count("\nqwlora: ") == result.stderr.count("\nqwlora: planted\n") == 1
