"""Generate text with a causal language model and pass it on as it is generated.

    ids = prompt_ids(tokenizer, [{"role": "user", "content": "What is a scale?"}])
    answer = generate_text(model, tokenizer, ids, Sampling(max_new_tokens=50), write=print)

Generation is that of transformers, with its key-value cache where the model has one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from qwlora.data.tokenization import render, start_tokens
from qwlora.errors import NonFiniteError, SourceError, foreign_as
from qwlora.graph.capture import cache_argument
from qwlora.system.device import device_of, moved
from qwlora.system.progress import Track, untracked


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest token at temperature 0, else a sample from
    softmax(logits / temperature) over the whole vocabulary."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0


# sequences: more are little faster, and their cache is larger
SAMPLED_AT_ONCE = 16


@dataclass(frozen=True)
class Answer:
    """An answer and how long it took."""

    text: str  # without special tokens
    tokens: int  # generated, with the one that ended it
    first_token_seconds: float  # includes reading the prompt
    tokens_per_second: float | None  # after the first token; None for a single token


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Mapping[str, Any]]
) -> Int64[Tensor, "1 tokens"]:
    """Token ids of a text, or of a conversation rendered with the tokenizer's chat template."""
    messages = [{"content": prompt}] if isinstance(prompt, str) else prompt
    # Python keeps bytes of a terminal that are no UTF-8 as surrogates, which tokenizers refuses
    # with a TypeError.
    with foreign_as(SourceError, "the prompt is not UTF-8 text"):
        for message in messages:
            message["content"].encode()
    if isinstance(prompt, str):
        ids: Any = tokenizer(prompt)["input_ids"]
    else:
        where = "the prompt (--raw generates without a template)"
        text = render(prompt, tokenizer, where, prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise SourceError("the prompt is empty; give at least one word")
    return torch.tensor([ids], dtype=torch.int64)


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Int64[Tensor, "1 tokens"],
    sampling: Sampling,
    write: Callable[[str], None],
) -> Answer:
    """Continue the prompt `ids`; the answer also ends at the model's last position.

    Args:
        write: receives the text in parts, as soon as no later token can change them.
    """
    count, limit = ids.shape[1], sampling.max_new_tokens
    config: Any = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        if count >= positions:
            raise SourceError(
                f"the prompt has {count} tokens, but the model has positions for {positions}; "
                "shorten the prompt"
            )
        limit = min(limit, positions - count)
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    tokens = [tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])]
    ends = list(dict.fromkeys(token for token in tokens if token is not None))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    choice: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        # the whole vocabulary: transformers would leave out all but 50 tokens
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        max_new_tokens=limit, eos_token_id=ends or None, pad_token_id=padding, **choice
    )
    streamer, ids = _Streamer(tokenizer, write), moved(ids, device_of(model))
    torch.manual_seed(sampling.seed)
    with torch.inference_mode():
        cast(Any, model).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            streamer=streamer,
        )
    return streamer.answer()


@torch.no_grad()
def sample_sequences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    track: Track = untracked,
) -> Int64[Tensor, "count tokens"]:
    """Generate text without a prompt: a random first token, then samples.

    Samples come from softmax(logits / temperature), also after an end-of-text token. Equal
    arguments give equal text on one machine.

    Source: LLM-QAT (Liu et al. 2023, https://arxiv.org/abs/2305.17888).

    Returns:
        Token ids, `count` sequences of `tokens` each.

    Raises:
        NonFiniteError: the model's logits are not finite.
    """
    generator, start = torch.Generator().manual_seed(seed), start_tokens(tokenizer)
    words = sorted(set(tokenizer.get_vocab().values()) - tokenizer.added_tokens_decoder.keys())
    first = torch.tensor(words)[torch.randint(len(words), (count, 1), generator=generator)]
    starts = torch.cat([torch.tensor(start, dtype=torch.int64).expand(count, -1), first], 1)
    written, steps = list[Tensor](), tokens - starts.shape[1]
    device, cached = device_of(model), cache_argument(model)
    for ids in moved(starts, device).split(SAMPLED_AT_ONCE):
        new, cache = ids, dict[str, Any]()
        for _ in track(range(steps), "sampling text", steps):
            result = model(input_ids=new, use_cache=True, **cache)
            probabilities = (result.logits[:, -1].float() / temperature).softmax(-1)
            if not bool(probabilities.isfinite().all()):
                raise NonFiniteError(
                    "the model's next-token probabilities are not finite, so it cannot generate "
                    "text. Check its weights, or use your own text: base.calibration: [job], "
                    "export.proof: held_out"
                )
            # drawn on the CPU, so that the seed gives the same text on every device
            new = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(device)
            ids = torch.cat([ids, new], 1)
            cache = {cached: getattr(result, cached, None)}
            # A model without such a cache reads the whole text again.
            if cache[cached] is None:
                new, cache = ids, {}
        written.append(ids.cpu())
    return torch.cat(written)


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self._began, self._times, self._parts = time.perf_counter(), list[float](), list[str]()

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self._times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._parts.append(text)
            self._write(text)

    def answer(self) -> Answer:
        first, last, count = self._times[0], self._times[-1], len(self._times)
        rate = (count - 1) / (last - first) if last > first else None
        return Answer("".join(self._parts), count, first - self._began, rate)
