"""The tokenizer of a GGUF file, made from a model's tokenizer.json.

llama.cpp has two kinds, both byte-pair encodings:

    gpt2     tokens spell bytes (Llama 3, Qwen, SmolLM, Phi-4): merges, and `pre`, which names how
             text is split into words first
    llama    tokens spell text, other characters are tokens of one byte (Llama 2, Mistral, Gemma,
             Phi-3; by SentencePiece): each token has a score, the best pair is merged first

`pre` is found by what the splitting does: a tokenizer that splits `PROBE` as a `pre` of llama.cpp
does has that one. llama.cpp's converter compares a hash of the tokens of a text instead, which
recognizes only published vocabularies, and names the same splits.

A score is minus the place of the first merge that makes the token: transformers makes merges from
SentencePiece's scores, all splits of a token in a row. Where a text begins with a space or follows
a special token, llama.cpp adds one more space, as SentencePiece does and transformers does not.

Source: `llama-vocab.cpp` of llama.cpp (b11739).
"""

from __future__ import annotations

import json
import re
import tempfile
from typing import Any

from tokenizers import Regex, pre_tokenizers

from qwlora.errors import ExportError
from qwlora.system.optional_packages import require

gguf = require("gguf", "gguf")
PROBE = (
    "Don't we'LL  see\n\n  HTTPServer at https://a.b/c?d=1;\n\tx += 12345678 // 3.50 \r\n"
    "naïve Ärger, straße; İstanbul कि 東京タワー 2024年 ½ ٣٤ 🙂🙂 --- ...!!\n/\n 'quoted' end   "
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = rf"{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATHS = _SIGNS.replace(r"\n]*", r"\n/]*")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAPITAL, _CAPITALS = (  # words that end where a capital follows
    rf"[^\r\n\p{{L}}\p{{N}}]?{word}" for word in (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")
)
_SPLITS = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "qwen2": (rf"{_WORD}|\p{{N}}|{_SIGNS}",),
    "llama-bpe": (rf"{_WORD}|\p{{N}}{{1,3}}|{_SIGNS}",),
    "tekken": (rf"{_CAPITAL}|{_CAPITALS}|\p{{N}}|{_PATHS}",),
    "gpt-4o": (rf"{_CAPITAL}{_ENDING}?|{_CAPITALS}{_ENDING}?|\p{{N}}{{1,3}}|{_PATHS}",),
}
"""What each `pre` of llama.cpp splits text by, one expression after the other."""
_CONTROL = re.compile(
    r"<\|.*\|>|<\uff5c.*\uff5c>|<unused\d+>|<pad>|<mask>|<2mass>|\[@BOS@\]"
)  # in llama.cpp, special or not


def add_tokenizer(writer: Any, tokenizer: Any, config: Any) -> None:
    """Add a tokenizer to a writer, with a token for each of the `config.vocab_size` embeddings."""
    kind, pre = check_tokenizer(tokenizer)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = _tokens(content, config.vocab_size)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)
        special = gguf.SpecialVocab(folder, kind == "gpt2", n_vocab=config.vocab_size)
    if kind == "gpt2":
        special.merges = special.merges or ["! !"]  # llama.cpp wants one; this makes no token
    else:
        merges, ranks = content["model"]["merges"], dict[str, int]()
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
        writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0] != "a")
    ids, ends = tokenizer("a").input_ids, (tokenizer.bos_token_id, tokenizer.eos_token_id)
    special.add_special_token = {"bos": ids[0] == ends[0], "eos": ids[-1] == ends[1]}
    special.add_to_gguf(writer, quiet=True)


def check_tokenizer(tokenizer: Any) -> tuple[str, str]:
    """The kind of a tokenizer, and its `pre`.

    Raises:
        ExportError: there is none, or llama.cpp has none that does the same.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            "the model has no tokenizer.json, which GGUF files are made from. Add one to the "
            "model's folder, or use a GGUF file as the source (tokenizer or gguf_file in Python)"
        )
    content = json.loads(backend.to_str())
    model, normalizer, splitting = content["model"], backend.normalizer, backend.pre_tokenizer
    text = PROBE if normalizer is None else normalizer.normalize_str(PROBE)
    if model["type"] != "BPE" or text.replace("\u2581", " ").strip() != PROBE.strip():
        raise ExportError(
            "llama.cpp supports only BPE tokenizers without normalization, and this one is "
            f"{model['type']} with the normalizer {content['normalizer']}; use another target"
        )
    if model.get("byte_fallback"):
        return "llama", "default"
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = None if splitting is None else splitting.pre_tokenize_str(PROBE)
    for name, patterns in _SPLITS.items():
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        if pieces == pre_tokenizers.Sequence([*splits, spelling]).pre_tokenize_str(PROBE):
            # llama-bpe takes words that are tokens as they are, smaug-bpe merges these too
            is_smaug = name == "llama-bpe" and not model.get("ignore_merges")
            return "gpt2", "smaug-bpe" if is_smaug else name
    raise ExportError(
        f"the model's tokenizer splits text as none of {', '.join(_SPLITS)} of llama.cpp does: "
        f"{content['pre_tokenizer']}. Give a GGUF file as the model's source, or use another target"
    )


def _tokens(content: dict[str, Any], count: int) -> tuple[list[str], list[int]]:
    """The text and type of each token; embeddings without a token are unused."""
    model, tokens = content["model"], [f"[PAD{i}]" for i in range(count)]
    types = [gguf.TokenType.UNUSED] * count
    for text, i in model["vocab"].items():
        if i < count:
            is_byte = model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", text)
            tokens[i], types[i] = text, gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL
    for token in content["added_tokens"]:
        i, text = token["id"], token["content"]
        if i < count and (token["special"] or _CONTROL.fullmatch(text)):
            is_unknown = text == model.get("unk_token")
            tokens[i] = text
            types[i] = gguf.TokenType.UNKNOWN if is_unknown else gguf.TokenType.CONTROL
        elif i < count:
            shown = text.replace("\u2581", " ") if model.get("byte_fallback") else text
            tokens[i], types[i] = shown, gguf.TokenType.USER_DEFINED
    return tokens, types
