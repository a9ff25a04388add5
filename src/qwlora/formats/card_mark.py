"""README.md files that QWLoRA writes: text of others in them, and whether a user edited one since.

An edited file is never replaced. What a model's own files say (license, names, links) is shown as
one line of escaped characters, so that it cannot write headings, tables or HTML of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

CARD_MARK = "<!-- Written by QWLoRA. Delete this line to keep your own changes. -->"
_PEFT_TEMPLATE = "[More Information Needed]"  # in the card that PEFT writes next to an adapter


MOST_CHARACTERS = 200


def one_line(text: str) -> str:
    """`text` without line breaks and invisible characters, cut after `MOST_CHARACTERS`."""
    visible = "".join(c if c.isprintable() else " " for c in text[: 10 * MOST_CHARACTERS])
    line = " ".join(visible.split())
    return line if len(line) <= MOST_CHARACTERS else f"{line[:MOST_CHARACTERS]}..."


def escaped(text: str) -> str:
    """`text` as one line of Markdown that shows it letter by letter."""
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
