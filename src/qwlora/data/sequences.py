"""Token sequences with labels: what training, evaluation and verification read.

    loss = mean over t of -log p(labels[t] | input_ids[:t]),  over t >= 1 with labels[t] != IGNORED

`labels[t]` is `input_ids[t]` for loss tokens and IGNORED elsewhere (transformers' convention; the
model shifts by one). `position_ids`, if present, restart at 0 with each document of a sequence.

Tokens become sequences of equal length by one of three packings:

    join        documents are concatenated and cut into sequences; a document may continue in the
                next sequence, and attends to those before it; the remainder at the end is dropped
    documents   whole documents packed into one sequence, each with its own positions from 0, so
                that attention does not cross; the rest is padding
    none        one document per sequence, padded to the longest

Running text longer than a sequence is cut into pieces. Other documents are truncated at the end,
and dropped if that leaves no loss token.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.utils.data import Dataset

from qwlora.data.tokenization import Tokens
from qwlora.errors import SourceError
from qwlora.nn.temporary import evaluation_mode
from qwlora.system.device import device_of, moved

IGNORED = -100
_DOCUMENT_TOKENS = 12
# Models that separate documents leak 2e-7 to 6e-7 of the influence, OPT 0.83 (docs/log/data.md).
_MOST_LEAK = 0.02


@dataclass(frozen=True)
class Sequences(Dataset[dict[str, Tensor]]):
    """Sequences of equal length; item i is the model's arguments for sequence i, each [tokens].

    Args:
        input_ids: int64 [count, tokens].
        labels: int64 [count, tokens], IGNORED for tokens that are not in the loss.
        position_ids: int64 [count, tokens], if documents share a sequence without attending to
            each other.
        documents: int64 [count, tokens], the number of the document that each token is from;
            -1 for padding. Not an argument of the model.
    """

    input_ids: Int64[Tensor, "count tokens"]
    labels: Int64[Tensor, "count tokens"]
    position_ids: Int64[Tensor, "count tokens"] | None = None
    # Standard errors need these: tokens of one document are not independent samples.
    documents: Int64[Tensor, "count tokens"] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def first(self, count: int) -> Sequences:
        return self._part(torch.arange(min(count, len(self))))

    def cut(self, tokens: int) -> Sequences:
        """Each sequence cut to its first `tokens` tokens, without sequences that then have no loss
        token. If none has one, all are kept, and every token counts in the loss."""
        ids, labels = self.input_ids[:, :tokens], self.labels[:, :tokens]
        kept = (labels[:, 1:] != IGNORED).any(1)
        return Sequences(ids[kept], labels[kept]) if kept.any() else Sequences(ids, ids)

    def spread(self, count: int) -> tuple[Sequences, Sequences]:
        """(`count` evenly spaced sequences, or as many as there are; the remaining ones)."""
        count = min(count, len(self))
        # Neighbors are often of one document, so the first sequences would be of few documents.
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[torch.arange(count) * len(self) // max(1, count)] = True
        return self._part(chosen), self._part(~chosen)

    def _part(self, rows: Tensor) -> Sequences:
        return Sequences(*(None if t is None else t[rows] for t in vars(self).values()))  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {"input_ids": self.input_ids[index], "labels": self.labels[index]}
        if self.position_ids is not None:
            item["position_ids"] = self.position_ids[index]
        return item

    def rows(self) -> Iterator[tuple[Int64[Tensor, " tokens"], Int64[Tensor, " tokens"]]]:
        """(ids, labels) of each sequence up to its last loss token."""
        assert self.position_ids is None, (
            "documents that share a sequence need position_ids, which rows() does not return"
        )
        # A causal model's loss does not depend on the tokens that follow.
        for ids, labels in zip(self.input_ids, self.labels, strict=True):
            end = int((labels != IGNORED).nonzero().max()) + 1
            yield ids[:end], labels[:end]

    @property
    def loss_tokens(self) -> int:
        """Number of tokens that the loss is a mean over."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def counts(self) -> dict[str, int | None]:
        """Numbers of sequences, loss tokens, and documents with a loss token (None: unknown)."""
        documents = None
        if self.documents is not None:
            documents = len(self.documents[:, 1:][self.labels[:, 1:] != IGNORED].unique())
        return {"sequences": len(self), "loss_tokens": self.loss_tokens, "documents": documents}


def as_sequences(sequences: Sequences | Int64[Tensor, "count tokens"]) -> Sequences:
    """Plain ids [count, tokens] as sequences in which every token is in the loss."""
    return sequences if isinstance(sequences, Sequences) else Sequences(sequences, sequences)


@dataclass
class Counts:
    """Counts of one part (training or held out); docs/data.md explains each."""

    documents: int = 0
    tokens: int = 0
    sequences: int = 0
    sequence_tokens: int = 0
    loss_tokens: int = 0
    truncated_documents: int = 0
    truncated_tokens: int = 0
    dropped_documents: int = 0
    dropped_tokens: int = 0
    padding_tokens: int = 0


def cut_into_sequences(
    encoded: Sequence[Tokens],
    sequence_tokens: int,
    packing: str,
    start: Sequence[int],
    padding: int,
    part: str,
) -> tuple[Sequences, Counts]:
    """Sequences of at most `sequence_tokens`.

    Args:
        packing: join, documents or none.
        start: tokens before each sequence, or piece, of running text; none for other documents.
        padding: token id of padding.
        part: name of the part for messages, such as `training`.
    """
    counts = Counts(documents=len(encoded), tokens=sum(len(t.ids) for t in encoded))
    if packing == "join":
        sequences = _join(encoded, sequence_tokens, start, part)
        counts.dropped_tokens = counts.tokens - sequences.input_ids[:, len(start) :].numel()
    else:
        pieces = _pieces(encoded, sequence_tokens, start, part, counts)
        lengths = [len(piece.ids) for piece in pieces]
        shares = packing == "documents"
        bins = _pack(lengths, sequence_tokens) if shares else [[i] for i in range(len(pieces))]
        width = sequence_tokens if shares else max(lengths)
        sequences = _fill([[pieces[i] for i in row] for row in bins], width, padding, shares)
        counts.padding_tokens = sequences.input_ids.numel() - sum(lengths)
    counts.sequences, counts.sequence_tokens = sequences.input_ids.shape
    counts.loss_tokens = sequences.loss_tokens
    return sequences, counts


def joined_ids(
    encoded: Sequence[Tokens], sequence_tokens: int, start: Sequence[int], part: str
) -> Tensor:
    """All tokens concatenated, int64 [count, tokens], for calibration and statistics."""
    ids = torch.tensor([i for tokens in encoded for i in tokens.ids], dtype=torch.int64)
    fresh = sequence_tokens - len(start)
    # Running text must fill a sequence; a few short records are one short sequence.
    if len(ids) < fresh and encoded and not encoded[0].divisible:
        fresh = len(ids)
    count = len(ids) // fresh if fresh > 0 else 0
    if not count:
        raise SourceError(
            f"the {part} text has {len(ids)} tokens, but one sequence needs {fresh}: give more "
            "text, lower data.sequence_tokens, or change data.held_out"
        )
    starts = torch.tensor(start, dtype=torch.int64).expand(count, len(start))
    return torch.cat([starts, ids[: count * fresh].view(count, fresh)], dim=1)


def _join(
    encoded: Sequence[Tokens], sequence_tokens: int, start: Sequence[int], part: str
) -> Sequences:
    ids = joined_ids(encoded, sequence_tokens, start, part)
    added = len(start)
    numbers = [tokens.document for tokens in encoded for _ in tokens.ids]
    rows = torch.tensor(numbers[: len(ids) * (ids.shape[1] - added)]).view(len(ids), -1)
    documents = torch.cat([rows[:, :1].expand(-1, added), rows], dim=1)
    if encoded[0].divisible:
        return Sequences(ids, ids, documents=documents)
    flags = [flag for tokens in encoded for flag in tokens.in_loss]
    labels = ids.masked_fill(~torch.tensor(flags[: ids.numel()]).view(ids.shape), IGNORED)
    # The loss of a batch without a loss token is 0 / 0.
    kept = (labels[:, 1:] != IGNORED).any(dim=1)
    if not kept.any():
        raise SourceError(
            f"no sequence of the {part} part has a loss token: raise data.sequence_tokens, or "
            "set another data.packing"
        )
    return Sequences(ids[kept], labels[kept], documents=documents[kept])


def _pieces(
    encoded: Sequence[Tokens], sequence_tokens: int, start: Sequence[int], part: str, counts: Counts
) -> list[Tokens]:
    """Documents of at most `sequence_tokens`, each with a loss token."""
    pieces: list[Tokens] = []
    for tokens in encoded:
        fresh = sequence_tokens - len(start)
        parts = [
            Tokens(
                [*start, *tokens.ids[at : at + fresh]],
                [False] * len(start) + tokens.in_loss[at : at + fresh],
                document=tokens.document,
            )
            for at in (range(0, len(tokens.ids), fresh) if tokens.divisible else (0,))
        ]
        kept = [piece for piece in parts if any(piece.in_loss[1:])]
        over = 0 if tokens.divisible else max(0, len(tokens.ids) - sequence_tokens)
        counts.truncated_documents += over > 0
        counts.truncated_tokens += over
        counts.dropped_documents += not kept
        counts.dropped_tokens += len(tokens.ids) - sum(len(p.ids) - len(start) for p in kept)
        pieces += kept
    if not pieces:
        raise SourceError(
            f"none of the {counts.documents} {part} documents has a loss token within its first "
            f"{sequence_tokens} tokens: raise data.sequence_tokens"
        )
    return pieces


def _pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices that share a sequence (best fit: the fullest one with enough room)."""
    bins: list[list[int]] = []
    # (room left, number of the bin), ascending, so that a search takes logarithmic time.
    open_bins: list[tuple[int, int]] = []
    for index, length in enumerate(lengths):
        at = bisect.bisect_left(open_bins, (length, -1))
        if at < len(open_bins):
            left, chosen = open_bins.pop(at)
        else:
            left, chosen = room, len(bins)
            bins.append([])
        bins[chosen].append(index)
        if left > length:
            bisect.insort(open_bins, (left - length, chosen))
    return bins


def _fill(rows: Sequence[Sequence[Tokens]], width: int, padding: int, positions: bool) -> Sequences:
    ids = torch.full((len(rows), width), padding, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    places = torch.zeros_like(ids)
    numbers = torch.full_like(ids, -1)
    for row, documents in enumerate(rows):
        at = 0
        for tokens in documents:
            end = at + len(tokens.ids)
            ids[row, at:end] = torch.tensor(tokens.ids)
            # The document before it must not predict a document's first token.
            in_loss = torch.tensor([False, *tokens.in_loss[1:]])
            labels[row, at:end] = ids[row, at:end].masked_fill(~in_loss, IGNORED)
            places[row, at:end] = torch.arange(end - at)
            numbers[row, at:end] = tokens.document
            at = end
        places[row, at:] = torch.arange(width - at)
    return Sequences(ids, labels, places if positions else None, numbers)


def check_isolation(model: nn.Module) -> None:
    """Check that `model` separates documents by their positions; raise SourceError if it mixes
    them, or takes no position_ids."""
    # No configuration value tells which models do (docs/log/data.md): transformers builds a
    # block-diagonal mask from restarting positions in `create_causal_mask`, if there is no
    # attention mask and no cache. Models with their own mask and recurrent models take the
    # positions and mix the documents all the same.
    leak = isolation_leak(model)
    if leak is None or leak > _MOST_LEAK:
        how = (
            "takes no position_ids"
            if leak is None
            else "mixes documents that share a sequence (restarting positions removes only "
            f"{1 - leak:.0%} of the influence of the earlier document)"
        )
        name = type(getattr(model, "get_base_model", lambda: model)()).__name__
        raise SourceError(
            f"{name} {how}, so with data.packing: documents, each document would see the one "
            "before it. Set data.packing to none (padding) or join (mixed)"
        )


@torch.no_grad()
def isolation_leak(model: Any) -> float | None:
    """0 if documents are separate, 1 if positions have no effect; None without position_ids.

    |logits(b after a, positions restart) - logits(b)|  /  |logits(b after a) - logits(b)|
    """
    count, generator = _DOCUMENT_TOKENS, torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first, second = torch.randint(vocabulary, (2, count), generator=generator)
    ids = torch.stack([torch.cat([second, first]), *[torch.cat([first, second])] * 2])
    on, again = torch.arange(2 * count), torch.arange(count).repeat(2)
    inputs = {"input_ids": ids, "position_ids": torch.stack([on, on, again])}
    inputs = moved(inputs, device_of(model))
    try:
        with evaluation_mode(model):
            logits: Tensor = model(**inputs, use_cache=False).logits.float()
    except TypeError as error:
        if "position_ids" not in str(error):
            raise
        return None
    alone, joined, apart = logits[0, :count], logits[1, count:], logits[2, count:]
    mixing = (joined - alone).norm()
    return float((apart - alone).norm() / mixing) if mixing > 0 else 0.0


def one_row(ids: Tensor) -> dict[str, Tensor]:
    """A batch of one sequence [tokens] without padding."""
    return {"input_ids": ids[None], "attention_mask": ids[None].new_ones(1, len(ids))}


def in_turn(
    texts: Sequence[Iterable[Tensor]], weights: Sequence[float] | None = None
) -> Iterator[Tensor]:
    """The sequences of several texts in turn, each text's as often as its weight says."""
    left, taken = dict(enumerate(map(iter, texts))), [0.0] * len(texts)
    while left:
        number = min(left, key=lambda n: taken[n])
        if (row := next(left[number], None)) is None:
            del left[number]
            continue
        taken[number] += 1 / (weights[number] if weights else 1.0)
        yield row
