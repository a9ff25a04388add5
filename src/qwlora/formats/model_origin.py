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
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from qwlora.errors import QwloraError, SourceError
from qwlora.formats.card_mark import one_line
from qwlora.formats.hub import downloaded
from qwlora.formats.model_source import CARD, Location, locate

UNKNOWN = "unknown"  # the hub's own word, which it shows as such
_ON_HUB = re.compile(r"https?://huggingface\.co/([\w.-]+/[\w.-]+?)/?")


@dataclass(frozen=True)
class Origin:
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


def origin_of(source: str) -> Origin:
    """The origin of the model that a recipe names. Only its name and hub id if it is gone."""
    name = source.rsplit("+", 1)[0].rstrip("/").rpartition("/")[2] or source
    try:
        location = locate(source)
    except (QwloraError, OSError):
        return Origin(name)
    if not location.files:
        return _on_hub(name, location.pretrained)
    read = _of_gguf if location.gguf_file else _of_folder
    found = read(name, location.path)
    return replace(found, repository=found.repository or _cached_id(location))


def public_name(source: str) -> str:
    """The hub id of a model, or its name without folders of this machine."""
    origin = origin_of(source)
    return origin.repository or origin.name


def _on_hub(name: str, repository: str) -> Origin:
    try:
        folder = downloaded("model", repository, (CARD,), ("*/*",))
    except SourceError:
        return Origin(name, repository)
    return replace(_of_folder(name, folder), repository=repository)


def _of_folder(name: str, folder: Path) -> Origin:
    data = card_metadata(folder / CARD)
    return Origin(name, None, *_license(data), f"{CARD} of the model")


def _of_gguf(name: str, path: Path) -> Origin:
    from qwlora.formats.gguf.gguf_file import GgufFile

    try:
        data = GgufFile(path).metadata
    except (QwloraError, OSError):
        return Origin(name)
    keys = ("license", "license.name", "license.link")
    stated = _license({key.replace(".", "_"): data.get(f"general.{key}") for key in keys})
    return Origin(name, _repository_in(data), *stated, "general.license of the model's GGUF file")


def _license(data: Mapping[str, Any]) -> tuple[str | None, str | None, str | None]:
    stated, name, link = (
        one_line(value) or None if isinstance(value := data.get(key), str) else None
        for key in ("license", "license_name", "license_link")
    )
    return (None, None, None) if stated == UNKNOWN else (stated, name, link)


def _repository_in(data: Mapping[str, Any]) -> str | None:
    given = data.get("general.source.huggingface.repository")
    if isinstance(given, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", given):
        return given
    for key in ("general.source.repo_url", "general.repo_url"):
        if match := _ON_HUB.fullmatch(str(data.get(key, ""))):
            return match[1]
    return None


def _cached_id(location: Location) -> str | None:
    """The hub id of a folder `models--OWNER--NAME/snapshots/REVISION` of the hub's cache."""
    parts = location.path.absolute().parts
    for folder, below in pairwise(parts):
        if below == "snapshots" and folder.startswith("models--"):
            return folder.removeprefix("models--").replace("--", "/", 1)
    return None


def card_metadata(path: Path) -> dict[str, Any]:
    """The metadata at the top of a model card; empty if there are none that can be read."""
    try:
        text = path.read_text(encoding="utf-8")
        match = re.match(r"---\r?\n(.*?)\r?\n---\s*(?:\r?\n|$)", text, re.DOTALL)
        found = yaml.safe_load(match[1]) if match else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
