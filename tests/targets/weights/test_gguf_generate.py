"""`qwlora generate` on an exported GGUF is what llama.cpp itself generates from the files."""

import json
from pathlib import Path
from typing import Any

import pytest

from cli.command_line import qwlora
from conftest import byte_tokenizer, tiny_model, write_recipe
from qwlora.pipeline.run import run
from qwlora.recipe import load_recipe
from qwlora.targets.weights.gguf import LlamaRuntime
from simulation.tiny_architectures import with_large_weights

PROMPT, NEW = "the integer of a scale", 300  # more than the 256 of a copy's first context


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("job")
    model: Any = with_large_weights(tiny_model("qwen3"))
    model.config.max_position_embeddings = 512
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    names = ("first", "second")
    settings = {"rank": 4, "steps": 3, "learning_rate": 0.01, "warmup_steps": 0}
    adapters = [{"name": name, **settings, "alpha": 8 + 8 * n} for n, name in enumerate(names)]
    sections = {"adapters": adapters, "export": {"targets": ["gguf"]}}
    path = write_recipe(folder, folder / "model", corpus, **sections)
    run(load_recipe(path), folder / "out", ("quantize", "train", "export"))
    return folder / "out"


def by_llama_cpp(bundle: Path, adapter: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that the bindings' own class samples greedily, by llama-cli's settings."""
    from llama_cpp_py_sync import Llama

    llama: Any = Llama(str(bundle / "base/base.gguf"), n_ctx=1024, n_threads=1, flash_attn_type=-1)
    file = str(bundle / adapter / "adapter.gguf").encode()
    loaded = llama._lib.llama_adapter_lora_init(llama._model, file)
    pointers = llama._ffi.new("struct llama_adapter_lora *[]", [loaded])
    scales = llama._ffi.new("float[]", [1.0])
    assert llama._lib.llama_set_adapters_lora(llama._ctx, pointers, 1, scales) == 0
    tokens, sample = list[int](), llama._sample_token
    monkeypatch.setattr(llama, "_sample_token", lambda: tokens.append(sample()) or tokens[-1])
    llama.generate(PROMPT, max_tokens=NEW, temperature=0.0, repeat_penalty=1.0)
    llama.close()
    return tokens


@pytest.mark.client
@pytest.mark.parametrize("adapter", ["first", "second"])
def test_an_answer_is_llama_cpps_token_by_token(
    job: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, extend = list[list[int]](), LlamaRuntime.extend

    def recorded(self: LlamaRuntime, ids: Any, past: Any) -> Any:
        read.append(ids[0].tolist())
        return extend(self, ids, past)

    monkeypatch.setattr(LlamaRuntime, "extend", recorded)
    named = ("--models", f"gguf/{adapter}", "--max-new-tokens", NEW, "--raw", "--json")
    answers = dict[str, tuple[dict[str, Any], list[int]]]()
    for option in ("", "--exact"):
        read.clear()
        done = qwlora("generate", job, PROMPT, *named, *filter(None, [option]))
        (answer,) = json.loads(done.stdout)["answers"]
        assert all(len(new) == 1 for new in read[1:])  # with the cache
        answers[option] = answer, [new[0] for new in read[1:]]
    expected = by_llama_cpp(job / "export/gguf", adapter, monkeypatch)
    answer, tokens = answers[""]
    assert tokens == expected[: answer["tokens"] - 1]
    assert answer["text"] == byte_tokenizer().decode(expected, skip_special_tokens=True)
    assert len(set(tokens)) > 5
    assert answers["--exact"][1] != tokens  # else this test could not tell them apart
