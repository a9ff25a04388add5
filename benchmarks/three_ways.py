"""Three ways to ship an adapter with a quantized base, on equal terms.

    python benchmarks/three_ways.py [--model smollm2] [--steps 60] [--seeds 3] [--threads 1]

    merge      train on the float model, merge, quantize the result: a base for each adapter
    add        train on the float model, add the adapter to the quantized base
    integers   train on the quantized base, as QWLoRA does

All adapters have rank 16 and start at zero. They see the same sequences in the same order, for as
many steps. Solver gptq is calibrated on the same 64 sequences for every base. Perplexities are on
all held-out text, over those of the float model with its adapter. Training computes in bfloat16
(autocast), everything else in float32.

A finished figure is in the result file and is not computed again.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from peft import PeftModel
from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from fidelity import RESULTS, SUBJECTS, Bench, Row, read
from measuring import machine_line, markdown, write_table
from qwlora.adapter.attach import LoraShape, attach
from qwlora.quantize.quantize_model import quantize_
from qwlora.system.device import onednn_float32_matmul

SCHEMES = ("w4-block32", "w3-block64", "w2-block32-asymmetric")
WAYS = ("merge", "add", "integers")


class Ways:
    """The models of one seed."""

    def __init__(self, bench: Bench, seed: int):
        self.bench, self.seed = bench, seed
        self._float: PeftModel | None = None

    def perplexity(self, model: nn.Module) -> float:
        return self.bench.perplexity(model, self.bench.all_held_out)

    def trained(self, base: nn.Module) -> PeftModel:
        adapted = attach(copy.deepcopy(base), LoraShape(rank=16, alpha=32.0), seed=self.seed)
        self.bench.train(adapted, self.seed, self.bench.training)
        return adapted.eval()

    def on_float(self) -> PeftModel:
        self._float = self._float or self.trained(self.bench.reference)
        return self._float

    def base(self, scheme: str) -> nn.Module:
        return self.bench.base(Row("gptq", scheme))

    def merge(self, scheme: str) -> nn.Module:
        merged: Any = copy.deepcopy(self.on_float()).merge_and_unload()
        calibration = self.bench.base_text[: self.bench.calibration_count]
        quantize_(merged, scheme, "gptq", calibration=calibration)
        return merged

    def add(self, scheme: str) -> nn.Module:
        adapted = attach(copy.deepcopy(self.base(scheme)), LoraShape(rank=16, alpha=32.0), seed=0)
        factors = get_peft_model_state_dict(self.on_float(), save_embedding_layers=False)
        set_peft_model_state_dict(adapted, factors)
        return adapted

    def integers(self, scheme: str) -> nn.Module:
        return self.trained(self.base(scheme))


def figures(bench: Bench, seeds: int, known: dict[str, float]) -> Any:
    """The name of each figure that is not known, and what computes it."""
    wanted: list[tuple[str, Callable[[], float]]] = []
    models = [Ways(bench, seed) for seed in range(seeds)]
    wanted += [("float base", lambda: models[0].perplexity(bench.reference))]
    wanted += [(f"float {w.seed}", lambda w=w: w.perplexity(w.on_float())) for w in models]
    for scheme in SCHEMES:
        base = lambda scheme=scheme: models[0].perplexity(models[0].base(scheme))  # noqa: E731
        wanted.append((f"{scheme} base", base))
        for way in ("integers", "add", "merge"):  # the base is kept for the first two
            for w in models:
                compute = lambda w=w, way=way, scheme=scheme: w.perplexity(  # noqa: E731
                    getattr(w, way)(scheme)
                )
                wanted.append((f"{scheme} {way} {w.seed}", compute))
    return [(name, compute) for name, compute in wanted if name not in known]


def table(found: dict[str, float], seeds: int) -> str:
    """Perplexities over those of float LoRA with the same seed: mean and standard deviation. Grids
    with all figures only."""
    rows, last = [], f"{WAYS[0]} {seeds - 1}"  # merging comes last
    for scheme in (scheme for scheme in SCHEMES if f"{scheme} {last}" in found):
        cells = [scheme, f"{found[f'{scheme} base'] / found['float base']:.3f}"]
        for way in WAYS:
            over = [found[f"{scheme} {way} {s}"] / found[f"float {s}"] for s in range(seeds)]
            cells.append(f"{mean(over):.3f} ± {stdev(over):.3f}")
        rows.append(cells)
    return markdown(["grid", "base over float base", *WAYS], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", choices=SUBJECTS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    file = Path(RESULTS, f"three-ways-{given.model}.json")
    content = read(file) or {"machine": machine_line(), "steps": given.steps, "perplexity": {}}
    with onednn_float32_matmul():
        bench = Bench(SUBJECTS[given.model], given.steps, 5e-4)
        for name, compute in figures(bench, given.seeds, content["perplexity"]):
            content["perplexity"][name] = compute()
            file.write_text(json.dumps(content, indent=1) + "\n")
            print(name, content["perplexity"][name], flush=True)
            write_table("three-ways.md", "three_ways", table(content["perplexity"], given.seeds))


if __name__ == "__main__":
    main()
