"""A training step on a machine that does other work: OpenMP threads that spin, and ones that sleep.

    python benchmarks/shared_cpu.py               writes benchmarks/results/shared_cpu.json
    python benchmarks/shared_cpu.py --rounds 1    a smoke test; writes nothing

Three processes hold the same packed SmolLM2-135M (4 bits, blocks of 32) with a LoRA of rank 16 on
every projection, and take turns, one optimizer step of 512 tokens each:

    spin          OMP_WAIT_POLICY unset: threads spin while they wait for each other
    sleep         OMP_WAIT_POLICY=passive, what the command line sets
    one thread    OMP_NUM_THREADS=1, nothing to wait for

They do so alone, and beside one and two processes that keep a core busy. `speed` is the median of
the rounds' ratios: seconds of `spin` over those of the way. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import SMOLLM2, machine_line, ratio, write_result

WAYS = {
    "spin": {},
    "sleep": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SET = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
BUSY, TOKENS, RANK = (0, 1, 2), 512, 16


def save_packed(folder: str) -> None:
    """Rounded to nearest: a step takes the same time with any integers."""
    from qwlora import quantize_, save_base
    from qwlora.formats.model_source import load_model, load_tokenizer

    model = load_model(SMOLLM2)
    quantize_(model, "w4-block32", solver="rtn")
    save_base(model, folder, tokenizer=load_tokenizer(SMOLLM2))


def serve_steps(folder: str) -> None:
    """Train one step for each line on stdin, and answer with its seconds."""
    import torch
    from peft import LoraConfig, get_peft_model

    from qwlora import load_base
    from qwlora.adapter.training_step import memory_saving

    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model: Any = get_peft_model(load_base(Path(folder)), config).train()
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ids = torch.randint(0, model.config.vocab_size, (1, TOKENS))
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

    def __init__(self, folder: str, environment: dict[str, str]):
        inherited = {key: value for key, value in os.environ.items() if key not in SET}
        self._process: Any = subprocess.Popen(
            [sys.executable, __file__, "--serve", folder],
            env=inherited | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.machine = self._answer()

    def step(self) -> float:
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"the training process ended with code {self._process.wait()}")
        return line.strip()

    def close(self) -> None:
        self._process.communicate()


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` other processes that each keep a core busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each process")
    parser.add_argument("--serve", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_steps(options.serve)
        return
    rows, load = [], os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        save_packed(folder)
        trainers = {way: Trainer(folder, environment) for way, environment in WAYS.items()}
        for trainer in trainers.values():
            stack.callback(trainer.close)
            trainer.step()  # warms up
        for count in BUSY:
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            with busy(count):
                for _ in range(options.rounds):
                    for way, trainer in trainers.items():
                        seconds[way].append(trainer.step())
            for way, steps in seconds.items():
                row = {"busy": count, "way": way, "seconds": round(statistics.median(steps), 2)}
                rows.append(row | {"speed": ratio(seconds, "spin", way)})
                print("  ".join(f"{value!s:>10}" for value in rows[-1].values()), flush=True)
    if options.rounds > 1:
        head = {"machine": trainers["spin"].machine, "load_before": load, "tokens": TOKENS}
        write_result("shared_cpu", head | {"rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
