"""`qwlora push`: upload the base or an adapter of a job to the Hugging Face hub.

qwlora push DIR --to owner/base                          the base
qwlora push DIR --adapter NAME --to owner/adapter        an adapter
"""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from qwlora.cli.shared_arguments import Job, Yes

Repository = Annotated[
    str,
    typer.Option(
        "--to",
        metavar="OWNER/NAME",
        help="The repository on the hub. Created if it does not exist.",
    ),
]
Name = Annotated[
    str | None, typer.Option("--adapter", help="The adapter to upload. Default: the base.")
]
Public = Annotated[
    bool,
    typer.Option(
        "--public", help="Create a public repository, or upload to one. Default: private."
    ),
]
License = Annotated[
    str | None,
    typer.Option(
        "--license",
        help="License for the model card, as the hub writes it, for example apache-2.0. Default: "
        "for a base, what the model's files state; otherwise unknown.",
    ),
]


def push(
    job: Job,
    repository: Repository,
    adapter: Name = None,
    public: Public = False,
    license: License = None,
    yes: Yes = False,
) -> None:
    """Upload the base or an adapter to the hub.

    With its model card and its exported files, to the Hugging Face hub. Shows what would be
    uploaded and asks first. Uses the token of `hf auth login` or HF_TOKEN.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository):
        raise typer.BadParameter(f"{repository!r} is not OWNER/NAME", param_hint="--to")
    from qwlora.errors import UploadError
    from qwlora.messages import size
    from qwlora.pipeline.commands.push import prepared, send

    with prepared(job, repository, adapter, is_private=not public, license=license) as upload:
        kind = "private" if upload.is_private else "public"
        print(
            f"{upload.what}: {len(upload.files)} files, {size(upload.size_bytes)}, to {repository} "
            f"({kind})"
        )
        for name in sorted(upload.files):
            print(f"  {name}")
        for name in upload.outdated:
            print(f"  {name} is deleted there: an earlier upload of this job")
        for note in upload.notes:
            print(f"note: {note}")
        if not yes:
            if not sys.stdin.isatty():
                raise UploadError("nothing was uploaded; confirm with --yes")
            typer.confirm("Upload?", abort=True)
        print(send(upload, job))
