"""The documents of a job: those of the base, and those of every adapter. Imports no torch."""

from __future__ import annotations

from typing import Any

from qwlora.data import Documents, load_documents
from qwlora.recipe import Data, Recipe
from qwlora.system.progress import Track, one_step, untracked


class JobTexts:
    """The documents of all texts of a recipe. Each source is read once.

    Raises:
        SourceError, MissingExtraError: see `load_documents`.
    """

    def __init__(self, recipe: Recipe, track: Track = untracked):
        self.recipe, self._track = recipe, track
        self._loaded: dict[Any, Documents] = {}
        for data in (*recipe.base_texts(), *recipe.texts().values()):
            self.documents(data)

    def documents(self, data: Data) -> Documents:
        """The documents of a data section that has a source."""
        assert data.source is not None
        key = (data.source, data.held_out, data.reading())
        if key not in self._loaded:
            source, held_out, reading = key
            with one_step(self._track, f"reading {source}"):
                self._loaded[key] = load_documents(source, held_out, self.recipe.seed, reading)
        return self._loaded[key]

    def key(self, data: Data) -> list[Any]:
        """Key inputs for the documents and how they are cut into sequences."""
        documents = self.documents(data)
        packing = data.cutting().packing_of(documents.kind)
        template = data.read_template()
        inputs = [documents.digest, data.sequence_tokens, packing, data.turns, template]
        if documents.kind == "completions" and data.prompt_format != "plain":
            inputs.append(data.prompt_format)
        return inputs


class UnreadTexts(JobTexts):
    """Texts for a plan that is only looked at: nothing is read, and keys say nothing."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe

    def key(self, data: Data) -> list[Any]:
        return []
