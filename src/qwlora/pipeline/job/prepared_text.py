"""One text of a job, tokenized and cut into sequences on first use."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from qwlora.data import Documents, Prepared, prepare
from qwlora.data.prepared_data import describe
from qwlora.data.sequences import Sequences
from qwlora.progress import Track, untracked
from qwlora.recipe import Data

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class PreparedText:
    """The sequences of one data section.

    Args:
        tokenizer: with the chat template that the section asks for.
    """

    def __init__(
        self,
        section: Data,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        track: Track = untracked,
    ):
        self.section, self._documents, self._tokenizer = section, documents, tokenizer
        self._track = track

    @cached_property
    def data(self) -> Prepared:
        """All sequences."""
        return prepare(self._documents, self._tokenizer, self.section.cutting(), self._track)

    @property
    def evaluation(self) -> Sequences:
        """Held-out sequences that perplexity is measured on."""
        return self.data.held_out.first(self.section.evaluation_sequences)

    @property
    def calibration_ids(self) -> Tensor:
        """Token ids that activation ranges are measured on: int64 [count, tokens], no padding."""
        return self.data.calibration_ids[: self.section.calibration_sequences]

    def describe(self) -> dict[str, Any]:
        """Counts of documents, tokens and sequences."""
        return {
            **describe(self._documents, self.data),
            "evaluation": self.evaluation.counts(),
        }
