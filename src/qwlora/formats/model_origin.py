"""Where a model came from and its license, as far as its own files say. Nothing is guessed.

checkpoint folder   the metadata of its README.md (a model card): license, license_name,
                    license_link. The hub id if the folder is in the hub's cache
GGUF file           general.license, general.license.name, general.license.link; the hub id
                    from general.source.huggingface.repository, general.source.repo_url or
                    general.repo_url
hub id              the id itself, and the metadata of its README.md, the only file downloaded
base folder         as for a checkpoint folder
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from qwlora.errors import QwloraError, SourceError
from qwlora.formats.card_mark import one_line
from qwlora.formats.model_source import CARD, downloaded, locate

UNKNOWN = "unknown"  # the hub's own word, which it shows as such
_ID = r"[\w.-]+/[\w.-]+?"


@dataclass(frozen=True)
class ModelCardInfo:
    """What a model's files say about it.

    Args:
        name: the last part of its id or path, to show to people.
        repository: its hub id; None if no file says it.
        license: as the hub writes it, such as `apache-2.0`; None if no file says it.
        license_name, license_link: of a license that the hub does not know (`license: other`).
        stated_in: where the license was found, in words.
    """

    name: str
    repository: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    stated_in: str = ""


def origin_of(source: str) -> ModelCardInfo:
    """The origin of the model that a recipe names. Only its name and hub id if it is gone."""
    name = source.rstrip("/").rpartition("/")[2] or source
    try:
        location = locate(source)
        if location.gguf_file and location.files:
            return _of_gguf(name, location.path)
    except (QwloraError, OSError):
        return ModelCardInfo(name)
    repository, folder = None, location.path
    if not location.files:
        repository = location.pretrained
        try:
            folder = downloaded("model", repository, (CARD,), ("*/*",))
        except SourceError:
            return ModelCardInfo(name, repository)
    for cached, below in pairwise(folder.absolute().parts):
        # a folder of the hub's cache: models--OWNER--NAME/snapshots/REVISION
        if repository is None and below == "snapshots" and cached.startswith("models--"):
            repository = cached.removeprefix("models--").replace("--", "/", 1)
    license_keys = _license(card_metadata(folder / CARD))
    return ModelCardInfo(name, repository, *license_keys, f"{CARD} of the model")


def public_name(source: str) -> str:
    """The hub id of a model, or its name without folders of this machine."""
    origin = origin_of(source)
    return origin.repository or origin.name


def _of_gguf(name: str, path: Path) -> ModelCardInfo:
    from qwlora.formats.gguf.gguf_file import GgufFile

    data = GgufFile(path).metadata
    keys = ("license", "license.name", "license.link")
    license_keys = _license({key.replace(".", "_"): data.get(f"general.{key}") for key in keys})
    repository = str(data.get("general.source.huggingface.repository", ""))
    urls = [str(data.get(f"general.{key}", "")) for key in ("source.repo_url", "repo_url")]
    matches = [
        re.fullmatch(f"({_ID})", repository),
        *(re.fullmatch(f"https?://huggingface\\.co/({_ID})/?", url) for url in urls),
    ]
    stated = next((match[1] for match in matches if match), None)
    return ModelCardInfo(name, stated, *license_keys, "general.license of the model's GGUF file")


def _license(data: Mapping[str, Any]) -> tuple[str | None, str | None, str | None]:
    stated, name, link = (
        one_line(value) or None if isinstance(value := data.get(key), str) else None
        for key in ("license", "license_name", "license_link")
    )
    return (None, None, None) if stated == UNKNOWN else (stated, name, link)


def card_metadata(path: Path) -> dict[str, Any]:
    """The metadata at the top of a model card; empty if there are none that can be read."""
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
