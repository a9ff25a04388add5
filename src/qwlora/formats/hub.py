"""Files from the Hugging Face hub, by its own client and in its own cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwlora.errors import SourceError


def downloaded(
    what: str, repository: str, files: Sequence[str], besides: Sequence[str] | None = None
) -> Path:
    """The local folder with those files of `repository` that match one of the globs `files`, and none of `besides`.

    Args:
        what: `model` or `adapter`, for the message.

    Raises:
        SourceError: there is no such repository, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository,
                allow_patterns=list(files),
                ignore_patterns=None if besides is None else list(besides),
            )
        )
    except (
        Exception
    ) as error:  # offline, not found, private: the hub's client has a dozen classes for them
        raise SourceError(
            f"{what} {repository!r}: there is no such path here, and it cannot be had from the hub either:\n  {error}"
        ) from error
