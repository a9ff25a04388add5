"""A bundle for Qualcomm's Genie of SmolLM2-135M with two adapters: sizes, and greedy tokens.

    export PYTHONPATH=tests:benchmarks
    python benchmarks/genie.py made FOLDER     the bundle in a new folder, and what it should compute
    python benchmarks/genie.py htp FOLDER      the same on the HTP emulator; needs 'qwlora[qnn]'
    python benchmarks/genie.py genie FOLDER    the same in Genie itself (libGenie.so)

Each adds to benchmarks/results/genie.json; with `--layers 1 --count 4`, a smoke test, nothing does.

The base is W4 (head and embeddings W8 per tensor), activations have 16 bits, keys and values 8;
adapters have ranks 8 and 16, on different layers. Two correct computations choose different tokens
where the likeliest two are about equally likely, so nothing here is unsure of a token: the prompt,
longer than one piece of prefill, is a pattern that the base goes on with, and each adapter learns to
answer it with a text of its own, at strength 1 and 0.5, until every token of the answer leads by
`SURE`. The prompt is continued by

    simulated    the simulation, without a cache
    cpu, htp     a program that does what Genie does (`tests/targets/npu/genie_runner.py`), with the
                 bundle's graphs on the CPU, and compiled for the HTP on its emulator
    genie        libGenie.so, with the binaries of `htp`

Of each run:

    equal     how many first tokens are the simulation's
    margin    at the first other one, how much less likely the simulation finds it (difference of
              the two logits). Two correct computations may differ where it is about `noise`
    noise     root mean square of the difference of two logits, between the runtime and the
              simulation on the simulation's own text
    same      the share of tokens of that text that the runtime finds likeliest, too

The emulator takes seconds for a call, however many tokens it has. So it reads the simulation's text
in pieces of prefill, and generates the first `--decode` tokens one by one. The tokens that it would
generate are the simulation's up to the first other one.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from measuring import SMOLLM2, machine_line, write_result
from npu import TEXTS, calibrated, tokens_of
from qwlora import export
from qwlora.formats.model_source import load_tokenizer
from qwlora.system.atomic import read_tensors, write_tensors
from qwlora.targets.npu.genie import to_values
from targets.npu.genie_runner import Runner, compile_separately, in_genie
from targets.proofs import with_strength

CONFIGS = {
    "first": LoraConfig(r=8, lora_alpha=16, target_modules=["v_proj", "down_proj"]),
    "second": LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "o_proj", "up_proj"]),
}
RUNS = [("first", 1.0), ("first", 0.5), ("first", 0.0), ("second", 1.0)]
BUNDLE, SIMULATED, RESULT = "bundle", "simulated.safetensors", "result.json"
PROMPT, PREFILL, CONTEXT = 48, 32, 128  # tokens; the prompt is one and a half pieces
PATTERN = "0 1 0 1 "
SURE = 3.0  # by how much the logit of an answer's token leads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", choices=["made", "htp", "genie"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--count", type=int, default=64, help="generated tokens")
    parser.add_argument(
        "--steps", type=int, default=300, help="training steps of an adapter, at most"
    )
    parser.add_argument("--decode", type=int, default=4, help="tokens one by one on the HTP")
    parser.add_argument("--runs", nargs="+", type=run_of, default=RUNS, metavar="ADAPTER,ALPHA")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {"made": made, "htp": on_htp, "genie": in_libgenie}[arguments.place](arguments)


def run_of(text: str) -> tuple[str, float]:
    name, _, alpha = text.partition(",")
    return name, float(alpha)


def made(arguments: Any) -> None:
    """Write the bundle, run it on the CPU, and store the simulation's text and logits."""
    clock, folder = Clock(), arguments.folder
    folder.mkdir(parents=True)
    tokenizer = load_tokenizer(SMOLLM2)
    # as Genie begins
    prompt = [tokenizer.bos_token_id, *tokenizer(PATTERN * PROMPT)["input_ids"][: PROMPT - 1]]

    def train(model: Any, name: str) -> None:
        answer = tokens_of(tokenizer, TEXTS[name])[0, : arguments.count]
        clock(f"{name}: {answer_(model, name, prompt, answer.tolist(), arguments.steps)} steps")

    shape = CONFIGS, arguments.layers, tokenizer
    simulations = calibrated(SMOLLM2, "w4-channel", *shape, train)
    clock("calibrated")
    bundle, sizes = folder / BUNDLE, {"graphs": [PREFILL, 1], "context": [CONTEXT]}
    export(simulations, "qnn", bundle, tokenizer=tokenizer, layout="genie", **sizes)
    clock("exported")
    runs: dict[str, Any] = {}
    result = {"machine": machine_line(), **sizes, "prompt": prompt}
    result |= {"bytes": file_sizes(bundle), "runs": runs}
    runner, stored = Runner(bundle), {}
    for name, alpha in arguments.runs:
        logits, key = with_strength(simulations[name], alpha), f"{name} {alpha:g}"
        runner.apply(name, alpha)
        guess = runner.generate(prompt, arguments.count)
        clock(f"{key}: {tokenizer.decode(guess)!r}")
        expected = continued(logits, prompt, guess)
        stored[key] = logits(torch.tensor([prompt + expected]))[0, PROMPT - 1 : -1]
        clock(f"{key}: simulated")
        runs[key] = {"simulated": expected, "text": tokenizer.decode(expected)}
        runs[key]["cpu"] = compared(runner, prompt, expected, stored[key])
        runs[key]["cpu"]["tokens"] = guess
        write_tensors(folder / SIMULATED, stored)
        save(result, arguments)
        clock(f"{key}: {runs[key]}")


def answer_(model: Any, name: str, prompt: list[int], answer: list[int], limit: int) -> int:
    """Train an adapter until it is sure of an answer to the prompt; returns the number of steps."""
    layers = [module for module in model.modules() if name in getattr(module, "lora_A", ())]
    parameters = [p for n, p in model.named_parameters() if "lora_" in n and p.requires_grad]
    optimizer, leads = torch.optim.AdamW(parameters, 1e-3), dict[float, float]()
    ids, wanted = torch.tensor([prompt + answer]), torch.tensor(answer)[:, None]
    for step in range(limit):
        strength = 1.0 if step % 2 else 0.5
        for layer in layers:
            layer.set_scale(name, strength)
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        others = logits.detach().scatter(1, wanted, -torch.inf).amax(1)
        leads[strength] = float((logits.detach().gather(1, wanted)[:, 0] - others).min())
        if step and min(leads.values()) > SURE:
            break
        torch.nn.functional.cross_entropy(logits, wanted[:, 0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in layers:
        layer.set_scale(name, 1.0)
    return step


def on_htp(arguments: Any) -> None:
    """Read the simulation's text, and decode."""
    clock, folder, result = Clock(), arguments.folder, stored_result(arguments)
    sizes = {PREFILL, 1} if arguments.decode else {PREFILL}
    compiled = compile_separately(folder / BUNDLE, folder, sizes)
    runner, (simulated, _) = Runner(folder / BUNDLE, compiled), read_tensors(folder / SIMULATED)
    clock("compiled and loaded")
    for key in (f"{name} {alpha:g}" for name, alpha in arguments.runs):
        run, (name, _, alpha) = result["runs"][key], key.partition(" ")
        runner.apply(name, float(alpha))
        run["htp"] = compared(runner, result["prompt"], run["simulated"], simulated[key])
        save(result, arguments)
        clock(f"{key}: {run['htp']}")
        if arguments.decode:
            run["htp"]["decoded"] = runner.generate(result["prompt"], arguments.decode)
            save(result, arguments)
            clock(f"{key}: {run['htp']['decoded']}")


def in_libgenie(arguments: Any) -> None:
    """Decode in Genie, with the binaries of `on_htp`."""
    folder, result = arguments.folder, stored_result(arguments)
    compiled = compile_separately(folder / BUNDLE, folder, {PREFILL, 1})
    content = json.loads((folder / BUNDLE / "genie_config.json").read_text())
    binaries = [str(path) for path in sorted(folder.glob("*.bin"))]
    assert len(binaries) == len(compiled)
    content["dialog"]["engine"]["model"]["binary"]["ctx-bins"] = binaries
    config = folder / BUNDLE / "separate.json"
    config.write_text(json.dumps(content))
    text = result["prompt"][1:]  # Genie puts the first token there itself
    request = {"ids": text, "count": arguments.decode, "runs": arguments.runs}
    answer = in_genie(config, request, timeout=24 * 3600)
    config.unlink()
    for (name, alpha), tokens in zip(arguments.runs, answer["tokens"], strict=True):
        result["runs"][f"{name} {alpha:g}"]["genie"] = {"decoded": tokens}
        print(name, alpha, tokens)
    save(result, arguments)


def continued(logits: Any, prompt: list[int], guess: list[int]) -> list[int]:
    """As many of the likeliest tokens, one by one; the first ones that are right need one call."""
    tokens: list[int] = []
    while len(tokens) < len(guess):
        known = len(tokens)
        rest = guess[known:-1] if guess[:known] == tokens else []
        row = logits(torch.tensor([prompt + tokens + rest]))[0, len(prompt) + known - 1 :]
        likeliest = row.argmax(-1).tolist()
        right = [*(a == b for a, b in zip(rest, likeliest, strict=False)), False].index(False)
        tokens += likeliest[: right + 1]
    return tokens


def read(runner: Runner, ids: list[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of a text, in pieces of prefill."""
    cache, parts = runner.empty_cache(), []
    for past in range(0, len(ids), PREFILL):
        now = ids[past : past + PREFILL]
        codes = runner.call(PREFILL, now, past, cache)[0, : len(now)]
        parts.append(to_values(torch.from_numpy(codes), runner.grids[PREFILL]["logits"]))
    return torch.cat(parts)


def compared(
    runner: Runner, prompt: list[int], expected: list[int], simulated: torch.Tensor
) -> dict[str, Any]:
    """The figures of the module, of a runner that reads the simulation's text."""
    found = read(runner, prompt + expected)[PROMPT - 1 : -1]
    likeliest = found.argmax(-1).tolist()
    right = [a == b for a, b in zip(likeliest, expected, strict=True)]
    equal = [*right, False].index(False)
    difference = (found - simulated).double()
    difference -= difference.mean(-1, keepdim=True)  # a common shift changes nothing
    figures = {
        "equal": equal,
        "noise": float(difference.square().mean().sqrt() * 2**0.5),
        "same": sum(right) / len(right),
    }
    if equal < len(expected):
        row = simulated[equal]
        figures["margin"] = float(row[expected[equal]] - row[likeliest[equal]])
    return figures


def stored_result(arguments: Any) -> Any:
    return json.loads((arguments.folder / RESULT).read_text())


def save(result: Any, arguments: Any) -> None:
    (arguments.folder / RESULT).write_text(json.dumps(result))
    if not arguments.layers:
        write_result("genie", result)


class Clock:
    """Prints what was done, and the seconds since the last time."""

    def __init__(self) -> None:
        self.before = time.perf_counter(), time.process_time()

    def __call__(self, what: str) -> None:
        now = time.perf_counter(), time.process_time()
        wall, processor = (b - a for a, b in zip(self.before, now, strict=True))
        print(f"{wall:.0f} s ({processor:.0f} s of the processor): {what}", flush=True)
        self.before = now


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file; those of an adapter's inputs together."""
    found: dict[str, int] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        key = str(name.with_name("*.raw") if name.suffix == ".raw" else name)
        found[key] = found.get(key, 0) + path.stat().st_size
    return found


if __name__ == "__main__":
    main()
