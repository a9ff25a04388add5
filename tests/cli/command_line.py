"""`qwlora ARGUMENTS` in this process: a new one takes seconds to import torch and transformers."""

from __future__ import annotations

import contextlib
import io
import warnings
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

import typer.main

from qwlora.cli.main import main

_get_command = cache(typer.main.get_command)  # of the same application: 26 ms each time


def qwlora(*arguments: object, cwd: Path | None = None) -> CompletedProcess[str]:
    """Exit code, standard output and standard error of a command."""
    words = ["qwlora", *map(str, arguments)]
    out, errors = io.StringIO(), io.StringIO()
    with (
        mock.patch("sys.argv", words),
        mock.patch("typer.main.get_command", _get_command),
        mock.patch("warnings.formatwarning", warnings.formatwarning),  # `main` sets it
        warnings.catch_warnings(),
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        warnings.simplefilter("default")
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    assert isinstance(code, int)
    return CompletedProcess(words, code, out.getvalue(), errors.getvalue())


def refused(*arguments: object, cwd: Path | None = None) -> str:
    """The message of a command that ends with code 2; only `push` says before what it would do."""
    done = qwlora(*arguments, cwd=cwd)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done
    assert not done.stdout or arguments[0] == "push"
    return done.stderr


def answered(*arguments: object) -> str:
    """What a command that ends well prints."""
    done = qwlora(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout
