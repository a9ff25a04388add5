"""What reaches the Trainer, the command that shows it, and whole runs on records."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import decoders

from conftest import byte_tokenizer, tiny_model
from qwlora.adapter.attach import LoraShape, attach
from qwlora.adapter.train import TrainingSettings, train_adapter
from qwlora.cli.main import app
from qwlora.data.document import Completion, Conversation, Documents
from qwlora.data.prepared_data import Cutting, prepare, summary
from qwlora.data.sequences import IGNORED
from qwlora.errors import RecipeError, SourceError
from qwlora.pipeline.run import run
from qwlora.pipeline.sources import Sources
from qwlora.recipe import load_recipe

TEMPLATE = """\
{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<end>
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def conversations(count: int) -> list[dict[str, Any]]:
    """Records of one to two turns."""
    turns = [
        [
            {"role": "user", "content": f"{i}+{i}?"},
            {"role": "assistant", "content": f"it is {2 * i}"},
        ]
        for i in range(count)
    ]
    return [{"messages": turn * (1 + i % 2)} for i, turn in enumerate(turns)]


@pytest.fixture
def chat(tmp_path: Path) -> dict[str, Any]:
    """A recipe's data section."""
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, conversations(30))))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    return {
        "source": str(tmp_path / "chat.jsonl"),
        "chat_template": str(tmp_path / "template.jinja"),
        "sequence_tokens": 96,
        "evaluation_sequences": 4,
    }


@pytest.mark.usefixtures("each_loss")
def test_labels_and_positions_reach_the_model(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.chat_template = TEMPLATE
    records = [Conversation(tuple(r["messages"])) for r in conversations(12)]
    data = prepare(Documents(tuple(records[:8]), tuple(records[8:])), tokenizer, Cutting(96))
    assert data.describe()["packing"] == "documents"
    model = attach(tiny_model("llama"), LoraShape(rank=2, alpha=4.0), seed=0)
    inner_calls: list[dict[str, Any]] = []
    outer_calls: list[dict[str, Any]] = []
    for module, calls in ((model.get_base_model().model, inner_calls), (model, outer_calls)):
        module.register_forward_pre_hook(
            lambda _, args, given, calls=calls: calls.append(given), with_kwargs=True
        )
    settings = TrainingSettings(3, 1e-3, 2, 0, "constant", checkpoint_steps=5, seed=0)
    report = train_adapter(model, data.train, settings, tmp_path / "work")
    given = [g for g in inner_calls if g["input_ids"].shape[-1] == 96]
    labels = [g["labels"] for g in outer_calls if g.get("labels") is not None]
    assert len(given) == len(labels) == 3
    rows = {tuple(row.tolist()): i for i, row in enumerate(data.train.input_ids)}
    assert data.train.position_ids is not None
    for arguments, batch in zip(given, labels, strict=True):
        # with a mask, or a cache, documents would see each other
        assert arguments.get("attention_mask") is None
        assert arguments.get("past_key_values") is None
        index = [rows[tuple(row.tolist())] for row in arguments["input_ids"]]
        assert torch.equal(arguments["position_ids"], data.train.position_ids[index])
        assert torch.equal(batch, data.train.labels[index])
        spoken = tokenizer.decode(batch[0][batch[0] != IGNORED])
        assert re.fullmatch(r"(it is \d+<end>)+", spoken)
    # the first loss is the mean over loss tokens of each document alone, under the adapter that changes nothing yet
    model = tiny_model("llama")
    total, count = 0.0, 0
    for i, row in enumerate(given[0]["input_ids"]):
        starts = [*(given[0]["position_ids"][i] == 0).nonzero().flatten().tolist(), 96]
        for start, end in pairwise(starts):
            with torch.no_grad():
                logits = model(row[None, start:end], use_cache=False).logits[0]
            target = labels[0][i, start + 1 : end]
            options = {"reduction": "sum", "ignore_index": IGNORED}
            total += float(torch.nn.functional.cross_entropy(logits[:-1], target, **options))
            count += int((target != IGNORED).sum())
    assert report.losses[0] == pytest.approx(total / count, rel=1e-4)


def test_the_mask_is_shown(
    recipe_for: Any, chat: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_for(data=chat)
    app(["data", str(path)], standalone_mode=False)
    shown = capsys.readouterr().out
    assert re.search(r"\d loss tokens; held out ", shown)
    _, _, example = shown.partition("loss tokens are in ⟦ ⟧")
    assert re.search(r"<\|user\|>", example.replace(" ", ""))
    assert example.count("⟦") == len(re.findall("assistant", example.replace(" ", ""))) > 1
    options = ["--json", "--sequence", "1", "--set", "data.packing=none"]
    app(["data", str(path), *options], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert found["data"]["packing"] == "none"
    assert sum(r["tokens"] for r in found["documents"][0] if r["in_loss"]) > 0
    with pytest.raises(SourceError, match="training sequence 999 does not exist; choose one from"):
        app(["data", str(path), "--sequence", "999"], standalone_mode=False)


@pytest.mark.slow
def test_a_run_on_conversations(recipe_for: Any, chat: dict[str, Any], tmp_path: Path) -> None:
    lines: list[str] = []
    adapter = {"name": "first", "rank": 4, "steps": 12, "warmup_steps": 1, "learning_rate": 1e-2}
    recipe = recipe_for(data=chat, adapters=[{**adapter, "evaluation_steps": 6}])
    results = run(load_recipe(recipe), tmp_path / "out", say=lines.append)
    assert lines[0].startswith("data (conversations, packing documents): training ")
    assert "loss tokens; held out " in lines[0]
    data = results["data"]
    assert data == json.loads((tmp_path / "out" / "results.json").read_text())["data"]
    assert data["train"]["sequences"] < data["train"]["documents"]
    assert data["held_out"]["sequences"] == data["held_out"]["documents"]
    assert results["perplexity"]["adapted"]["first"] < results["perplexity"]["base"]
    parity = results["parity"]["onnx"]["first"]
    assert parity["perplexity"] == pytest.approx(parity["reference_perplexity"], rel=0.003)
    assert parity["tokens"] < data["held_out"]["tokens"]
    assert run(load_recipe(recipe), tmp_path / "out", say=lines.append) == results
    assert all("skipped" in line for line in lines[-9:])


def test_a_model_that_mixes_documents_is_refused(
    recipe_for: Any, chat: dict[str, Any], tmp_path: Path
) -> None:
    path, out = recipe_for("opt", data=chat), tmp_path / "out"
    message = r"OPTForCausalLM mixes documents that share a sequence .* Set data.packing to none"
    with pytest.raises(SourceError, match=message):
        run(load_recipe(path), out)
    assert not out.exists()
    results = run(load_recipe(path, ("data.packing=none",)), out, ("quantize", "train"))
    assert results["train"]["first"]["steps"] == 6


DATA_MISTAKES = {
    "data.packing=dense": "data.packing: Input should be 'join', 'documents' or 'none' (given: 'de",
    "data.chat_template=/not/there.jinja": "'/not/there.jinja' does not exist. Give a file with a J",
    "data={text_column: a, messages_column: b}": "text_column and messages_column exclude each",
    "data.source=corpus/train.jsonl": "data.source: data source 'corpus/train.jsonl' does not exist "
    "(looked for FOLDER/corpus/train.jsonl). Give a file (text, .jsonl",
}


@pytest.mark.parametrize(("change", "message"), DATA_MISTAKES.items())
def test_mistakes_in_data_are_named(recipe_for: Any, change: str, message: str) -> None:
    recipe = recipe_for()
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, (change,))
    message = message.replace("FOLDER", str(recipe.parent))
    assert any(message in problem for problem in caught.value.problems)


PAIRS = [{"prompt": f"{i}+{i}?", "completion": f"it is {2 * i}"} for i in range(30)]


@pytest.mark.parametrize(
    ("change", "kind", "first"),
    [
        ("seed=0", "completions with the chat template", "<|user|>N+N?<end>\n<|assistant|>⟦"),
        ("data.prompt_format=plain", "completions as plain text", "N+N?⟦it is"),
        ("data.chat_template=null", "completions as plain text", "N+N?⟦it is"),
    ],
)
def test_the_preview_says_how_pairs_are_rendered(
    recipe_for: Any,
    chat: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    change: str,
    kind: str,
    first: str,
) -> None:
    Path(chat["source"]).write_text("\n".join(map(json.dumps, PAIRS)))
    app(["data", str(recipe_for(data=chat)), "--set", change], standalone_mode=False)
    heading, _, example = capsys.readouterr().out.partition("loss tokens are in ⟦ ⟧")
    assert heading.startswith(f"data ({kind}, packing documents): training ")
    text = example.replace(" ", "").translate({ord("Ġ"): " ", ord("Ċ"): "\n"})
    assert first in re.sub(r"\d+", "N", text)


@pytest.mark.parametrize("prompt_format", ["auto", "plain"])
def test_the_data_line_says_how_pairs_are_rendered(prompt_format: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"pad_token": "<later>"})  # than the model's embedding
    pairs = tuple(Completion(**pair) for pair in PAIRS)
    documents = Documents(pairs[:20], pairs[20:21])
    prepared = prepare(documents, tokenizer, Cutting(96, prompt_format=prompt_format))
    description = prepared.describe()
    assert description["chat_template"] is (prompt_format == "auto")
    how = "with the chat template" if prompt_format == "auto" else "as plain text"
    assert summary(description).startswith(f"data (completions {how}, packing documents): ")
    assert "training 20 documents, " in summary(description)
    assert "held out 1 document, " in summary(description)
    assert prepared.train_counts.padding_tokens
    assert prepared.largest_id() < tokenizer.pad_token_id


def test_the_prompt_format_is_an_input_of_pairs_only(recipe_for: Any, chat: dict[str, Any]) -> None:
    def inputs(*changes: str) -> dict[str, Any]:
        recipe = load_recipe(recipe_for(data=chat), changes)
        return Sources(recipe).text(recipe.data)

    assert inputs() == inputs("data.prompt_format=plain")
    Path(chat["source"]).write_text("\n".join(map(json.dumps, PAIRS)))
    assert inputs() != inputs("data.prompt_format=plain")
