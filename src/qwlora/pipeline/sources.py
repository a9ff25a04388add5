"""The texts and the model that a recipe names, as inputs of stages: by digest, never by path.

Looking at a job reads none of them, and some may be gone. Such an input is `Unread`. Only a stage
that runs needs the file, and complains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from qwlora.data.document import Documents
from qwlora.data.read_source import load_documents
from qwlora.errors import QwloraError
from qwlora.formats.model_source import content_files, fetch, is_hub_id, source_path
from qwlora.recipe import Data, Recipe
from qwlora.system.progress import Track, one_step, untracked
from qwlora.system.seen import Seen


class Unread:
    """An input that was not read, or cannot be (`error`)."""

    def __init__(self, error: Exception | None = None):
        self.error = error


def filled(inputs: Any, known: Any) -> Any:
    """`inputs` with what is unread taken from `known`, the inputs of a record, where it has it."""
    # So a job whose text was moved after training stays current, and can be exported and pushed.
    if isinstance(inputs, Unread):
        return "not read" if known is None else known
    if isinstance(inputs, dict):
        old = known if isinstance(known, dict) else {}
        return {key: filled(value, old.get(key)) for key, value in inputs.items()}
    if isinstance(inputs, list):
        same = isinstance(known, list) and len(known) == len(inputs)
        return [filled(v, known[n] if same else None) for n, v in enumerate(inputs)]
    return inputs


def unread(inputs: Any) -> Iterable[Unread]:
    """The unread ones of `inputs`."""
    if isinstance(inputs, Unread):
        yield inputs
    elif isinstance(inputs, dict | list):
        for value in inputs.values() if isinstance(inputs, dict) else inputs:
            yield from unread(value)


class Sources:
    """The texts and files that a recipe names.

    Args:
        seen: digests of the model's files and of adapters to continue from.
        reads: False to look at a job only.
        is_new: nothing was made yet, so that what cannot be read is an error at once.
        holds_floats: whether the model is a float model, if it is known.
    """

    def __init__(
        self,
        recipe: Recipe,
        seen: Seen | None = None,
        track: Track = untracked,
        *,
        reads: bool = True,
        is_new: bool = True,
        holds_floats: bool | None = None,
    ):
        self.recipe, self.reads, self._track = recipe, reads, track
        self._seen, self.is_new, self._holds_floats = seen or Seen(), is_new, holds_floats
        self._loaded: dict[Any, Documents | Exception] = {}

    def documents(self, data: Data) -> Documents:
        """The documents of a data section that has a source."""
        assert data.source is not None
        key = (data.source, data.held_out, data.reading())
        if key not in self._loaded:
            source, held_out, reading = key
            # Errors are kept as well: many stages ask for one text, which may be large.
            try:
                with one_step(self._track, f"reading {source}"):
                    loaded = load_documents(source, held_out, self.recipe.seed, reading)
                self._loaded[key] = loaded
            except (QwloraError, OSError) as error:
                self._loaded[key] = error
        if isinstance(documents := self._loaded[key], Exception):
            raise documents
        return documents

    def text(self, data: Data, **counts: int) -> dict[str, Any]:
        """The documents of a text, how they are cut into sequences, and how many are used."""
        inputs: dict[str, Any] = dict.fromkeys(("source", "prompt_format", "turns"), Unread())
        inputs |= {"packing": data.packing or Unread(), "sequence_tokens": data.sequence_tokens}
        if data.chat_template:
            inputs["chat_template"] = Unread()
        if self.reads:
            try:
                documents, template = self.documents(data), data.read_template()
            except (QwloraError, OSError) as error:
                if self.is_new:
                    raise
                inputs["source"] = Unread(error)
            else:
                # A key without an effect on this kind of text is one value, so that changing it
                # makes no stage run again.
                kind = documents.kind
                inputs |= {"source": documents.digest, "packing": data.cutting().packing_of(kind)}
                inputs["prompt_format"] = data.prompt_format if kind == "completions" else "none"
                inputs["turns"] = data.turns if kind == "conversations" else "together"
                if template is not None:
                    inputs["chat_template"] = hashlib.sha256(template.encode()).hexdigest()
        return inputs | counts

    def files(self, paths: Iterable[Path]) -> dict[str, Any]:
        return {path.name: self._seen.content(path) for path in paths}

    @property
    def model(self) -> dict[str, Any]:
        """Digests of the model's files, and what changes how they are read."""
        inputs = {"source": self._model_files, "holds_floats": self.holds_floats}
        trusts = self.recipe.model.trust_remote_code
        return inputs | ({"trust_remote_code": True} if trusts else {})

    @cached_property
    def _model_files(self) -> Any:
        if not self.reads:
            return Unread()
        try:
            location = fetch(self.recipe.model.source)
            if location.gguf_file:
                return {"gguf": self._seen.content(location.path)}
            return self.files(location.files)
        except (QwloraError, OSError) as error:
            if self.is_new:
                raise
            return Unread(error)

    @cached_property
    def holds_floats(self) -> bool:
        """Whether there is a float model to compare with, or only integers."""
        # The plan depends on it, so of a model that is gone the base's record says what it was.
        if self._holds_floats is not None and not self.reads:
            return self._holds_floats
        try:
            return fetch(self.recipe.model.source).holds_floats
        except (QwloraError, OSError):
            if self.is_new and self.reads:
                raise
            return bool(self._holds_floats)

    def adapter(self, source: str) -> Any:
        """Digests of an imported adapter's files; the hub id if the adapter is on the hub."""
        try:
            folder = source_path(source)
        except QwloraError as error:
            return Unread(error)
        if folder.is_dir():
            return self.files(content_files(folder)) if self.reads else Unread()
        return source if is_hub_id(source) else Unread()

    def file(self, path: str) -> Any:
        digest = self._seen.content(path) if self.reads else None
        return Unread() if digest is None else digest
