"""The life of adapters on SmolLM2-135M: two texts from one recipe, a third added later, one
imported from plain PEFT, one trained again under a new name. Which adapter helps where, and what
moved.

    python benchmarks/adapters.py [--steps 40]      writes benchmarks/results/adapters.md

Texts that every installation has: the Python language reference, the licenses in onnxruntime, and
the docstrings of torch. Stops if a command changes a file of the base or of another adapter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from peft import LoraConfig, get_peft_model

from measuring import RESULTS, SMOLLM2, machine_line, markdown
from qwlora.formats.model_source import load_model, load_tokenizer

PAGE = RESULTS / "adapters.md"
TEXTS = {
    "python": "python:pydoc_data.topics:topics",
    "licenses": str(Path(onnxruntime.__file__).with_name("ThirdPartyNotices.txt")),
    "torch": str(Path(torch.__file__).with_name("_torch_docs.py")),
}
RECIPE = """name: product
model: {{source: "{model}"}}
data: {{sequence_tokens: 256}}
preset: balanced
evaluate: all
base: {{weights: w4-block32, calibration_sequences: 32}}
adapters:
  - {{name: python, steps: {steps}, data: {{source: "{python}"}}}}
  - {{name: licenses, steps: {steps}, data: {{source: "{licenses}"}}}}
"""


def digests(job: Path) -> dict[str, str]:
    """Of every file of the base and the adapters."""
    return {
        str(file.relative_to(job)): hashlib.sha256(file.read_bytes()).hexdigest()
        for top in ("base", "adapters")
        for file in sorted((job / top).rglob("*"))
        if file.is_file()
    }


def plain_peft(folder: Path, steps: int) -> None:
    """A LoRA on the float model, trained and saved by PEFT alone."""
    model, tokenizer = load_model(SMOLLM2), load_tokenizer(SMOLLM2)
    ids = tokenizer(Path(TEXTS["torch"]).read_text())["input_ids"]
    torch.manual_seed(0)
    adapted = get_peft_model(
        model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=2e-3)
    for step in range(steps):
        batch = torch.tensor([ids[step * 256 : (step + 1) * 256]])
        adapted(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    commands: list[tuple[str, float, str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        job, recipe = Path(scratch, "out"), Path(scratch, "recipe.yaml")
        recipe.write_text(RECIPE.format(model=SMOLLM2, steps=steps, **TEXTS))
        peft = Path(scratch, "peft")
        plain_peft(peft, steps)

        def qwlora(*arguments: str) -> None:
            before, began = digests(job), time.perf_counter()
            subprocess.run([sys.executable, "-m", "qwlora", *arguments], check=True)
            after = digests(job)
            moved = [name for name in before if after.get(name) != before[name]]
            if moved:
                sys.exit(f"{arguments} changed {moved}")
            new = len(after.keys() - before.keys())
            shown = " ".join(Path(a).name if "/" in a else a for a in arguments)
            said = f"{new} new files" + (f", the {len(before)} older ones unchanged" * bool(before))
            commands.append((shown, time.perf_counter() - began, said))

        run = ["--out", str(job), str(job / "recipe.yaml")]
        text = ("--data", TEXTS["torch"])
        longer = ("--like", "python", "--set", f"steps={2 * steps}")
        qwlora("quantize", "--out", str(job), str(recipe))
        qwlora("train", *run)
        qwlora("adapters", "add", str(job), "--name", "torch", *text)
        qwlora("train", *run)
        qwlora("adapters", "import", str(job), str(peft), "--name", "from-peft", *text)
        qwlora("adapters", "add", str(job), "--name", "python-long", *longer)
        qwlora("train", *run)
        qwlora("evaluate", *run)
        results = json.loads((job / "results.json").read_text())

    matrix = results["perplexity"]["on"]
    PAGE.write_text(page(matrix, commands, steps))
    print(PAGE.read_text())


def page(
    matrix: dict[str, dict[str, Any]], commands: list[tuple[str, float, str]], steps: int
) -> str:
    rows = [[stage, *(f"{on[stage]:.2f}" for on in matrix.values())] for stage in ("float", "base")]
    for name in next(iter(matrix.values()))["adapted"]:
        figures = [on["adapted"] for on in matrix.values()]
        bold = ["**" * (on[name] == min(on.values())) for on in figures]
        rows.append([name, *(f"{b}{on[name]:.2f}{b}" for b, on in zip(bold, figures, strict=True))])
    ran = [(f"`qwlora {c}`", f"{seconds:.0f}", said) for c, seconds, said in commands]
    return f"""# One base, several adapters: SmolLM2-135M

`python benchmarks/adapters.py`; {steps} steps of 256 tokens each (python-long twice as many), one seed.
Machine: {machine_line()}.

Perplexity on held-out text. Columns are the texts; the best adapter of each is bold.

{markdown(["", *matrix], rows)}

{markdown(["command", "seconds", "files of the base and the adapters, by SHA-256"], ran)}
"""


if __name__ == "__main__":
    main()
