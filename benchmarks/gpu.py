"""What a GPU makes of training, GPTQ, unpacking and the demo, against other programs on the same GPU.

    python benchmarks/gpu.py                         all parts; writes benchmarks/results/gpu.json
    python benchmarks/gpu.py steps unpack            some; the others in the file stay
    python benchmarks/gpu.py --device cpu --quick    a smoke test on a tiny model; writes nothing

steps: forward, backward and AdamW of a LoRA of rank 16 on every projection, 4 x 512 tokens, on SmolLM2-135M and on a Llama of random weights with 1.1B: plain
bfloat16, bitsandbytes' NF4 (extra `benchmarks`), and ours (4 bits in blocks of 32) plain, with `memory_saving`, and under torch.compile. Each way has the device
to itself, and is gone before the next. Seconds are the median of the steps after the first three; `peak` is the most memory that torch allocated for tensors in
these, the model included. `time` and `memory` are ratios to bitsandbytes' (goals: at most 1.0 and 0.9 for the best of ours).

gptq: seconds a layer from weight and second moment to codes, 4 bits in blocks of 64 without sweeps, against gptqmodel's solver if it is installed.

unpack: a weight of 8192 x 8192 at each bitwidth to bfloat16, by torch.compile and by torch's operations: bytes read and written a second, next to those of
a copy. demo: src/qwlora/recipe/examples/demo.yaml from an empty directory, seconds of each stage.

A comparison that needs another package or a GPU is left out where that is missing, and the output says so.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from measuring import ROOT, SMOLLM2, earlier_result, machine_line, write_result
from quantize_memory import SIZES
from qwlora.grid.scheme import PerBlock, Scheme, parse_scheme
from qwlora.system.device import memory_of

SCHEME, GPTQ_BLOCK = "w4-block32", 64
TINY = dict(zip(SIZES["1B"], (64, 128, 2, 4), strict=True))


class Machine:
    """The device, and how much is measured on it."""

    def __init__(self, device: str, quick: bool):
        self.device, self.quick = torch.device(device), quick
        self.shape = (1, 32) if quick else (4, 512)
        self.warm, self.rounds = (1, 2) if quick else (3, 10)
        self.skipped: list[str] = []

    def seconds(self, call: Callable[[], object]) -> float:
        """The median over the rounds, waiting for the device after each."""
        seconds = []
        for _ in range(self.warm + self.rounds):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[self.warm :])

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def can(self, what: str, package: str | None = None) -> bool:
        """Whether `what` can be compared with; if not, the output says why."""
        reason = ""
        if self.device.type != "cuda":
            reason = f"it needs a CUDA device, and this run is on {self.device}"
        elif package is not None and importlib.util.find_spec(package) is None:
            reason = f"it needs the package {package}"
        if reason and (line := f"{what} is left out: {reason}") not in self.skipped:
            self.skipped.append(line)
            print(line, flush=True)
        return not reason


def models(machine: Machine) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Names, and functions that make the model in bfloat16 on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qwlora.formats.model_source import load_model

    def synthetic(sizes: dict[str, int]) -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(**sizes, num_key_value_heads=sizes["num_attention_heads"] // 4)
        with torch.device(machine.device):
            return LlamaForCausalLM(config).to(torch.bfloat16)

    if machine.quick:
        yield "tiny", lambda: synthetic(TINY)
        return
    yield "SmolLM2-135M", lambda: load_model(SMOLLM2).to(machine.device, torch.bfloat16)
    yield "synthetic 1.1B", lambda: synthetic(SIZES["1B"])


def nf4(model: nn.Module, device: torch.device) -> nn.Module:
    import bitsandbytes as bnb

    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            sizes, kind = (module.in_features, module.out_features), {"quant_type": "nf4"}
            layer = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, **kind)
            layer.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, **kind)
            model.set_submodule(path, layer.to(device))
    model.is_loaded_in_4bit = True  # what transformers sets, and PEFT asks for
    return model


def trained(machine: Machine, model: Any, way: str) -> dict[str, float]:
    """Seconds and peak memory of a step."""
    from peft import LoraConfig, get_peft_model

    from qwlora import memory_saving

    model.config.use_cache = False
    config = LoraConfig(r=16, target_modules="all-linear")
    model = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(0, model.config.vocab_size, machine.shape, device=machine.device)
    called = torch.compile(model) if "compile" in way else model

    def step() -> None:
        called(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    saving = memory_saving(model) if "memory_saving" in way else contextlib.nullcontext()
    with saving, memory_of(machine.device, way) as memory:
        seconds = machine.seconds(step)
    return {"seconds": round(seconds, 5), "peak": memory.get("peak_device_bytes", 0)}


def steps(machine: Machine) -> list[dict[str, Any]]:
    from qwlora import quantize_

    ours = [SCHEME, f"{SCHEME}, memory_saving"]
    ours += [f"{SCHEME}, torch.compile"] * machine.can("torch.compile", "triton")
    theirs = ["bitsandbytes NF4"] * machine.can("bitsandbytes NF4", "bitsandbytes")
    rows = []
    for name, make in models(machine):
        found: dict[str, dict[str, Any]] = {}
        for way in ["plain bfloat16", *theirs, *ours]:
            model = make()
            if way in theirs:
                model = nf4(model, machine.device)
            elif way in ours:
                quantize_(model, SCHEME, "rtn")
            found[way] = {"model": name, "way": way, **trained(machine, model, way)}
            del model
            gc.collect()
            if machine.device.type != "cpu":
                torch.accelerator.empty_cache()
        for row in found.values():
            if theirs:
                other = found[theirs[0]]
                row["time"] = round(row["seconds"] / other["seconds"], 3)
                row["memory"] = round(row["peak"] / other["peak"], 3)
            print(row, flush=True)
            rows.append(row)
    return rows


def gptq(machine: Machine) -> list[dict[str, Any]]:
    from qwlora.quantize.gptq import GptqSettings, solve_gptq

    has_theirs = machine.can("gptqmodel", "gptqmodel")
    shapes = [(128, 256)] if machine.quick else [(576, 576), (2048, 2048), (5632, 2048)]
    shapes += [] if machine.quick else [(2048, 5632)]
    scheme, rows = Scheme(4, granularity=PerBlock(GPTQ_BLOCK)), []
    for outputs, inputs in shapes:
        torch.manual_seed(0)
        weight = torch.randn(outputs, inputs).to(machine.device)
        x = torch.randn(4 * inputs, inputs).to(machine.device)
        solve = partial(solve_gptq, weight, scheme, x.T @ x / len(x), GptqSettings(sweeps=0))
        row: dict[str, Any] = {"layer": [outputs, inputs], "seconds": machine.seconds(solve)}
        if has_theirs:
            row["gptqmodel"] = their_gptq(machine, weight, x)
            row["time"] = round(row["seconds"] / row["gptqmodel"], 3)
        print(row, flush=True)
        rows.append(row)
    return rows


def their_gptq(machine: Machine, weight: torch.Tensor, x: torch.Tensor) -> float:
    """Seconds of gptqmodel's solver, which a run uses up."""
    from quantize import their_solver

    seconds = []
    for _ in range(machine.warm + machine.rounds):
        solver = their_solver(weight, x, GPTQ_BLOCK)
        machine.wait()
        began = time.perf_counter()
        solver.quantize()
        machine.wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[machine.warm :])


def unpack(machine: Machine) -> list[dict[str, Any]]:
    from qwlora.grid.encoding import QuantizedTensor, measure
    from qwlora.nn import packed_tensor
    from qwlora.nn.packed_tensor import PackedTensor, Parts

    size = 256 if machine.quick else 8192
    weight, rows = torch.randn(size, size), []
    there = torch.empty(size, size, dtype=torch.bfloat16, device=machine.device)
    copied = 2 * there.nbytes / machine.seconds(there.clone)
    ways = {"torch": False}
    if machine.can("compiled unpacking", "triton"):
        ways["compiled"] = True
    for bits in range(2, 9):
        scheme = parse_scheme(f"w{bits}-block32")
        encoding = measure(weight, scheme)
        packed = PackedTensor.from_quantized(QuantizedTensor(encoding.quantize(weight), encoding))
        parts = (part if part is None else part.to(machine.device) for part in packed.parts)
        packed = PackedTensor(scheme, size, Parts(*parts))
        row: dict[str, Any] = {"bits": bits, "copy": round(copied / 1e9, 1)}
        for name, is_compiled in ways.items():
            with mock.patch.object(packed_tensor, "compiles", lambda device, c=is_compiled: c):
                seconds = machine.seconds(partial(packed.dequantize, torch.bfloat16))
            row[name] = round((packed.nbytes + there.nbytes) / seconds / 1e9, 1)
        print({**row, "unit": "GB/s"}, flush=True)
        rows.append(row)
    return rows


def demo(machine: Machine) -> dict[str, Any]:
    from qwlora.formats.model_source import load_tokenizer
    from qwlora.pipeline import VERBS
    from qwlora.pipeline.run import run
    from qwlora.recipe import load_recipe

    with tempfile.TemporaryDirectory() as scratch:
        changes, verbs = [f"device={machine.device}"], VERBS
        if machine.quick:  # a random model's files cannot pass `verify`
            _, make = next(models(machine))
            model, folder = make().cpu().float(), f"{scratch}/model"
            tokenizer = load_tokenizer(SMOLLM2)
            model.resize_token_embeddings(len(tokenizer))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            less = ("data.sequence_tokens=32", "base.calibration_sequences=2")
            less += ("data.evaluation_sequences=2", "adapters.0.steps=2")
            changes += [f"model.source={folder}", *less, "adapters.0.warmup_steps=1"]
            verbs = ("quantize", "train", "evaluate")
        recipe = load_recipe(ROOT / "src/qwlora/recipe/examples/demo.yaml", tuple(changes))
        began = time.perf_counter()
        results = run(recipe, Path(scratch, "demo"), verbs, say=print)
    return {"seconds": round(time.perf_counter() - began, 1), "stages": results["stages"]}


PARTS = {"steps": steps, "gptq": gptq, "unpack": unpack, "demo": demo}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model, two rounds")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"there are no parts {', '.join(sorted(unknown))}")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --device cpu --quick is a smoke test")
    if not (options.quick or torch.device(options.device).type == "cuda"):
        parser.error("without a GPU there is only the smoke test: add --quick")
    machine = Machine(options.device, options.quick)
    found = {part: PARTS[part](machine) for part in options.parts or PARTS}
    if options.quick:
        return
    name = torch.cuda.get_device_name(machine.device)
    content = {"machine": f"{name}, {machine_line()}", "left_out": machine.skipped}
    write_result("gpu", earlier_result("gpu") | content | found)


if __name__ == "__main__":
    main()
