"""Documents and a tokenizer to all the sequences that the stages read.

Held-out documents never share a sequence, whatever the packing of the training part, except with
`join`: a perplexity must not depend on a document's neighbors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qwlora.data.document import Documents
from qwlora.data.tokenization import encode_documents, renders_pairs, start_tokens
from qwlora.system.progress import Track, untracked

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from qwlora.data.sequences import Counts, Sequences


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
    chat_template: bool

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
    from qwlora.data.sequences import cut_into_sequences, joined_ids

    kind, packing = documents.kind, cutting.packing_of(documents.kind)
    start = start_tokens(tokenizer) if kind == "text" else []
    tokens = cutting.sequence_tokens
    ends = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    padding = next((i for i in ends if i is not None), 0)
    train_tokens, held_out_tokens = (
        encode_documents(part, tokenizer, cutting.turns, cutting.prompt_format, track)
        for part in (documents.train, documents.held_out)
    )
    train, train_counts = cut_into_sequences(
        train_tokens, tokens, packing, start, padding, "training"
    )
    alone = "none" if packing == "documents" else packing
    held_out, held_out_counts = cut_into_sequences(
        held_out_tokens, tokens, alone, start, padding, "held-out"
    )
    return Prepared(
        kind,
        packing,
        train,
        held_out,
        joined_ids(train_tokens, tokens, start, "training"),
        train_counts,
        held_out_counts,
        kind == "conversations"
        or (kind == "completions" and renders_pairs(tokenizer, cutting.prompt_format)),
    )


def describe(documents: Documents, prepared: Prepared) -> dict[str, Any]:
    """The section `data` of results.json."""
    of_source = ("skipped_records", "overlapping_documents", "overlapping_paragraphs")
    return {
        **{key: getattr(prepared, key) for key in ("kind", "chat_template", "packing")},
        **{key: getattr(documents, key) for key in of_source},
        "train": asdict(prepared.train_counts),
        "held_out": asdict(prepared.held_out_counts),
    }


def heading(description: dict[str, Any]) -> str:
    """The kind of the documents, how completions are rendered, and the packing."""
    form = ""
    if description["kind"] == "completions":
        form = " with the chat template" if description["chat_template"] else " as plain text"
    return f"{description['kind']}{form}, packing {description['packing']}"


def summary(description: dict[str, Any], name: str | None = None) -> str:
    """The same in one line; `name` tells several texts apart."""
    keys = [
        *("documents", "tokens", "sequences", "loss_tokens"),
        *("truncated_documents", "dropped_documents", "dropped_tokens"),
    ]
    parts = []
    for part, label in (("train", "training"), ("held_out", "held out")):
        counts = {key: description[part][key] for key in keys}
        words = [f"{n:,} {key.replace('_', ' ')}" for key, n in counts.items() if n]
        parts.append(f"{label} {', '.join(words)}")
    if count := description["skipped_records"]:
        parts.append(f"{count:,} empty records skipped")
    if count := description["overlapping_documents"]:
        parts.append(f"{count:,} training documents removed because they repeat held-out ones")
    of = "data" if name is None else f"data of {name}"
    return f"{of} ({heading(description)}): " + "; ".join(parts)
