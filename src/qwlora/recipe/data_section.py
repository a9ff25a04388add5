"""Recipe section `data`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from qwlora.data import Cutting, Reading, locate_documents
from qwlora.data.records import FIELDS
from qwlora.data.rows import read_text
from qwlora.recipe.section import Count, Section, file, located


class Data(Section):
    """Training, calibration and evaluation text, and how it becomes sequences.

    It is the base's text, and the default of every adapter's. If `source` is not set, every adapter
    has its own, and the base is calibrated on all of them.
    """

    source: Annotated[str, AfterValidator(partial(located, check=locate_documents))] | None = None
    """a .txt, .md, .json, .jsonl, .csv, .tsv, .parquet or .arrow file, a folder of them, a folder
    from datasets.save_to_disk, python:MODULE:ATTRIBUTE, or a hub id"""
    split: str | None = None
    """which split to use. Default: train for datasets; for a folder, all files, or those named
    after the split"""
    subset: str | None = None
    """configuration of a hub dataset that has several"""
    text_column: str | None = None
    """column with running text. Default: columns named text, prompt and completion, messages,
    conversations (ShareGPT), or instruction and output (Alpaca) are recognized"""
    prompt_column: str | None = None
    """column with the prompt, which is not trained on"""
    completion_column: str | None = None
    """column with the completion, which is trained on"""
    messages_column: str | None = None
    """column with conversations, lists of {role, content} or of ShareGPT's {from, value}; only the
    assistant's messages are trained on"""
    instruction_column: str | None = None
    """column with the instruction of Alpaca's records; not trained on"""
    input_column: str | None = None
    """column with what the instruction is about, which may be empty; not trained on"""
    output_column: str | None = None
    """column with the answer to the instruction, which is trained on"""
    empty_records: Literal["error", "skip"] = "error"
    """what to do with an empty record"""
    chat_template: Annotated[str, file("a file with a Jinja template", read_text)] | None = None
    """file with a Jinja chat template, used instead of the tokenizer's"""
    prompt_format: Literal["auto", "plain"] = "auto"
    """prompts and completions, instructions and outputs: auto: as a user's and an assistant's
    message, if the tokenizer has a chat template; plain: as running text, the completion after the
    prompt"""
    turns: Literal["together", "apart"] = "together"
    """together: a conversation is one document; apart: every assistant message ends a document of
    its own"""
    packing: Literal["join", "documents", "none"] | None = None
    """join: concatenate and cut anywhere; documents: pack whole documents into one sequence,
    attention masked between them; none: one document per sequence, padded. Default: join for
    running text, documents otherwise"""
    sequence_tokens: Annotated[int, Field(ge=8)] = 512
    """tokens per sequence, in training and evaluation"""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """share of the documents kept from training for evaluation"""
    evaluation_sequences: Count = 16
    """held-out sequences that perplexity is measured on, at most"""
    calibration_sequences: Count = 8
    """training sequences that activation ranges are measured on, at most. Weights have
    base.calibration_sequences"""

    def problems(self) -> Iterator[str]:
        columns = [
            ("text_column",),
            ("prompt_column", "completion_column"),
            ("messages_column",),
            ("instruction_column", "input_column", "output_column"),
        ]
        asked = [keys[0] for keys in columns if any(getattr(self, key) for key in keys)]
        if len(asked) > 1:
            yield f"{' and '.join(asked)} exclude each other; set only one kind"

    def read_template(self) -> str | None:
        """The text of `chat_template`; None if it is not set.

        Raises:
            SourceError: the file cannot be read, or is not UTF-8.
        """
        return None if self.chat_template is None else read_text(Path(self.chat_template))

    def reading(self) -> Reading:
        """How the source is read."""
        names = {role: getattr(self, f"{role}_column") for role in FIELDS}
        columns = {role: name for role, name in names.items() if name is not None}
        return Reading(columns, self.split, self.subset, self.empty_records == "skip")

    def cutting(self) -> Cutting:
        """How documents become sequences."""
        return Cutting(self.sequence_tokens, self.packing, self.turns, self.prompt_format)
