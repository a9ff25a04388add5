"""The demo's training step on a machine that does other work: OpenMP threads that spin, and ones
that sleep.

    python benchmarks/shared_cpu.py                      writes benchmarks/results/shared-cpu.md
    python benchmarks/shared_cpu.py --rounds 1 --result /dev/null     a quick look

Three processes hold the same packed SmolLM2-135M with a LoRA adapter (rank 16, every projection):

    before       OMP_WAIT_POLICY unset: threads spin while they wait for one another
    after        OMP_WAIT_POLICY=passive, what the command line sets
    one thread   OMP_NUM_THREADS=1, nothing to wait for

They take turns, one optimizer step each, alone and beside one and two processes that compute
without a pause. Other work on the machine thus falls on all three alike. A ratio is the median,
over the rounds, of two steps of the same round.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from measuring import RESULTS, SMOLLM2, machine_line
from qwlora.system.cpu_threads import configure_threads

RESULT = RESULTS / "shared-cpu.md"
WAYS = {
    "before": {},
    "after": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SETTINGS = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
BUSY = (0, 1, 2)


def save_packed(folder: str) -> None:
    """Write a base on the demo's grid. Rounded to nearest: which integers, a step does not feel."""
    from qwlora.formats.base_folder import save_base
    from qwlora.formats.model_source import load_model, load_tokenizer
    from qwlora.quantize.quantize_model import quantize_

    model = load_model(SMOLLM2)
    quantize_(model, "w4-block32", solver="rtn")
    save_base(model, load_tokenizer(SMOLLM2), Path(folder), SMOLLM2)


def serve_steps(folder: str, tokens: int) -> None:
    """Train one step for each line on stdin, and answer with its seconds."""
    import torch
    from peft import LoraConfig, get_peft_model

    from qwlora.adapter.training_step import memory_saving
    from qwlora.formats.base_folder import load_base

    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(load_base(Path(folder)), config).train()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ids = torch.randint(0, 49152, (1, tokens))
    print(machine_line(), flush=True)
    with memory_saving(model):
        for _ in sys.stdin:
            began = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(time.perf_counter() - began, flush=True)


class Trainer:
    """A process that trains in one of the ways."""

    def __init__(self, folder: str, tokens: int, environment: dict[str, str]):
        inherited = {k: v for k, v in os.environ.items() if k not in SETTINGS}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", folder, "--tokens", str(tokens)],
            env=inherited | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.machine = self._answer()

    def step(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"the training process ended with code {self.process.wait()}")
        return line.strip()

    def close(self) -> None:
        self.process.communicate()


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` other processes that each keep a core busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def rows_of(seconds: dict[int, dict[str, list[float]]]) -> Iterator[str]:
    """The rows of the table."""
    for count, ways in seconds.items():
        times = [f"{statistics.median(ways[way]):.2f}" for way in WAYS]
        ratios = [
            f"{statistics.median(a / b for a, b in zip(ways['before'], ways[way], strict=True)):.2f}"
            for way in WAYS
            if way != "before"
        ]
        yield "| " + " | ".join([str(count), *times, *ratios]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each process")
    parser.add_argument("--tokens", type=int, default=512, help="of a training sequence")
    parser.add_argument("--result", type=Path, default=RESULT, help="file to write")
    parser.add_argument("--serve", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_steps(options.serve, options.tokens)
        return
    configure_threads()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        save_packed(folder)
        trainers = {
            way: Trainer(folder, options.tokens, environment) for way, environment in WAYS.items()
        }
        for trainer in trainers.values():
            stack.callback(trainer.close)
            trainer.step()  # warms up
        load = os.getloadavg()[0]
        seconds: dict[int, dict[str, list[float]]] = {}
        for count in BUSY:
            ways = seconds[count] = {way: [] for way in WAYS}
            with busy(count):
                for _ in range(options.rounds):
                    for way, trainer in trainers.items():
                        ways[way].append(trainer.step())
                        print(f"{count} busy, {way}: {ways[way][-1]:.2f} s", flush=True)
    rows = list(rows_of(seconds))
    print("\n".join(rows))
    page = PAGE.format(
        machine=trainers["before"].machine,
        load=load,
        tokens=options.tokens,
        rounds=options.rounds,
        rows="\n".join(rows),
    )
    options.result.write_text(page)


PAGE = """\
# Training beside other work

One optimizer step of the demo (SmolLM2-135M packed to 4 bits, LoRA of rank 16, {tokens} tokens) alone and
beside processes that keep a core busy each. `before` leaves OpenMP's threads spinning while they
wait; `after` has `OMP_WAIT_POLICY=passive`, which the command line sets; `one thread` is for
comparison. Made by `benchmarks/shared_cpu.py`; the processes take turns, {rounds} rounds each, and a ratio
is the median of the ratios of the rounds.

{machine}. Load average {load:.1f} before the busy processes were started.

| busy processes | before, s | after, s | one thread, s | before / after | before / one thread |
|---|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    main()
