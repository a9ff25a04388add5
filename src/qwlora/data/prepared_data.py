"""Documents and a tokenizer to all the sequences that the stages read.

Held-out documents never share a sequence, whatever the packing of the training part, except with
`join`: a perplexity must not depend on a document's neighbors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwlora.data.document import Documents
from qwlora.data.sequence_packing import Counts, cut_into_sequences, joined_ids
from qwlora.data.tokenization import encode_documents, renders_pairs, start_tokens
from qwlora.progress import Track, untracked

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from qwlora.data.sequences import Sequences


@dataclass(frozen=True)
class Cutting:
    """How tokens become sequences.

    Args:
        packing: join, documents or none; default: join for running text, else documents.
        turns: of a conversation: together or apart.
        prompt_format: of completions: auto (the chat template, if there is one) or plain.
    """

    sequence_tokens: int
    packing: str | None = None
    turns: str = "together"
    prompt_format: str = "auto"

    def packing_of(self, kind: str) -> str:
        """The packing of documents of `kind`."""
        return self.packing or ("join" if kind == "text" else "documents")


@dataclass(frozen=True)
class Prepared:
    """The data of one recipe for training, evaluation and calibration.

    Args:
        train, held_out: sequences; the held-out ones have no position_ids.
        calibration_ids: int64 [count, tokens], concatenated training documents.
        chat_template: whether a chat template rendered the documents.
    """

    kind: str
    packing: str
    train: Sequences
    held_out: Sequences
    calibration_ids: Tensor
    train_counts: Counts
    held_out_counts: Counts
    chat_template: bool = False

    def largest_id(self) -> int:
        """The largest token id."""
        every = (self.train.input_ids, self.held_out.input_ids, self.calibration_ids)
        return int(max(ids.max() for ids in every))

    def positions(self) -> int:
        """Positions of the longest sequence, or document where several share a sequence."""
        places = self.train.position_ids
        longest = self.train.input_ids.shape[1] if places is None else int(places.max()) + 1
        return max(longest, self.held_out.input_ids.shape[1], self.calibration_ids.shape[1])


def prepare(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    cutting: Cutting,
    track: Track = untracked,
) -> Prepared:
    """Tokenize and pack both parts.

    Raises:
        SourceError: a conversation cannot be rendered, or a part is shorter than one sequence.
    """
    kind, packing = documents.kind, cutting.packing_of(documents.kind)
    start, tokens = start_tokens(tokenizer), cutting.sequence_tokens
    padding = next(
        (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
    )
    how = (cutting.turns, cutting.prompt_format, track)
    train = encode_documents(documents.train, tokenizer, *how)
    held_out = encode_documents(documents.held_out, tokenizer, *how)
    alone = "none" if packing == "documents" else packing
    train_part = cut_into_sequences(train, tokens, packing, start, padding, "training")
    held_out_part = cut_into_sequences(held_out, tokens, alone, start, padding, "held-out")
    return Prepared(
        kind,
        packing,
        train_part[0],
        held_out_part[0],
        train_part[0].input_ids
        if kind == "text" and packing == "join"
        else joined_ids(train, tokens, start, "training"),
        train_part[1],
        held_out_part[1],
        kind == "conversations"
        or (kind == "completions" and renders_pairs(tokenizer, cutting.prompt_format)),
    )


def describe(documents: Documents, prepared: Prepared) -> dict[str, Any]:
    """The section `data` of results.json."""
    return {
        "kind": prepared.kind,
        "chat_template": prepared.chat_template,
        "packing": prepared.packing,
        "skipped_records": documents.skipped_records,
        "overlapping_documents": documents.overlapping_documents,
        "overlapping_paragraphs": documents.overlapping_paragraphs,
        "train": prepared.train_counts.to_json(),
        "held_out": prepared.held_out_counts.to_json(),
    }


def heading(description: dict[str, Any]) -> str:
    """The kind of the documents, how completions are rendered, and the packing."""
    form = ""
    if description["kind"] == "completions":
        form = " with the chat template" if description["chat_template"] else " as plain text"
    return f"{description['kind']}{form}, packing {description['packing']}"


def summary(description: dict[str, Any], name: str | None = None) -> str:
    """The same in one line; `name` tells several texts apart."""
    parts = []
    for part, label in (("train", "training"), ("held_out", "held out")):
        c = description[part]
        text = (
            f"{label} {c['documents']:,} documents, {c['tokens']:,} tokens, "
            f"{c['sequences']:,} sequences, {c['loss_tokens']:,} loss tokens"
        )
        lost = [
            (c["truncated_documents"], "documents truncated"),
            (c["dropped_documents"], "documents dropped"),
            (c["dropped_tokens"], "tokens dropped"),
        ]
        parts.append(", ".join([text, *(f"{count:,} {what}" for count, what in lost if count)]))
    notes = [
        (description["skipped_records"], "empty records skipped"),
        (
            description["overlapping_documents"],
            "training documents removed because they repeat held-out ones",
        ),
    ]
    parts += [f"{count:,} {what}" for count, what in notes if count]
    of = "data" if name is None else f"data of {name}"
    return f"{of} ({heading(description)}): " + "; ".join(parts)
