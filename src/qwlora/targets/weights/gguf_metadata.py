"""What a GGUF file says about a model: tensor names, sizes, rotary positions, attention, tokenizer.

llama.cpp reads these under the keys of the `gguf` package. The rest of an architecture is fixed in
its code (activation, attention scale, layers without positions); `check_config` compares that with
the configuration, so that nothing is computed differently.

    rope_type     stored as
    linear        rope.scaling.type, .factor
    yarn          the same, and .original_context_length
    llama3        rope_freqs.weight: what each frequency is divided by
    longrope      rope_factors_long.weight, rope_factors_short.weight, rope.scaling.attn_factor

Where the tensors of a Hugging Face model are in a GGUF file:

    model.layers.N.self_attn.q_proj.weight  ->  blk.N.attn_q.weight, and the stored row of each row

Names are those of the `gguf` package. Rows of q and k in `llama` and `smollm3`:

    row i of a head, i < d/2  ->  2 i            row d/2 + i  ->  2 i + 1

The tokenizer is made from a model's tokenizer.json. llama.cpp has two kinds, both byte-pair
encodings:

    gpt2     tokens spell bytes (Llama 3, Qwen, SmolLM, Phi-4): merges, and `pre`, which names how
             text is split into words first
    llama    tokens spell text, other characters are tokens of one byte (Llama 2, Mistral, Gemma,
             Phi-3; by SentencePiece): each token has a score, the best pair is merged first

Source: `src/models/` and `llama-vocab.cpp` of llama.cpp (b11739).
"""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from typing import Any

import torch
from jaxtyping import Int64
from tokenizers import Regex, pre_tokenizers
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwlora.errors import ExportError, QwloraWarning, listed
from qwlora.formats.gguf.gguf_checkpoint import LARGEST
from qwlora.formats.gguf.gguf_file import GgufFile
from qwlora.system.optional_packages import require
from qwlora.targets.weights.weights_folder import rotations, warn_of_window

gguf = require("gguf", "gguf")
# what the writer of GGUF calls the settings of transformers
_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "head_count": "num_attention_heads",
    "head_count_kv": "num_key_value_heads",
    "layer_norm_rms_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_UNBIASED = {"attention_bias": False, "mlp_bias": False}
_OTHERS = {"hidden_act": "silu", **_UNBIASED}
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "use_bidirectional_attention": None,
    **_UNBIASED,
}
# Settings that llama.cpp has in its code: a file cannot say another value.
_FIXED: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu"},
    "gemma2": {**_GEMMA, "tie_word_embeddings": True},
    "gemma3": {**_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None},
}
_ROPE = "type rope_type rope_theta partial_rotary_factor factor original_max_position_embeddings"
# by rope_type, what else than `_ROPE` llama.cpp has room for
_ROTATIONS = {
    "default": (),
    "linear": (),
    "yarn": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "longrope": ("attention_factor", "long_factor", "short_factor"),
}
_ONLY_IN = {"llama3": "llama", "longrope": "phi3"}  # rope_types of one architecture


def check_config(config: Any) -> None:
    """Raise an ExportError if llama.cpp does not support a model or would compute it
    differently."""
    model_type = config.model_type
    if (kind := ARCHITECTURES.get(model_type)) is None:
        raise ExportError(
            f"GGUF export supports {listed(ARCHITECTURES, 9)}, but this model is {model_type}. Use "
            "a GGUF file of the model as model.source"
        )
    layers = config.num_hidden_layers
    fixed, problems = {**_FIXED.get(kind, _OTHERS)}, []
    # The largest model of each Gemma has another attention scale, and llama.cpp knows it by its
    # number of layers alone.
    if kind in LARGEST:
        width = config.hidden_size // config.num_attention_heads
        fixed["query_pre_attn_scalar"] = width if layers == LARGEST[kind] else config.head_dim
        if _period(config) is None:
            problems.append(
                "layer_types do not repeat: sliding_attention, every n-th full_attention"
            )
    if kind == "gemma2" and None in (config.attn_logit_softcapping, config.final_logit_softcapping):
        problems.append("attn_logit_softcapping or final_logit_softcapping is None")
    # llama.cpp gives every fourth layer of SmolLM3 no positions; 1 is a layer that rotates.
    if kind == "smollm3":
        fixed["no_rope_layers"] = [int(i % 4 != 0) for i in range(1, layers + 1)]
    for key, value in fixed.items():
        actual = getattr(config, key, value)
        # None, False and 0 all say that there is none
        if actual != value and (actual or value):
            problems.append(f"{key} is {actual}, not {value}")
    whole, local = rotations(config)
    for rope in (whole, local):
        rotation = rope.get("rope_type", "default")
        is_held = rotation == "default" or (rope is not local and rotation in _ROTATIONS)
        names = {*_ROPE.split()}.union(_ROTATIONS.get(rotation, ()))
        if not is_held or _ONLY_IN.get(rotation, kind) != kind:
            problems.append(f"rope_type is {rotation}")
        elif unknown := [key for key in rope if key not in names and rope[key]]:
            problems.append(f"rope_type {rotation} has {listed(unknown)}")
    if problems:
        raise ExportError(
            f"llama.cpp cannot run this {model_type} model: {'; '.join(problems)}. Use another "
            "target, or a GGUF file as model.source"
        )


def add_metadata(writer: Any, config: Any) -> dict[str, Tensor]:
    """Add what describes a model to a writer; returns the tensors that belong to it."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    for key, name in _SIZES.items():
        if (value := getattr(config, name, None)) is not None:
            getattr(writer, f"add_{key}")(value)
    if ARCHITECTURES[config.model_type] in LARGEST:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(_period(config))
    else:
        warn_of_window(config, "llama.cpp", "Limit its context: -c {}")
    rope, local = rotations(config)
    rotation, width = rope.get("rope_type"), int(head_dim * rope.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    if local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if rotation in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rotation))
        writer.add_rope_scaling_factor(rope["factor"])
    if rotation in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rotation not in _ONLY_IN:
        return {}
    scaled, attention_factor = ROPE_INIT_FUNCTIONS[rotation](config, torch.device("cpu"))
    # llama.cpp divides each frequency by these, and has no other key for Llama 3's scaling.
    if rotation == "llama3":
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return {"rope_freqs.weight": rope["rope_theta"] ** -exponents / scaled}
    writer.add_rope_scaling_attn_factors(attention_factor)
    return {
        f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
        for kind in ("long", "short")
    }


def _period(config: Any) -> int | None:
    """The n > 1 of: every n-th layer has full attention; None if this is not so."""
    # Gemma without a window (n of 1) aborts the process in llama.cpp b11739.
    is_full = [kind == "full_attention" for kind in config.layer_types]
    period = [*is_full, True].index(True) + 1
    is_regular = is_full == [i % period == 0 for i in range(1, len(is_full) + 1)]
    return period if is_regular and period > 1 else None


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
# words that end where a capital follows
_CAPITAL, _CAPITALS = (
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
# llama.cpp makes control tokens of these by their text, even if tokenizer.json says otherwise.
_CONTROL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused\d+>|<pad>|<mask>|<2mass>|\[@BOS@\]")
_KEEPING = {"<unk>", "<s>", "<|endoftext|>"}  # tokens of Phi-3 that keep the spaces after them


def add_tokenizer(writer: Any, tokenizer: Any, config: Any) -> None:
    """Add a tokenizer to a writer, with a token for each of the `config.vocab_size` embeddings."""
    # There may be more embeddings than tokens, and llama.cpp wants one token for each row.
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
        # llama.cpp wants at least one merge; this one makes no token
        special.merges = special.merges or ["! !"]
    else:
        # A score is minus the place of the first merge that makes the token: transformers makes its
        # merges from SentencePiece's scores, all splits of a token in a row.
        merges, ranks = content["model"]["merges"], dict[str, int]()
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), rank)
        writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0] != "a")
    added = {token["content"]: token for token in content["added_tokens"]}
    odd = {name for name, t in added.items() if t["rstrip"] or t["lstrip"] or t["single_word"]}
    splitting = content["pre_tokenizer"] or {}
    # With SentencePiece, llama.cpp puts a space after each special token, these tokenizers none.
    if tokenizer.chat_template and splitting.get("prepend_scheme") == "first":
        odd = {*added}
    # By the name phi-3, llama.cpp cuts off the spaces after the same tokens as the tokenizer.
    if {*added} >= {*_KEEPING, "</s>"} and odd == {*added} - _KEEPING:
        writer.add_name("phi-3")
    elif odd:
        problem = f"llama.cpp reads spaces next to {listed(sorted(odd))} unlike the tokenizer"
        remedy = "send it token ids instead of text"
        warnings.warn(f"{problem}; {remedy}", QwloraWarning, stacklevel=3)
    ids, ends = tokenizer("a").input_ids, (tokenizer.bos_token_id, tokenizer.eos_token_id)
    special.add_special_token = {"bos": ids[0] == ends[0], "eos": ids[-1] == ends[1]}
    special.add_to_gguf(writer, quiet=True)


def check_tokenizer(tokenizer: Any) -> tuple[str, str]:
    """The kind of a tokenizer, and its `pre`; an ExportError if llama.cpp has none that does the
    same."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            "the model has no tokenizer.json, which GGUF export needs. Add one to the model's "
            "folder, or use a GGUF file as the source (tokenizer or gguf_file in Python)"
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
    # llama.cpp's converter compares a hash of the tokens of a text instead, which recognizes only
    # published vocabularies. Splits are the same for a fine-tuned one.
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = None if splitting is None else splitting.pre_tokenize_str(PROBE)
    for name, patterns in _SPLITS.items():
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        if pieces == pre_tokenizers.Sequence([*splits, spelling]).pre_tokenize_str(PROBE):
            # llama-bpe takes words that are tokens as they are, smaug-bpe merges these, too.
            is_smaug = name == "llama-bpe" and not model.get("ignore_merges")
            return "gpt2", "smaug-bpe" if is_smaug else name
    raise ExportError(
        f"llama.cpp does not know how this tokenizer splits text (it knows {', '.join(_SPLITS)}): "
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


_SAME = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "smollm3")
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"} | dict(zip(_SAME, _SAME, strict=True))
"""What GGUF calls the architecture of each model type of transformers."""


class TensorNames:
    """The names and orders of one architecture. `heads` are the heads of q, and those of k."""

    def __init__(self, architecture: str, blocks: int, heads: tuple[int, int]):
        kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        self._names = gguf.get_tensor_name_map(kind, blocks)
        self._architecture = architecture
        self._heads = dict(zip(("q_proj", "k_proj"), heads, strict=True))

    @classmethod
    def of_file(cls, file: GgufFile) -> TensorNames:
        """Those of a file that was written with these names."""
        kind = file.architecture
        heads = file.metadata[f"{kind}.attention.head_count"]
        kv_heads = file.metadata.get(f"{kind}.attention.head_count_kv", heads)
        return cls(kind, file.metadata[f"{kind}.block_count"], (heads, kv_heads))

    def stored_rows(self, name: str, count: int) -> tuple[str, Int64[Tensor, " out"]]:
        """The stored tensor of a parameter, and the stored row of each of its `count` rows; an
        ExportError if the architecture has no such tensor."""
        stored = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise ExportError(
                f"llama.cpp's architecture {self._architecture} has no tensor for {name!r}; export "
                "this model to another target"
            )
        # These architectures rotate neighboring values of a head in llama.cpp, transformers those
        # that are half a head apart. So the two halves of each head of q and k are interleaved.
        rows = torch.arange(count)
        heads = self._heads.get(name.split(".")[-2])
        if heads and self._architecture in ("llama", "smollm3"):
            rows = rows.view(heads, -1, 2).mT.flatten()
        return stored, rows

    def stored_values(self, name: str, values: Tensor) -> Tensor:
        """A float parameter as it is stored, in order of its own rows."""
        # Gemma's norms multiply by 1 + weight, llama.cpp by what is stored.
        is_norm = self._architecture.startswith("gemma") and name.endswith("norm.weight")
        return values.float() + 1 if is_norm else values
