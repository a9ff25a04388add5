"""Token sequences with labels: what training, evaluation and verification read.

    loss = mean over t of -log p(labels[t] | input_ids[:t]),  over t >= 1 with labels[t] != IGNORED

`labels[t]` is `input_ids[t]` for loss tokens and IGNORED elsewhere (transformers' convention; the
model shifts by one). `position_ids`, if present, restart at 0 with each document of a sequence;
transformers' mask functions derive from them which tokens may attend to each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100


@dataclass(frozen=True)
class Sequences(Dataset[dict[str, Tensor]]):
    """Sequences of equal length; item i is the model's arguments for sequence i, each [tokens].

    Args:
        input_ids: int64 [count, tokens].
        labels: int64 [count, tokens], IGNORED for tokens that are not in the loss.
        position_ids: int64 [count, tokens], if documents share a sequence without attending to
            each other.
        documents: int64 [count, tokens], the number of the document that each token is from;
            tokens of one document are not independent samples. -1 for padding. Not an argument
            of the model.
    """

    input_ids: Int64[Tensor, "count tokens"]
    labels: Int64[Tensor, "count tokens"]
    position_ids: Int64[Tensor, "count tokens"] | None = None
    documents: Int64[Tensor, "count tokens"] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def first(self, count: int) -> Sequences:
        """The first `count` sequences, or as many as there are."""
        return self._part(torch.arange(min(count, len(self))))

    def cut(self, tokens: int) -> Sequences:
        """Each sequence cut to its first `tokens` tokens, without sequences that then have no loss
        token. If none has one, all are kept, and every token counts in the loss."""
        ids, labels = self.input_ids[:, :tokens], self.labels[:, :tokens]
        kept = (labels[:, 1:] != IGNORED).any(1)
        return Sequences(ids[kept], labels[kept]) if kept.any() else Sequences(ids, ids)

    def spread(self, count: int) -> tuple[Sequences, Sequences]:
        """(`count` evenly spaced sequences, or as many as there are; the remaining ones)."""
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[torch.arange(min(count, len(self))) * len(self) // max(1, min(count, len(self)))] = (
            True
        )
        return self._part(chosen), self._part(~chosen)

    def _part(self, rows: Tensor) -> Sequences:
        return Sequences(
            self.input_ids[rows],
            self.labels[rows],
            None if self.position_ids is None else self.position_ids[rows],
            None if self.documents is None else self.documents[rows],
        )

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tensors = {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "position_ids": self.position_ids,
        }
        return {name: tensor[index] for name, tensor in tensors.items() if tensor is not None}

    def rows(self) -> Iterator[tuple[Int64[Tensor, " tokens"], Int64[Tensor, " tokens"]]]:
        """(ids, labels) of each sequence up to its last loss token; a causal model's loss does not
        depend on what follows."""
        assert self.position_ids is None, (
            "documents that share a sequence need position_ids, which rows() does not return"
        )
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
        return {
            "sequences": len(self),
            "loss_tokens": self.loss_tokens,
            "documents": documents,
        }


def as_sequences(sequences: Sequences | Int64[Tensor, "count tokens"]) -> Sequences:
    """Plain ids [count, tokens] as sequences in which every token is in the loss."""
    return sequences if isinstance(sequences, Sequences) else Sequences(sequences, sequences)
