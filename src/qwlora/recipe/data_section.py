"""The data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from qwlora.data import Columns, Cutting, Reading
from qwlora.data.text_files import read_file
from qwlora.recipe.section import Count, Section


class Data(Section):
    """What is learnt from, and how it is cut."""

    source: str = Field(
        description="a text, .json(l), .csv, .tsv, .parquet or .arrow file, a folder of them or of datasets.save_to_disk, python:MODULE:ATTRIBUTE, or a hub id"
    )
    split: str | None = Field(
        None,
        description="split of a dataset that has several, train unless given; of a folder, files named after it, all unless given",
    )
    subset: str | None = Field(
        None, description="configuration of a dataset on the hub that has several"
    )
    text_column: str | None = Field(
        None,
        description="column of running text; columns named text, prompt and completion, or messages are found by themselves",
    )
    prompt_column: str | None = Field(None, description="column of what is given to the model")
    completion_column: str | None = Field(
        None, description="column of what follows the prompt, and is learnt"
    )
    messages_column: str | None = Field(
        None,
        description="column of conversations: lists of {role, content}, of which the assistant's are learnt",
    )
    empty_records: Literal["error", "skip"] = Field(
        "error", description="what to do with a record in which nothing is"
    )
    chat_template: str | None = Field(
        None, description="a file with a chat template in Jinja, in place of the tokenizer's own"
    )
    turns: Literal["together", "apart"] = Field(
        "together",
        description="apart: each of the assistant's turns is a document that ends with it",
    )
    packing: Literal["join", "documents", "none"] | None = Field(
        None,
        description="join: one after another, cut anywhere (running text, unless given); documents: whole ones side by side, blind for each other "
        "(anything else, unless given); none: one a sequence, padded",
    )
    sequence_tokens: Annotated[int, Field(ge=8)] = Field(
        512, description="tokens in a sequence, for training and evaluation alike"
    )
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="share of the text kept from training, split by document"
    )
    evaluation_sequences: Count = Field(
        16, description="held-out sequences that perplexity is measured on, at most"
    )
    calibration_sequences: Count = Field(
        8, description="training sequences that activation ranges are measured on, at most"
    )

    @model_validator(mode="after")
    def _one_kind_of_columns(self) -> Data:
        pair = self.prompt_column or self.completion_column
        asked = [
            n
            for n, given in (
                ("text_column", self.text_column),
                ("prompt_column", pair),
                ("messages_column", self.messages_column),
            )
            if given
        ]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)}: a source is learnt from in one way; give one")
        return self

    def read_template(self) -> str | None:
        """The text of `chat_template`, if one is given.

        Raises:
            SourceError: the file cannot be read, or is not UTF-8.
        """
        return None if self.chat_template is None else read_file(Path(self.chat_template))

    def reading(self) -> Reading:
        """How the source is read."""
        columns = Columns(
            self.text_column, self.prompt_column, self.completion_column, self.messages_column
        )
        return Reading(columns, self.split, self.subset, self.empty_records == "skip")

    def cutting(self) -> Cutting:
        """How documents become sequences."""
        return Cutting(self.sequence_tokens, self.packing, self.turns)
