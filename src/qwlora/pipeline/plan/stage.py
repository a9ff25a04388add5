"""A stage of a job, and the texts of a recipe that keys of stages depend on. Imports no torch.

A stage's key is a hash of everything its result depends on:

    its section of the recipe, the revisions of the package and of the algorithms that it runs,
    the content of its text or model, the keys of the stages that it needs

So a change reruns exactly the stages that it affects.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from qwlora.data import Documents, load_documents
from qwlora.recipe import Data, Recipe
from qwlora.system.progress import Track, one_step, untracked

VERBS = ("quantize", "calibrate-base", "train", "calibrate", "export", "verify", "evaluate")

ZERO, CASES = "calibrate/_base", "calibrate/_use_cases"  # no adapter can have these names

# What stages write, in a job's directory.
MOMENTS = "moments"  # second moments of the base's layers, in base/
SOLVER_SCALES = "tuning/solver_scales.safetensors"  # scales before tuning, in base/
BASE_SIMULATION = "base_simulation"  # encodings of the base without an adapter; workflow qwa-lora
SHARED = "simulation/_shared"  # encodings that adapters share
ADAPTER = "adapter"  # in simulation/NAME/: the adapter as it was calibrated
ZERO_ADAPTER = "simulation/_base"  # of bundles of simulations
USE_CASES = "simulation/_use_cases"  # of export.use_cases


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: `verb` or `verb/...`; unique.
        key: hash of everything the result depends on.
        adapter: name of the adapter that the stage works on, if any.
        artifact: the folder that the stage writes, relative to the job's directory.
        needs: names of the stages whose results it reads.
        work_key: hash of everything that unfinished work depends on; may cover less than `key`.
    """

    name: str
    key: str
    adapter: str | None = None
    artifact: str | None = None
    needs: tuple[str, ...] = ()
    work_key: str = ""

    @property
    def verb(self) -> str:
        """The command that runs the stage."""
        return self.name.partition("/")[0]


class JobTexts:
    """The documents of the texts of a recipe. Each source is read once."""

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


def hash_json(content: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
