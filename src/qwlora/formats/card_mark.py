"""Whether a README.md that QWLoRA wrote was edited since: then it is never replaced."""

from __future__ import annotations

from pathlib import Path

CARD_MARK = "<!-- Written by QWLoRA. Delete this line to keep your own changes. -->"
_PEFT_TEMPLATE = "[More Information Needed]"  # in the card that PEFT writes next to an adapter


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
