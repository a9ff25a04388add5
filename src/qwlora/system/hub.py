"""Upload files to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from qwlora.errors import QwloraError, UploadError, described


def commit_files(
    repository: str,
    files: Mapping[str, Path],
    outdated: Iterable[str],
    what: str,
    others: Mapping[str, str],
    is_private: bool,
    begin: Callable[[], None],
) -> str:
    """Upload files as one commit, and return its address.

    Args:
        repository: `owner/name`; it is created if it does not exist.
        files, outdated: to upload, by path in the repository, and to delete there.
        what: is uploaded, in words.
        others: files that a repository of something else has, and what it then holds.
        is_private: whether a new repository is private, and an existing one has to be.
        begin: called when everything was checked, before anything is sent.

    Raises:
        UploadError: there is no token; the hub refuses, or cannot be reached; or the repository is
            public although it should be private, or holds something else.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise UploadError(
            "there is no token for the hub. Run `hf auth login`, or set HF_TOKEN to a token that "
            "may write"
        )
    api, is_sent = HfApi(), False
    try:
        # A repository that exists keeps its visibility, whatever is asked for here.
        api.create_repo(repository, private=is_private, exist_ok=True)
        if is_private and not api.model_info(repository).private:
            raise UploadError(
                f"{repository} is a public repository. Nothing was uploaded. Give --public to "
                "upload to it, or another --to"
            )
        # A base and an adapter have files of the same name, such as README.md.
        there = api.list_repo_files(repository)
        if mixed := [name for name in others if name in there]:
            raise UploadError(
                f"{repository} holds {others[mixed[0]]} ({mixed[0]}), and {what} would mix with "
                "it. Nothing was uploaded. Give another --to"
            )
        begin()
        added = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        gone = [CommitOperationDelete(name) for name in outdated if name in there]
        is_sent = True
        message = f"Upload {what} with QWLoRA"
        # One commit, so that a reader sees all files or none.
        commit = api.create_commit(repository, [*added, *gone], commit_message=message)
        return str(commit.commit_url)
    except QwloraError:
        raise
    # huggingface_hub raises many types: offline, forbidden, too large ...
    except Exception as error:
        # Without an answer of the hub, the commit may have been made all the same.
        if is_sent and not isinstance(error, HfHubHTTPError):
            raise UploadError(
                f"{repository}: the connection ended before the hub answered, so it is not known "
                f"whether the files were uploaded: {described(error)}. Run the command again",
                may_have_happened=True,
            ) from error
        raise UploadError(
            f"{repository}: nothing was uploaded: {described(error)}. Check the token (`hf auth "
            "login`, or HF_TOKEN), that it may write there, the network and HF_ENDPOINT"
        ) from error
