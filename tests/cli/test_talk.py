"""`qwlora generate` and `qwlora chat`: every stage answers as transformers' own generate does."""

import io
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli.command_line import answered, qwlora, refused
from conftest import byte_tokenizer, tiny_model, write_recipe
from qwlora.analysis.generate_text import Answer
from qwlora.pipeline.commands.open_job import JobModels, ModelName, evaluate_tasks
from qwlora.pipeline.run import run
from qwlora.recipe import load_recipe
from qwlora.targets.onnx.onnx_runtime import OnnxModel
from qwlora.targets.registry import TARGETS
from qwlora.targets.weights.hf import Hf
from targets.proof.toy_runtime import TableRuntime

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"
pytestmark = pytest.mark.usefixtures("shared_captures")
PROMPT = "the integer"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A finished job with an adapter that changes answers; its recipe has a second, untrained one."""
    folder = tmp_path_factory.mktemp("talk")
    tiny_model("llama", layers=1).save_pretrained(folder / "model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    first = {"name": "first", "rank": 4, "steps": 3, "learning_rate": 0.05, "warmup_steps": 0}
    sections = {"adapters": [first], "export": {"targets": ["onnx", "hf"]}}
    path = write_recipe(folder, folder / "model", corpus, **sections)
    run(load_recipe(path), folder / "out", ("quantize", "train", "calibrate", "export"))
    content = yaml.safe_load(path.read_text())
    content["adapters"].append({"name": "second", "steps": 1, "warmup_steps": 0})
    (folder / "out" / "recipe.yaml").write_text(json.dumps(content))
    return folder / "out"


def expected(job: Path, stage: str, prompt: str, count: int = 8) -> str:
    """The likeliest tokens, each from a pass over the whole text by plain transformers and PEFT."""
    folder = job.parent / "model" if stage == "float" else job / "base"
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    if stage == "adapted":
        model = PeftModel.from_pretrained(model, job / "adapters" / "first")
    tokenizer = AutoTokenizer.from_pretrained(job.parent / "model")
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model.eval()(ids).logits[:, -1:].argmax(-1)], 1)
            if int(ids[0, -1]) == tokenizer.eos_token_id:
                break
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


def chat_text(*turns: str) -> str:
    """The turns as the template renders them, users first."""
    roles = itertools.cycle(("user", "assistant"))
    return "".join(f"<{next(roles)}>{turn}\n" for turn in turns) + "<assistant>"


@pytest.mark.parametrize("stage", ["float", "base", "adapted"])
def test_each_stage_answers_as_plain_transformers_does(job: Path, stage: str) -> None:
    options = ("generate", job, PROMPT, "--models", stage, "--max-new-tokens", 8, "--exact")
    done = qwlora(*options)
    assert done.stdout == expected(job, stage, chat_text(PROMPT)) + "\n"
    assert "8 tokens: the first after" in done.stderr
    assert answered(*options, "--raw") == expected(job, stage, PROMPT) + "\n"


def test_sampled_answers_follow_the_seed(job: Path) -> None:
    sampled = ("generate", job, PROMPT, "--max-new-tokens", 8, "--temperature", 2, "--seed")
    one, again, other = (answered(*sampled, seed) for seed in (1, 1, 2))
    assert one == again != other


RUNTIMES = {
    (): "hf/first",
    ("--models", "base"): "hf/base",
    ("--models", "second,simulated"): "has no adapters/second yet",
    ("--models", "simulated/first"): "simulated/first in PyTorch",
    ("--exact",): "adapted/first in PyTorch",
    ("--device", "cpu"): "adapted/first in PyTorch",
    ("--runtime", "torch"): "adapted/first in PyTorch",
    ("--runtime", "vllm", "--exact"): "hf/first",
    ("--runtime", "onnx", "--models", "base"): "onnx/base",
    ("--runtime", "onyx"): "'onyx' is unknown; did you mean onnx?",
    ("--runtime", "gguf"): "is not exported to gguf",
    ("--runtime", "hf", "--models", "float"): "only for the base and adapters",
}


@pytest.mark.parametrize("options", RUNTIMES, ids=" ".join)
def test_the_fastest_runtime_of_the_job_answers(job: Path, options: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("qwlora.pipeline.commands.open_job.FASTEST", ("gguf", "hf"))
    said = qwlora("generate", job, PROMPT, "--max-new-tokens", 1, *options).stderr
    assert RUNTIMES[options] in said.splitlines()[0]


def test_files_that_are_outdated_or_cannot_run_do_not_answer(job: Path, monkeypatch: Any) -> None:
    first, hf = ModelName("adapted", "first"), ("hf",)
    monkeypatch.setattr("qwlora.pipeline.commands.open_job.FASTEST", hf)
    assert JobModels(job).fastest(first, None) == ModelName("hf", "first")
    assert JobModels(job, ("export.embedding_bits=32",)).fastest(first, None) == first
    monkeypatch.setitem(TARGETS, "hf", replace(TARGETS["hf"], packages=("nowhere",)))
    assert JobModels(job).fastest(first, None) == first


def test_simulation_and_exported_files_answer_alike_and_base_differs(job, monkeypatch) -> None:
    extended = mock.Mock(side_effect=OnnxModel.extend)
    monkeypatch.setattr(OnnxModel, "extend", lambda *arguments: extended(*arguments))
    names = "base,first,simulated/first,onnx/first,hf/first,hf/base"
    options = ("generate", job, PROMPT, "--models", names, "--max-new-tokens", 6, "--exact")
    answers = {a["model"]: a for a in json.loads(answered(*options, "--json"))["answers"]}
    assert [*answers] == names.replace("first", "adapted/first", 1).split(",")
    assert answers["base"]["text"] == answers["hf/base"]["text"] != answers["hf/first"]["text"]
    assert answers["simulated/first"]["text"] == answers["onnx/first"]["text"]
    assert answers["adapted/first"]["text"] == answers["hf/first"]["text"]
    assert answers["adapted/first"]["text"] == expected(job, "adapted", chat_text(PROMPT), 6)
    prompt, *steps = (call.args[1].shape[1] for call in extended.call_args_list)
    assert prompt > 1
    assert steps == [1] * 5  # with the cache that the files have


def chat(job: Path, typed: str, *options: object) -> subprocess.CompletedProcess[str]:
    """A conversation in which `typed` is the standard input."""
    with mock.patch("sys.stdin", io.StringIO(typed)):
        return qwlora("chat", job, *options)


@pytest.mark.parametrize("raw", [(), ("--raw",)])
def test_a_conversation_keeps_its_turns_until_it_is_reset(job: Path, raw: tuple[str, ...]) -> None:
    typed = "hello\n\nand now\n/reset\nhello\n/exit\nnever read\n"
    done = chat(job, typed, "--exact", "--max-new-tokens", 6, *raw)
    start = "hello" if raw else chat_text("hello")
    first = expected(job, "adapted", start, 6)
    more = f"hello{first}\nand now" if raw else chat_text("hello", first, "and now")
    second = expected(job, "adapted", more, 6)
    assert (done.returncode, done.stdout) == (0, f"{first}\n{second}\n{first}\n")


def test_an_answer_ends_at_the_last_position(job: Path) -> None:
    generate = ("generate", job, "a" * 120)
    assert "8 tokens" in qwlora(*generate, "--raw", "--max-new-tokens", 50).stderr
    said = refused("generate", job, "a" * 128, "--raw")
    assert "the prompt has 128 tokens, but the model has positions for 128" in said


@pytest.mark.parametrize(
    ("option", "way", "how"),
    [((), "open_shipped", "as shipped"), (("--exact",), "open", "a float32 copy")],
)
def test_exported_files_run_as_shipped_unless_exact(job, option, way, how, monkeypatch) -> None:
    """The files that run are named before they answer."""
    opened = mock.Mock(return_value=TableRuntime({"": torch.eye(300)}))
    for name in ("open", "open_shipped"):
        monkeypatch.setattr(Hf, name, lambda *_, name=name: opened(name))
    monkeypatch.setattr(TableRuntime, "switch_to", lambda *_: None)
    monkeypatch.setitem(TARGETS, "hf", replace(TARGETS["hf"], exact="a float32 copy"))
    done = qwlora("generate", job, PROMPT, "--models", "hf", "--max-new-tokens", 1, *option)
    files = r"transformers \(compressed-tensors [\d.]+\), hf/base with hf/first"
    assert re.match(rf"loading hf/first, {how}: {files}", done.stderr)
    opened.assert_called_once_with(way)


def test_scores_are_of_exact_models_and_of_files_as_shipped(job, monkeypatch) -> None:
    opened, harness = list[tuple[str, bool]](), "qwlora.analysis.task_harness"
    monkeypatch.setattr(
        JobModels, "open", lambda _, name, exact=False: opened.append((str(name), exact))
    )
    monkeypatch.setattr(f"{harness}.load_tasks", lambda _: {})
    monkeypatch.setattr(f"{harness}.score_tasks", lambda *_: {})
    evaluate_tasks(job, "t", "base,onnx/first,hf/first")
    assert opened == [("base", True), ("onnx/first", False), ("hf/first", False)]


UNKNOWN = {
    "base,frist": "no model or adapter is called 'frist'.*did you mean first",
    "second": "has no adapters/second yet.*qwlora train /",
    "onnx/second": "no adapters/second, export/onnx/second.*qwlora train /.*&& qwlora export /",
    "gguf": "not exported to gguf: export.targets of i.*onnx, hf",
    ",": "name a model",
}


@pytest.mark.parametrize("names", UNKNOWN)
def test_refuses_unknown_names(job: Path, names: str) -> None:
    said = refused("generate", job, PROMPT, "--models", names)
    assert re.fullmatch(f".*{UNKNOWN[names]}.*\n", said)


def test_text_that_is_not_utf8_is_refused(job: Path) -> None:
    for raw in ((), ("--raw",)):
        asked = refused("generate", job, "caf\udce9", "--models", "base", *raw)
        said = chat(job, "hi\udcff\n", "--model", "base", *raw)
        assert (said.returncode, said.stdout) == (2, "")
        assert re.search(
            r"not UTF-8 .*position 3:(?s:.*)not UTF-8 .*position 2:", asked + said.stderr
        )


def test_control_characters_are_escaped(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(model: Any, tokenizer: Any, ids: Any, sampling: Any, write: Any) -> Answer:
        write("\x1b]52;c;aGk=\x07 done")
        return Answer("\x1b]52;c;aGk=\x07 done", 1, 0.1, 0.1)

    monkeypatch.setattr("qwlora.analysis.generate_text.generate_text", answer)
    options = ("generate", job, PROMPT, "--models", "base")
    out = answered(*options, "--json")
    assert json.loads(out)["answers"][0]["text"] == "\x1b]52;c;aGk=\x07 done"
    for shown in (answered(*options), chat(job, "hi", "--model", "base").stdout):
        assert shown == "\\x1b]52;c;aGk=\\x07 done\n"


def test_a_folder_that_is_no_job_or_has_no_base_is_refused(job: Path, tmp_path: Path) -> None:
    assert "is not a job directory" in refused("chat", tmp_path)
    shutil.copy(job / "recipe.yaml", tmp_path)
    message = "has no base, adapters/first yet. Run first: qwlora quantize .* && qwlora train "
    assert re.search(message, refused("generate", tmp_path, PROMPT))


def test_a_use_case_is_found_by_its_own_name(job: Path, tmp_path: Path) -> None:
    """Use cases share a folder, export/qairt."""
    shutil.copytree(job / "base", tmp_path / "base")
    for part in ("adapters/first", "adapters/second"):
        (tmp_path / part).mkdir(parents=True)
    recipe = json.loads((job / "recipe.yaml").read_text())
    recipe["export"] = {"targets": ["qairt"], "use_cases": ["first+second", "none"]}
    recipe["simulation"] = {"residual_adds": "quantize"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    generate = ("generate", tmp_path, PROMPT, "--models")
    assert "has no export/qairt yet" in refused(*generate, "qairt/none")
    (tmp_path / "export" / "qairt").mkdir(parents=True)
    assert "has no use case 'second'" in refused(*generate, "qairt/second")
    models = JobModels(tmp_path)
    for model, adapters in (("qairt", ["first", "second"]), ("qairt/none", [])):
        name = models.one_named(model)
        models.check(name)
        assert (name.made_by, name.adapters) == ("export/qairt", adapters)
        assert models.tokenizer(name).chat_template == TEMPLATE


@pytest.mark.slow
def test_control_c_ends_an_answer_and_the_conversation_continues(job: Path) -> None:
    command = [sys.executable, "-m", "qwlora", "chat", str(job), "--exact"]
    with subprocess.Popen(
        [*command, "--max-new-tokens", "5000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"hello\n")
        process.stdout.read(1)  # the first piece of the answer
        process.send_signal(signal.SIGINT)
        process.stdin.write(b"hello again\n/exit\n")
        process.stdin.close()
        answers = process.stdout.read()
        assert process.wait(60) == 0
    assert b"\n" in answers.strip()
    assert len(answers) < 4000, "the answer was not ended"
