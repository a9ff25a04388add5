"""Token sequences with labels: what training, evaluation and verification read.

    loss = mean over t of -log p(labels[t] | input_ids[:t]),  over t >= 1 with labels[t] != IGNORED

`labels[t]` is `input_ids[t]` for loss tokens and IGNORED elsewhere (transformers' convention; the
model shifts by one). `position_ids`, if present, restart at 0 with each document of a sequence, and
transformers builds a block-diagonal attention mask from them, for eager and sdpa attention
(whatever uses `create_causal_mask`), if there is no attention mask and no cache.

Models with their own mask and recurrent models may accept such positions and mix the documents
anyway. So `check_isolation` tests the model itself, with two documents a and b of random tokens:

    |logits(b after a, positions restart) - logits(b)|  <=  0.02 |logits(b after a) - logits(b)|
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.utils.data import Dataset

from qwlora.errors import SourceError

IGNORED = -100
_DOCUMENT_TOKENS = 12
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
        count = min(count, len(self))
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
        return {"sequences": len(self), "loss_tokens": self.loss_tokens, "documents": documents}


def as_sequences(sequences: Sequences | Int64[Tensor, "count tokens"]) -> Sequences:
    """Plain ids [count, tokens] as sequences in which every token is in the loss."""
    return sequences if isinstance(sequences, Sequences) else Sequences(sequences, sequences)


def check_isolation(model: nn.Module) -> None:
    """Check that `model` separates documents by their positions.

    Raises:
        SourceError: it mixes them, or takes no position_ids.
    """
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
            f"{name} {how}, so data.packing: documents would condition each document on the one "
            "before it. Set data.packing to none (padding) or join (mixed)"
        )


@torch.no_grad()
def isolation_leak(model: Any) -> float | None:
    """0 if documents are separate, 1 if positions have no effect; None without position_ids."""
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    count, generator = _DOCUMENT_TOKENS, torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    first, second = torch.randint(vocabulary, (2, count), generator=generator)
    ids = torch.stack([torch.cat([second, first]), *[torch.cat([first, second])] * 2])
    on, again = torch.arange(2 * count), torch.arange(count).repeat(2)
    inputs = {"input_ids": ids.to(device), "position_ids": torch.stack([on, on, again]).to(device)}
    training = model.training
    model.eval()
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits.float()
    except TypeError as error:
        if "position_ids" not in str(error):
            raise
        return None
    finally:
        model.train(training)
    alone, joined, apart = logits[0, :count], logits[1, count:], logits[2, count:]
    mixing = (joined - alone).norm()
    return float((apart - alone).norm() / mixing) if mixing > 0 else 0.0
