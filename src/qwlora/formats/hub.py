"""Downloads from the Hugging Face hub into its client's own cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qwlora.errors import SourceError
from qwlora.formats.user_path import looked_for


def downloaded(
    what: str, repository: str, files: Sequence[str], ignored: Sequence[str] | None = None
) -> Path:
    """Download files of `repository` and return their local folder.

    Args:
        what: `model` or `adapter`, for the message.
        repository: the hub id, `owner/name`.
        files: globs of the files to download.
        ignored: globs of files not to download even if `files` matches them.

    Raises:
        SourceError: the repository does not exist, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository,
                allow_patterns=list(files),
                ignore_patterns=None if ignored is None else list(ignored),
            )
        )
    except Exception as error:  # the client raises many types: offline, not found, private ...
        raise SourceError(
            f"{what} {repository!r} is not a local path{looked_for(repository, Path(repository))}, "
            f"and cannot be downloaded from the hub either:\n  {error}"
        ) from error
