"""Tokenizers in GGUF files: what is written, and how llama.cpp splits text with them."""

from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gguf
import pytest
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, PreTrainedTokenizerFast

from qwlora.errors import ExportError, QwloraWarning
from qwlora.targets.weights.gguf_metadata import PROBE, add_metadata, add_tokenizer

TEXT = topics["strings"] + topics["numbers"] + PROBE
TEXTS = (PROBE, "Hello world", "def f(x):\n    return x ** 2  # 12345\n\n\n", "We'LL Ä́ ½x ٣٤٥", "x")
# as in the tokenizer.json files of published models
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS, BYTES = (pre_tokenizers.ByteLevel(False, use_regex=words) for words in (True, False))
SPLITS: dict[str, list[Any]] = {
    "gpt-2": [WORDS],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), WORDS],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN), "isolated"), BYTES],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES],
    "smaug-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES],
    "tekken": [pre_tokenizers.Split(Regex(TEKKEN), "isolated"), BYTES],
}


@cache
def spelling_bytes(pre: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[pre])
    special = ["<|begin|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings: Any = {"initial_alphabet": alphabet, "special_tokens": special}
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, **settings)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens(["<tool>"])
    single = {"single": "<|begin|> $A", "special_tokens": [("<|begin|>", 0)]}
    tokenizer.post_processor = TemplateProcessing(**single)
    names = {"bos_token": special[0], "eos_token": special[1]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@cache
def spelling_text() -> PreTrainedTokenizerFast:
    """A tokenizer as transformers makes them from SentencePiece: bytes for characters that have no
    token, and as merges all splits of each token into two, in the order of tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False)
    trained.train_from_iterator([topics["strings"]], trainer)
    ordered = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += [piece for piece, _ in ordered]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:i], piece[i:])
        for piece, _ in ordered
        for i in range(1, len(piece))
        if piece[:i] in vocabulary and piece[i:] in vocabulary
    ]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def dropping_spaces() -> PreTrainedTokenizerFast:
    """A tokenizer like that of Phi-3, which drops white space after its special tokens."""
    tokenizer = Tokenizer.from_str(spelling_text().backend_tokenizer.to_str())
    prepend, replace = normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer, tokenizer.normalizer = None, normalizers.Sequence([prepend, replace])
    special = {"<|endoftext|>": False, "</s>": True, "<|user|>": True, "<|end|>": True}
    tokenizer.add_special_tokens(
        [AddedToken(name, rstrip=drops, normalized=False) for name, drops in special.items()]
    )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def write(tokenizer: Any, path: Path, rows: int = 620) -> Path:
    """A file that has a tokenizer, and no tensors."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, vocab_size=rows)
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, config)
    add_tokenizer(writer, tokenizer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def stored(path: Path) -> dict[str, Any]:
    prefix = "tokenizer.ggml."
    fields = gguf.GGUFReader(path).fields
    return {k.removeprefix(prefix): v.contents() for k, v in fields.items() if prefix in k}


@pytest.mark.parametrize("pre", SPLITS)
def test_the_splits_have_the_name_that_llama_cpp_gives_them(pre: str, tmp_path: Path) -> None:
    tokenizer = spelling_bytes(pre)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    file = write(tokenizer, tmp_path / "vocabulary.gguf")
    found = stored(file)
    assert (found["model"], found["pre"]) == ("gpt2", pre)
    assert (found["bos_token_id"], found["eos_token_id"]) == (0, 1)
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, False)
    vocabulary = tokenizer.get_vocab()
    assert all(found["tokens"][i] == token for token, i in vocabulary.items())
    kinds = dict(zip(found["tokens"], map(TokenType, found["token_type"]), strict=True))
    expected = {"<|end|>": "CONTROL", "<tool>": "USER_DEFINED", "[PAD619]": "UNUSED", "a": "NORMAL"}
    assert {token: kinds[token].name for token in expected} == expected
    left, right = found["merges"][0].split(" ")
    assert left + right in vocabulary
    template = gguf.GGUFReader(file).fields["tokenizer.chat_template"].contents()
    assert template == tokenizer.chat_template


def test_pieces_have_the_order_of_their_merges(tmp_path: Path) -> None:
    found = stored(write(spelling_text(), tmp_path / "vocabulary.gguf", 700))
    assert (found["model"], found["add_space_prefix"]) == ("llama", True)
    kinds = [TokenType(found["token_type"][i]).name for i in (0, 1, 3)]
    assert kinds == ["UNKNOWN", "CONTROL", "BYTE"]
    merged = [i for i, token in enumerate(found["tokens"]) if 258 < i < 759 and len(token) > 1]
    scores = [found["scores"][i] for i in merged if not found["tokens"][i].startswith("[PAD")]
    assert scores == sorted(set(scores), reverse=True)


def changed(**parts: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(spelling_bytes("gpt-2").backend_tokenizer.to_str())
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "problem"),
    [
        (None, "has no tokenizer.json"),
        (PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram())), "Unigram"),
        (changed(normalizer=normalizers.Lowercase()), "Lowercase"),
        (changed(pre_tokenizer=pre_tokenizers.Whitespace()), "Whitespace.*another target"),
    ],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(
    tokenizer: Any, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=problem):
        write(tokenizer, tmp_path / "vocabulary.gguf")


@pytest.mark.parametrize("key", ["lstrip", "rstrip", "single_word", "chat template"])
def test_spaces_that_llama_cpp_treats_otherwise_are_a_warning(key: str, tmp_path: Path) -> None:
    is_text = key == "chat template"
    plain = spelling_text() if is_text else spelling_bytes("gpt-2")
    tokenizer = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken("<|user|>", **({} if is_text else {key: True}))])
    tokenizer.post_processor = None
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="a" * is_text)
    with pytest.warns(QwloraWarning, match=r"spaces next to .*<\|user\|>"):
        write(whole, tmp_path / "vocabulary.gguf")


@pytest.mark.client
@pytest.mark.parametrize("kind", [*SPLITS, "text", "phi-3"])
def test_llama_cpp_splits_text_the_same(kind: str, tmp_path: Path) -> None:
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    others = {"text": spelling_text, "phi-3": dropping_spaces}
    tokenizer = others[kind]() if kind in others else spelling_bytes(kind)
    llama, ffi = get_lib(), get_ffi()
    parameters = llama.llama_model_default_params()
    parameters.vocab_only = True
    file = str(write(tokenizer, tmp_path / "vocabulary.gguf", 800)).encode()
    model = llama.llama_model_load_from_file(file, parameters)
    assert model != ffi.NULL
    for text in (*TEXTS, "<|user|>\nHello<|end|>\n<|user|> x")[: None if kind == "phi-3" else -1]:
        content, ids = text.encode(), ffi.new("int32_t[]", 2000)
        vocabulary = llama.llama_model_get_vocab(model)
        count = llama.llama_tokenize(
            vocabulary, content, len(content), ids, 2000, True, kind == "phi-3"
        )
        assert list(ids[0:count]) == tokenizer(text).input_ids
    llama.llama_model_free(model)
