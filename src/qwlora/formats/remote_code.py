"""The error for models that need Python code from their own folder (`trust_remote_code`)."""

from __future__ import annotations

from qwlora.errors import SourceError


def refuse_remote_code(what: str, error: Exception) -> None:
    """Raise a SourceError if `error` is the refusal of transformers to run the model's own code.

    Does nothing for any other error; the caller then handles it.

    Args:
        what: the model, for the message.
        error: what transformers raised.
    """
    if "trust_remote_code" in str(error):
        raise SourceError(
            f"{what} needs Python code from its own folder (auto_map in config.json or "
            "tokenizer_config.json), and QWLoRA does not run it by default. Read the code; if you "
            "trust it, set model.trust_remote_code: true in the recipe"
        ) from error
