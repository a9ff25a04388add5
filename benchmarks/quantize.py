"""GPTQ on the same layers with the same inputs: ours, and gptqmodel's on the CPU.

    python benchmarks/quantize.py --theirs PYTHON      PYTHON: an interpreter of an environment with gptqmodel

Layers of three blocks of SmolLM2 with the inputs that the float model gives them. Seconds are processor time of one thread, from weight and second moment to
codes; errors are `tr(D R D^T) / tr(W R W^T)` with R the plain moment of all inputs. Both take the columns in their order, 4 bits.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SWEEPS = (0, 1, 2, 4)
GRIDS = {"block 32": 32, "block 64": 64, "channel": -1}
BLOCKS, TOKENS = (0, 14, 29), 4096


def capture(file: Path) -> None:
    """Weights and inputs of the layers, once for layers that share an input."""
    from measuring import SMOLLM2
    from qwlora.data.read_source import load_documents
    from qwlora.formats.model_source import load_model, load_tokenizer
    from sources import concatenated_ids

    model = load_model(SMOLLM2)
    ids = concatenated_ids(
        load_documents("python:pydoc_data.topics:topics", 0.2, 0).train,
        load_tokenizer(SMOLLM2),
        512,
        "training",
    )[: TOKENS // 512]
    inputs: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(f".layers.{block}." in name for block in BLOCKS):
            keep = lambda _, x, name=name: inputs.setdefault(name, []).append(x[0].flatten(0, -2))  # noqa: E731
            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        for row in ids:
            model(row[None], use_cache=False)
    tensors = {f"{name}/x": torch.cat(rows) for name, rows in inputs.items()} | {
        f"{name}/w": model.get_submodule(name).weight.clone() for name in inputs
    }
    save_file(tensors, file)


def ours(weight: Tensor, x: Tensor, size: int, sweeps: int) -> tuple[Tensor, float]:
    from qwlora.grid.scheme import PerBlock, PerChannel, Scheme
    from qwlora.quantize.gptq import GptqSettings, solve_gptq

    moment = x.T @ x / len(x)
    began = time.process_time()
    scheme = Scheme(4, granularity=PerBlock(size) if size > 0 else PerChannel(0))
    found, _ = solve_gptq(weight, scheme, moment, GptqSettings(sweeps=sweeps))
    return found.dequantize(), time.process_time() - began


def their_solver(weight: Tensor, x: Tensor, size: int) -> Any:
    """gptqmodel's solver, which has seen the inputs."""
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()  # on its device
    config = {"bits": 4, "group_size": size, "desc_act": False, "act_group_aware": False}
    solver = GPTQ(layer, QuantizeConfig(**config, sym=True))
    solver.quantizer.configure(perchannel=True)
    solver.add_batch(x.unsqueeze(0), layer(x.unsqueeze(0)))
    solver.finalize_hessian()
    return solver


def theirs(weight: Tensor, x: Tensor, size: int) -> tuple[Tensor, float]:
    solver = their_solver(weight, x, size)
    began = time.process_time()
    values, *_ = solver.quantize()
    return values.detach().float(), time.process_time() - began


def measure(file: Path, who: Any) -> list[dict[str, Any]]:
    """Seconds and error of each layer under each grid."""
    torch.set_num_threads(1)
    tensors, found = load_file(file), []
    with torch.no_grad():
        for name in sorted({key.rpartition("/")[0] for key in tensors}):
            weight, x = tensors[f"{name}/w"], tensors[f"{name}/x"]
            moment = x.T @ x / len(x)
            for grid, size in GRIDS.items():
                values, seconds = who(weight, x, size)
                difference = weight - values
                error = float(
                    ((difference @ moment) * difference).sum() / ((weight @ moment) * weight).sum()
                )
                found.append({"layer": name, "grid": grid, "seconds": seconds, "error": error})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--theirs", metavar="PYTHON", required=True)
    given = parser.parse_args()
    from measuring import machine_line, write_result

    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "layers.safetensors", Path(folder) / "theirs.json"
        capture(file)
        subprocess.run([given.theirs, __file__, "--measure", str(file), str(out)], check=True)
        others = json.loads(out.read_text())
        pairs = {
            sweeps: list(zip(measure(file, partial(ours, sweeps=sweeps)), others, strict=True))
            for sweeps in SWEEPS
        }
    summary = {}
    for sweeps, grid in product(SWEEPS, GRIDS):
        chosen = [(a, b) for a, b in pairs[sweeps] if a["grid"] == grid]
        ratios, count = [a["error"] / b["error"] for a, b in chosen], len(chosen)
        ours_seconds, their_seconds = (
            sum(x["seconds"] for x in side) for side in zip(*chosen, strict=True)
        )
        summary[f"{grid}, {sweeps} sweeps"] = {
            "layers": count,
            "seconds_ratio": ours_seconds / their_seconds,
            "error_ratio_mean": sum(ratios) / count,
            "error_ratio_worst": max(ratios),
            "our_seconds_per_layer": ours_seconds / count,
        }
    write_result(
        "quantize", {"machine": machine_line(), "ours_over_gptqmodel": summary, "layers": pairs}
    )
    for name, row in summary.items():
        print(
            f"{name:24s} seconds {row['seconds_ratio']:.2f}  error {row['error_ratio_mean']:.3f}, at worst {row['error_ratio_worst']:.3f}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        Path(sys.argv[3]).write_text(json.dumps(measure(Path(sys.argv[2]), theirs)))
    else:
        main()
