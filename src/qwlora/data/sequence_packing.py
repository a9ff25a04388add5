"""Tokens to sequences of equal length, with counts of what was cut, dropped and padded.

    join        documents are concatenated and cut into sequences; a document may continue in the
                next sequence, and attends to those before it; the remainder at the end is dropped
    documents   whole documents packed into one sequence, each with its own positions from 0, so
                that attention does not cross (see `sequences`); the rest is padding
    none        one document a sequence, padded to the longest

Running text longer than a sequence is cut into pieces. Other documents are truncated at the end,
and dropped if that leaves no loss token. Except with `join`, the first token of a document is never
in the loss, since the document before it must not predict it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwlora.data.sequences import IGNORED, Sequences
from qwlora.data.tokenization import Tokens
from qwlora.errors import SourceError


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
        start: tokens before a text; added to each sequence, or piece, of running text.
        padding: token id of padding.
        part: name of the part for messages, such as `training`.

    Raises:
        SourceError: the documents do not fill one sequence, or have no loss token.
    """
    counts = Counts(documents=len(encoded), tokens=sum(len(t.ids) for t in encoded))
    if packing == "join":
        sequences = _join(encoded, sequence_tokens, start, part)
        added = len(start) if _is_text(encoded) else 0
        counts.dropped_tokens = counts.tokens - len(sequences) * (
            sequences.input_ids.shape[1] - added
        )
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
    """All tokens concatenated, int64 [count, tokens], for calibration and statistics.

    Raises:
        SourceError: running text is shorter than one sequence (records make one short sequence).
    """
    start = start if _is_text(encoded) else ()
    ids = torch.tensor([i for tokens in encoded for i in tokens.ids], dtype=torch.int64)
    fresh = sequence_tokens - len(start)
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


def _is_text(encoded: Sequence[Tokens]) -> bool:
    return all(tokens.divisible for tokens in encoded)


def _join(
    encoded: Sequence[Tokens], sequence_tokens: int, start: Sequence[int], part: str
) -> Sequences:
    ids = joined_ids(encoded, sequence_tokens, start, part)
    added = len(start) if _is_text(encoded) else 0
    numbers = [tokens.document for tokens in encoded for _ in tokens.ids]
    rows = torch.tensor(numbers[: len(ids) * (ids.shape[1] - added)]).view(len(ids), -1)
    documents = torch.cat([rows[:, :1].expand(-1, added), rows], dim=1)
    if _is_text(encoded):
        return Sequences(ids, ids, documents=documents)
    flags = [flag for tokens in encoded for flag in tokens.in_loss]
    labels = ids.masked_fill(~torch.tensor(flags[: ids.numel()]).view(ids.shape), IGNORED)
    kept = (labels[:, 1:] != IGNORED).any(dim=1)  # a batch without a loss token has no loss
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
        before = list(start) if tokens.divisible else []
        fresh = sequence_tokens - len(before)
        parts = [
            Tokens(
                before + tokens.ids[at : at + fresh],
                [False] * len(before) + tokens.in_loss[at : at + fresh],
                document=tokens.document,
            )
            for at in (range(0, len(tokens.ids), fresh) if tokens.divisible else (0,))
        ]
        kept = [piece for piece in parts if any(piece.in_loss[1:])]
        over = 0 if tokens.divisible else max(0, len(tokens.ids) - sequence_tokens)
        counts.truncated_documents += over > 0
        counts.truncated_tokens += over
        counts.dropped_documents += not kept
        counts.dropped_tokens += len(tokens.ids) - sum(len(p.ids) - len(before) for p in kept)
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
    open_bins: list[tuple[int, int]] = []  # (room left, bin), ascending
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
            in_loss = torch.tensor([False, *tokens.in_loss[1:]])
            labels[row, at:end] = ids[row, at:end].masked_fill(~in_loss, IGNORED)
            places[row, at:end] = torch.arange(end - at)
            numbers[row, at:end] = tokens.document
            at = end
        places[row, at:] = torch.arange(width - at)
    return Sequences(ids, labels, places if positions else None, numbers)
