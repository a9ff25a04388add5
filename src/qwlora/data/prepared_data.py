"""Turn documents into the sequences that the stages read, with a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise, takewhile
from typing import TYPE_CHECKING, Any

from qwlora.data.document import ASSISTANT, Completion, Documents, Text
from qwlora.data.tokenization import encode_documents, renders_pairs, start_tokens
from qwlora.errors import SourceError, listed
from qwlora.system.progress import Track, untracked

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from qwlora.data.sequences import Counts, Sequences

NOTABLE_LOSS = 0.05  # share of the training or held-out text; more is reported to the user
PROMPT_TOKENS = 32  # length of a prompt from running text


@dataclass(frozen=True)
class Cutting:
    """How tokens become sequences, and how many sequences are read.

    Args:
        sequence_tokens: tokens per sequence.
        packing: join, documents or none; default: join for running text, else documents.
        turns: turns of a conversation in one sequence (together) or separate (apart).
        prompt_format: format of completions: auto (the chat template, if there is one) or plain.
        evaluation_sequences, calibration_sequences: largest number; default: all.
        most_lost: largest share of the training or held-out text that may be lost.
    """

    sequence_tokens: int
    packing: str | None = None
    turns: str = "together"
    prompt_format: str = "auto"
    evaluation_sequences: int | None = None
    calibration_sequences: int | None = None
    most_lost: float = 0.5

    def packing_of(self, kind: str) -> str:
        """The packing of documents of `kind`."""
        return self.packing or ("join" if kind == "text" else "documents")


@dataclass(frozen=True, eq=False)
class PreparedText:
    """Documents as sequences, for training, evaluation and calibration.

    Args:
        train, held_out: sequences; held-out sequences have no position_ids.
        joined_ids: int64 [count, tokens], concatenated training documents.
    """

    documents: Documents
    cutting: Cutting
    train: Sequences
    held_out: Sequences
    joined_ids: Tensor
    train_counts: Counts
    held_out_counts: Counts
    chat_template: bool

    @property
    def evaluation(self) -> Sequences:
        most = self.cutting.evaluation_sequences
        return self.held_out if most is None else self.held_out.first(most)

    @property
    def calibration_ids(self) -> Tensor:
        """Token ids that activation ranges are measured on: int64 [count, tokens], no padding."""
        return self.joined_ids[: self.cutting.calibration_sequences]

    def largest_id(self) -> int:
        every = (self.train.input_ids, self.held_out.input_ids, self.joined_ids)
        return int(max(ids.max() for ids in every))

    def positions(self) -> int:
        # Of documents that share a sequence, each has positions from 0, so the longest one counts.
        position_ids, longest = self.train.position_ids, self.train.input_ids.shape[1]
        if position_ids is not None:
            longest = int(position_ids.max()) + 1
        return max(longest, self.held_out.input_ids.shape[1], self.joined_ids.shape[1])

    def describe(self) -> dict[str, Any]:
        """The section `data` of results.json."""
        of_source = ("skipped_records", "repeated_documents", "repeated_paragraphs")
        kind = self.documents.kind
        return {
            "kind": kind,
            "chat_template": self.chat_template,
            "packing": self.cutting.packing_of(kind),
            **{key: getattr(self.documents, key) for key in of_source},
            "train": asdict(self.train_counts),
            "held_out": asdict(self.held_out_counts),
            "evaluation": self.evaluation.counts(),
            "cautions": self.cautions(),
        }

    def losses(self) -> list[tuple[float, str]]:
        """What is missing: the share of a part, and why."""
        length, losses = self.cutting.sequence_tokens, []
        joins = self.cutting.packing_of(self.documents.kind) == "join"
        parts = (("training", self.train_counts), ("held-out", self.held_out_counts))
        for (part, counts), repeated in zip(parts, self.documents.repeated_shares, strict=True):
            other = "held-out" if part == "training" else "training"
            why = f"the {other} text contains it (data.repeated)"
            losses.append((repeated, f"of the {part} text was removed, because {why}"))
            why = f"{counts.truncated_documents:,} of {counts.documents:,} documents are longer "
            why += f"than {length} tokens"
            if counts.dropped_documents:
                why += f", and {counts.dropped_documents:,} have no loss token within them"
            if joins:
                why = f"they do not fill a sequence of {length} with a loss token in it"
            lost = counts.dropped_tokens / max(1, counts.tokens)
            how = f"of the {part} tokens were dropped: {why} (data.sequence_tokens)"
            losses.append((lost, how))
        return losses

    def cautions(self) -> list[str]:
        """A sentence about each loss of more than 5 %, and about text that is not used."""
        skipped = self.documents.skipped_records
        records = skipped + len(self.documents.train) + len(self.documents.held_out)
        empty = "of the records are empty and were skipped (data.empty_records)"
        losses = [*self.losses(), (skipped / records, empty)]
        notable = [f"{share:.0%} {what}" for share, what in losses if share > NOTABLE_LOSS]
        if unused := self.documents.unused_columns:
            keys = " (data.instruction_column, data.input_column and data.output_column read three)"
            where = f"column{'s' * (len(unused) > 1)} {listed(unused, 5)}"
            how = keys if self.documents.kind == "completions" else ""
            notable.append(f"the text in the {where} of the records is not used{how}")
        return notable

    def check_losses(self) -> None:
        """Raise SourceError if more than `most_lost` of a part is missing."""
        most = self.cutting.most_lost
        if problems := [f"{share:.0%} {what}" for share, what in self.losses() if share > most]:
            raise SourceError(
                f"{'; '.join(problems)}. Change that setting, or set data.most_lost above "
                f"{most} to train on the rest"
            )

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Tensor]]:
        """Held-out prompts: their text, and ids [tokens] as in training. A prompt is all before the
        first answer of a document, or the start of a sequence of running text."""
        from qwlora.data.sequences import IGNORED

        held_out = self.held_out
        for number, document in enumerate(self.documents.held_out):
            if isinstance(document, Text):
                starts = (ids[:PROMPT_TOKENS] for ids, _ in held_out.rows())
                yield from ((str(tokenizer.decode(s, skip_special_tokens=True)), s) for s in starts)
                return
            if isinstance(document, Completion):
                document = document.as_conversation()
            asked = takewhile(lambda m: m["role"] != ASSISTANT, document.messages)
            text = "\n\n".join(filter(None, (m.get("content") for m in asked)))
            ids, labels = (
                t[held_out.documents == number] for t in (held_out.input_ids, held_out.labels)
            )
            # A document without a loss token in its first `sequence_tokens` is not there.
            if text and (in_loss := labels != IGNORED).any():
                yield text, ids[: int(in_loss.int().argmax())]

    def training_runs(
        self, number: int, tokenizer: PreTrainedTokenizerBase
    ) -> list[list[dict[str, Any]]]:
        """A training sequence to look at: for each of its documents, runs of tokens that are all in
        the loss or not, {text, tokens, in_loss}."""
        from qwlora.data.sequences import IGNORED

        if not 0 <= number < len(self.train):
            raise SourceError(
                f"training sequence {number} does not exist; choose one from 0 to "
                f"{len(self.train) - 1}"
            )
        item = self.train[number]
        ids, in_loss = item["input_ids"].tolist(), (item["labels"] != IGNORED).tolist()
        positions = item["position_ids"].tolist() if "position_ids" in item else range(len(ids))
        starts = [i for i, position in enumerate(positions) if position == 0]
        documents = []
        for start, stop in pairwise([*starts, len(ids)]):
            # Padding has no mark of its own: it is an id that repeats at the end, without loss.
            end = stop
            while end - start > 1 and not in_loss[end - 1] and ids[end - 1] == ids[end - 2]:
                end -= 1
            is_padding = end - start == 1 < stop - start and not in_loss[start]
            if is_padding:
                continue
            runs = []
            for is_in, numbers in groupby(range(start, end), key=in_loss.__getitem__):
                run = [ids[number] for number in numbers]
                text = tokenizer.decode(run, clean_up_tokenization_spaces=False)
                runs.append({"text": text, "tokens": len(run), "in_loss": is_in})
            documents.append(runs)
        return documents


def prepare_text(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    cutting: Cutting,
    track: Track = untracked,
) -> PreparedText:
    """Tokenize and pack both parts; see `encode_documents` and `cut_into_sequences`.

    Raises:
        SourceError: a part is empty, or lost more than `cutting.most_lost`.
    """
    from qwlora.data.sequences import cut_into_sequences, joined_ids

    kind, packing = documents.kind, cutting.packing_of(documents.kind)
    start = start_tokens(tokenizer) if kind == "text" else []
    tokens = cutting.sequence_tokens
    # A model may lack the padding token of its tokenizer.
    padding = tokenizer.eos_token_id or 0
    train_tokens, held_out_tokens = (
        encode_documents(part, tokenizer, cutting.turns, cutting.prompt_format, track)
        for part in (documents.train, documents.held_out)
    )
    train, train_counts = cut_into_sequences(
        train_tokens, tokens, packing, start, padding, "training"
    )
    # A perplexity must not depend on a document's neighbors, so held-out ones share no sequence.
    alone = "none" if packing == "documents" else packing
    held_out, held_out_counts = cut_into_sequences(
        held_out_tokens, tokens, alone, start, padding, "held-out"
    )
    prepared = PreparedText(
        documents,
        cutting,
        train,
        held_out,
        joined_ids(train_tokens, tokens, start, "training"),
        train_counts,
        held_out_counts,
        kind == "conversations"
        or (kind == "completions" and renders_pairs(tokenizer, cutting.prompt_format)),
    )
    prepared.check_losses()
    return prepared


def caution_lines(texts: Mapping[str, PreparedText]) -> Iterator[str]:
    """Cautions about texts; several are told apart by their names."""
    for name, text in texts.items():
        of = f"data of {name}: " if len(texts) > 1 else ""
        yield from (f"caution: {of}{caution}" for caution in text.cautions())


def summary(description: dict[str, Any], name: str | None = None) -> str:
    """The section `data` of results.json in one line; `name` tells several texts apart."""
    form = ""
    if description["kind"] == "completions":
        form = " with the chat template" if description["chat_template"] else " as plain text"
    keys = ["documents", "tokens", "sequences", "loss_tokens"]
    keys += ["truncated_documents", "dropped_documents", "dropped_tokens"]
    parts = []
    for part, label in (("train", "training"), ("held_out", "held out")):
        counts = {key: description[part][key] for key in keys}
        named = {k.removesuffix("s") if n == 1 else k: n for k, n in counts.items() if n}
        words = [f"{n:,} {key.replace('_', ' ')}" for key, n in named.items()]
        parts.append(f"{label} {', '.join(words)}")
    removed = {
        "skipped_records": "empty records skipped",
        "repeated_documents": "held-out documents removed because they are trained on",
        "repeated_paragraphs": "training paragraphs removed because they are held out",
    }
    parts += [f"{words}: {n:,}" for key, words in removed.items() if (n := description[key])]
    of = "data" if name is None else f"data of {name}"
    kind = f"{description['kind']}{form}, packing {description['packing']}"
    return f"{of} ({kind}): " + "; ".join(parts)
