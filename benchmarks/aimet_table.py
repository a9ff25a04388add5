"""The table of `aimet.py`: one column for each base and tool."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

TOOLS = {"aimet": "AIMET", "qwlora": "QWLoRA"}
Column = dict[str, Any]
Cell = Callable[[Column], str]


def table(results: dict[str, Any], steps: int) -> str:
    """Markdown of what `aimet.py` measured, by base.

    Args:
        steps: of training, in its phase.
    """
    columns = [
        {
            **result[tool],
            **result["quality"][tool],
            "files": result["handed_over"][tool],
            "htp": result.get("htp", {}).get(tool),
        }
        for result in results.values()
        for tool in TOOLS
    ]
    heads = [f"{name}, {weights}" for weights in results for name in TOOLS.values()]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for name, cell in rows(list(columns[0]["phases"]), steps).items():
        lines.append(f"| {name} | {' | '.join(map(cell, columns))} |")
    one = next(iter(results.values()))
    adapters = ", ".join(
        f"with the adapter of {weights} {result['quality']['float']['adapter']['perplexity']:.3f}"
        for weights, result in results.items()
    )
    floats = one["quality"]["float"]["base"]["perplexity"]
    lines.append(f"\nPerplexity of the float model: {floats:.3f}; {adapters}.")
    for tool, name in TOOLS.items():
        missing = one["handed_over"][tool]["computed_without_an_encoding"].items()
        operators = ", ".join(f"{operator} {count}" for operator, count in missing)
        lines.append(f"\nValues without an encoding, {name}: {operators}.")
    lines += [f"\n{name}: {one[tool]['machine']}" for tool, name in TOOLS.items()]
    return "\n".join(lines)


def rows(phases: list[str], steps: int) -> dict[str, Cell]:
    """What a column shows, by name of the row."""
    found: dict[str, Cell] = {}
    for kind in ("base", "adapter"):
        found[f"perplexity, {kind}"] = lambda c, kind=kind: f"{c[kind]['perplexity']:.3f}"
        found[f"KL from float, {kind}"] = lambda c, kind=kind: f"{c[kind]['kl']:.4f}"
    found["quantizers of activations"] = lambda c: str(c["activation_quantizers"])
    for phase in phases:
        times = steps if phase == "train" else 1
        name = phase if times == 1 else "training step"
        found[f"{name}: processor seconds, peak memory"] = partial(cost, phase, times)
    return found | {
        "bytes of model and encodings": lambda c: f"{sum(c['files']['files'].values()):,}",
        "parameter encodings that name an initializer": lambda c: (
            f"{c['files']['parameters_that_are_initializers']} of {c['files']['parameters']}"
        ),
        "computed values without an encoding": lambda c: (
            f"{sum(c['files']['computed_without_an_encoding'].values())} "
            f"of {c['files']['computed']}"
        ),
        "adapter's tensors: inputs of the graph, initializers": lambda c: (
            f"{c['files']['adapter_inputs']}, {c['files']['adapter_initializers']} "
            f"of {c['files']['adapter_tensors']}"
        ),
        "HTP: partitions, nodes on the CPU": on_htp(
            lambda r: f"{r['placement']['partitions']}, {r['placement']['cpu_nodes']}"
        ),
        "HTP to ONNX Runtime's CPU, to the simulation": on_htp(
            lambda r: f"{r['htp_to_cpu']['sqnr']:.1f}, {r['htp']['sqnr']:.1f} dB"
        ),
        "HTP and simulation: same likeliest token": on_htp(
            lambda r: f"{r['htp']['top1_agreement']:.1%}"
        ),
        "perplexity of the graph's tokens: simulated, CPU, HTP": on_htp(
            lambda r: ", ".join(
                f"{value:.3f}"
                for value in (
                    r["simulated_perplexity"],
                    r["cpu"]["perplexity"],
                    r["htp"]["perplexity"],
                )
            )
        ),
    }


def cost(phase: str, times: int, column: Column) -> str:
    used = column["phases"][phase]
    return f"{used['processor_seconds'] / times:.1f}, {used['peak_bytes'] / 1e9:.2f} GB"


def on_htp(show: Callable[[dict[str, Any]], str]) -> Cell:
    def cell(column: Column) -> str:
        run = column["htp"]
        if run is None:
            return "not run"
        return "refused" if "refused" in run else show(run)

    return cell
