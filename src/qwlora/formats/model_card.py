"""Origin and license of a model, from its own files; and strangers' text in README.md files.

Nothing is guessed:

    checkpoint folder   the metadata of its README.md (a model card): license, license_name,
                        license_link. The hub id if the folder is in the hub's cache
    GGUF file           general.license, general.license.name, general.license.link; the hub id
                        from general.source.huggingface.repository, general.source.repo_url or
                        general.repo_url
    hub id              the id itself, and the metadata of its README.md, the only file downloaded
    base folder         as for a checkpoint folder

A README.md that a user edited is never replaced.
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
from qwlora.formats.model_source import CARD, downloaded, locate

# The hub's own word, which it shows as such.
UNKNOWN = "unknown"
CARD_MARK = "<!-- Written by QWLoRA. Delete this line to keep your own changes. -->"
MOST_CHARACTERS = 200
# In the card that PEFT writes next to an adapter; the user did not write it.
_PEFT_TEMPLATE = "[More Information Needed]"
_ID = r"[\w.-]+/[\w.-]+?"


@dataclass(frozen=True)
class ModelCardInfo:
    """Name, origin and license of a model; None if no file states it."""

    name: str
    repository: str | None = None
    license: str | None = None
    # The hub has these for a license that it does not know (`license: other`).
    license_name: str | None = None
    license_link: str | None = None
    stated_in: str = ""


def origin_of(source: str) -> ModelCardInfo:
    """The origin of the model that a recipe names; only name and hub id if its files are gone."""
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
    from huggingface_hub.repocard import metadata_load

    try:
        license_keys = _license(metadata_load(folder / CARD) or {})
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        license_keys = _license({})
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
    hub_id = next((match[1] for match in matches if match), None)
    return ModelCardInfo(name, hub_id, *license_keys, "general.license of the model's GGUF file")


def _license(data: Mapping[str, Any]) -> tuple[str | None, str | None, str | None]:
    values = [data.get(key) for key in ("license", "license_name", "license_link")]
    stated, name, link = (one_line(v) or None if isinstance(v, str) else None for v in values)
    return (None, None, None) if stated == UNKNOWN else (stated, name, link)


def one_line(text: str) -> str:
    """`text` without line breaks and invisible characters, cut after `MOST_CHARACTERS`."""
    # Cut first: a stranger's text may be long.
    visible = "".join(c if c.isprintable() else " " for c in text[: 10 * MOST_CHARACTERS])
    line = " ".join(visible.split())
    return line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]}..."


def escaped(text: str) -> str:
    """`text` as one line of Markdown that shows it letter by letter."""
    # So that a stranger's text cannot write headings, tables or HTML in our README.md files.
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", line)


def as_code(text: str) -> str:
    """`text` as one line of code in Markdown."""
    return f"`{one_line(text).replace('`', chr(39))}`"


def marked(text: str) -> str:
    """A README.md of QWLoRA, with `CARD_MARK` at its end."""
    return f"{text.rstrip()}\n\n{CARD_MARK}\n"


def is_users_card(card: Path) -> bool:
    """Whether a README.md was written or edited by the user."""
    text = text_of(card)
    return bool(text) and CARD_MARK not in text and _PEFT_TEMPLATE not in text


def text_of(file: Path) -> str:
    """The text of a file; empty if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
