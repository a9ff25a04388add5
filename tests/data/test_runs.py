"""What reaches the Trainer, the command that shows it, and whole runs on records."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from tokenizers import decoders

from cli.command_line import answered, qwlora, refused
from conftest import byte_tokenizer, tiny_model
from qwlora.adapter.attach import LoraShape, attach
from qwlora.adapter.train import TrainingSettings, train_adapter
from qwlora.data.document import Completion, Conversation, Documents
from qwlora.data.prepared_data import Cutting, prepare_text
from qwlora.data.tokenization import encode_documents
from qwlora.errors import SourceError
from qwlora.pipeline.run import run
from qwlora.recipe import load_recipe

TEMPLATE = """\
{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<end>
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def conversations(count: int) -> list[dict[str, Any]]:
    """Records of one to two turns."""
    user = [{"role": "user", "content": f"{i}+{i}?"} for i in range(count)]
    assistant = [{"role": "assistant", "content": f"it is {2 * i}"} for i in range(count)]
    turns = zip(user, assistant, strict=True)
    return [{"messages": [*turn] * (1 + i % 2)} for i, turn in enumerate(turns)]


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
    """The first loss is the mean over the loss tokens of each document alone, under the adapter that
    changes nothing yet."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.chat_template = TEMPLATE
    records = [Conversation(tuple(r["messages"])) for r in conversations(12)]
    data = prepare_text(Documents(tuple(records[:8]), tuple(records[8:])), tokenizer, Cutting(96))
    assert data.describe()["packing"] == "documents"
    plain, total, count = tiny_model("llama"), 0.0, 0
    for tokens in encode_documents(records[:8], tokenizer):
        ids, in_loss = torch.tensor(tokens.ids), torch.tensor(tokens.in_loss)
        assert re.fullmatch(r"(it is \d+<end>)+", tokenizer.decode(ids[in_loss]))
        with torch.no_grad():
            logits = plain(ids[None], use_cache=False).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total += float(losses[in_loss[1:]].sum())
        count += int(in_loss[1:].sum())
    model = attach(tiny_model("llama"), LoraShape(rank=2, alpha=4.0), seed=0)
    rows = len(data.train)
    assert 1 < rows < 8
    settings = TrainingSettings(1, 1e-3, rows, 0, "constant", checkpoint_steps=5, seed=0)
    report = train_adapter(model, data.train, settings, tmp_path / "work")
    assert report.losses[0] == pytest.approx(total / count, rel=1e-4)


def test_the_mask_is_shown(recipe_for: Any, chat: dict[str, Any]) -> None:
    path = recipe_for(data=chat)
    shown, _, example = answered("data", path).partition("loss tokens are in ⟦ ⟧")
    assert re.search(r"\d loss tokens; held out ", shown)
    assert example.count("⟦") == len(re.findall("assistant", example.replace(" ", ""))) > 1
    options = ("--json", "--sequence", "1", "--set", "data.packing=none")
    found = json.loads(answered("data", path, *options))
    assert found["data"]["packing"] == "none"
    assert sum(r["tokens"] for r in found["documents"][0] if r["in_loss"]) > 0
    assert "sequence 999 does not exist" in refused("data", path, "--sequence", "999")


@pytest.mark.slow
def test_a_run_on_conversations(recipe_for: Any, chat: dict[str, Any], tmp_path: Path) -> None:
    adapter = {"name": "first", "rank": 4, "steps": 12, "warmup_steps": 1, "learning_rate": 1e-2}
    recipe = recipe_for(data=chat, adapters=[{**adapter, "evaluation_steps": 6}])
    results = run(load_recipe(recipe), tmp_path / "out")
    data = results["data"]
    assert data == json.loads((tmp_path / "out" / "results.json").read_text())["data"]
    assert data["train"]["sequences"] < data["train"]["documents"]
    assert data["held_out"]["sequences"] == data["held_out"]["documents"]
    assert results["perplexity"]["adapted"]["first"] < results["perplexity"]["base"]
    parity = results["parity"]["onnx"]["first"]
    assert parity["perplexity"] == pytest.approx(parity["reference_perplexity"], rel=0.003)
    assert parity["tokens"] < data["held_out"]["tokens"]


@pytest.mark.parametrize(
    ("change", "kind"),
    [("seed=0", "with the chat template"), ("data.prompt_format=plain", "as plain text")],
)
def test_the_preview_says_how_pairs_are_rendered(recipe_for, chat, change, kind) -> None:
    pairs = [{"prompt": f"{i}+{i}?", "completion": f"it is {2 * i}"} for i in range(30)]
    Path(chat["source"]).write_text("\n".join(map(json.dumps, pairs)))
    shown = answered("data", recipe_for(data=chat), "--set", change)
    assert shown.startswith(f"data (completions {kind}, packing documents): training ")


def test_padding_is_no_token_of_the_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<later>"})  # than the model's embedding
    prepared = prepare_text(Documents(some_long(0), some_long(0)[:1]), tokenizer, Cutting(16))
    assert prepared.train_counts.padding_tokens
    assert prepared.largest_id() < tokenizer.pad_token_id


def some_long(long: int) -> tuple[Completion, ...]:
    """40 pairs of 9 tokens; `long` ones have 20 more, before their answer."""
    asked = ["?" * (22 if number < long else 2) for number in range(40)]
    return tuple(Completion(prompt, "answer") for prompt in asked)


def test_lost_data_is_announced_and_most_of_it_refused() -> None:
    def prepared(long: int, **cutting: Any) -> Any:
        documents = Documents(some_long(long), some_long(1), repeated_shares=(0.0, 0.06))
        return prepare_text(documents, byte_tokenizer(), Cutting(16, **cutting))

    repeated = "6% of the held-out text was removed, because the training text contains it"
    kept = prepared(0).cautions()
    assert [caution.partition(" (")[0] for caution in kept] == [repeated, ANY]
    cut = "45% of the training tokens were dropped: 8 of 40 documents are longer than 16 tokens"
    assert prepared(8).cautions()[0].startswith(f"{cut}, and 8 have no loss token")
    with pytest.raises(SourceError, match=r"6\d% of the training .* data.most_lost above 0.5"):
        prepared(16)
    assert prepared(16, most_lost=0.8).train_counts.sequences == 24
    nothing_lost = Documents(some_long(0), some_long(0))
    assert prepare_text(nothing_lost, byte_tokenizer(), Cutting(16)).cautions() == []
    unused = replace(nothing_lost, unused_columns=("input",))
    (caution,) = prepare_text(unused, byte_tokenizer(), Cutting(16)).cautions()
    assert "column input of the records is not used (data.instruction_column" in caution


@pytest.mark.parametrize("command", ["data", "check"])
def test_commands_on_a_recipe_show_what_is_lost(recipe_for, chat, command) -> None:
    recipe = recipe_for(data=chat | {"sequence_tokens": 60})
    shown = qwlora(command, recipe).stderr
    assert re.search(r"caution: (data of first: )?\d+% of the training tokens", shown)
    assert "data.most_lost" in refused(command, recipe, "--set", "data.most_lost=0.0")
