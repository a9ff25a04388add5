"""Every error that QWLoRA raises on purpose, and parts of their messages.

    QwloraError
     ├── RecipeError        (ValueError)       the recipe asks for something impossible
     ├── SourceError        (ValueError)       a model or data source is missing or unusable
     ├── GridError          (ValueError)       a scheme, encoding or codes do not fit a tensor
     ├── FingerprintError   (ValueError)       an artifact belongs to another base, or was changed
     ├── DirectoryError     (OSError)          an output directory or file cannot be used
     ├── MergeError         (RuntimeError)     an adapter cannot be merged into packed integers
     ├── ProcessError       (RuntimeError)     another process of the run failed
     ├── TrainingError      (RuntimeError)     training would change the base, or the loss diverged
     ├── CaptureError       (RuntimeError)     the captured graph computes something else
     ├── CalibrationError   (ValueError)       a tensor cannot be calibrated from its data
     ├── ExportError        (RuntimeError)     a target format cannot hold what was asked
     ├── EncodingsFileError (ValueError)       an encodings file is not valid in its version
     ├── ConversionError    (ValueError)       converting an encodings file would lose something
     ├── VerificationError  (RuntimeError)     an exported file computes something else
     ├── UploadError        (RuntimeError)     the hub refused an upload, or cannot be reached
     ├── NonFiniteError     (ArithmeticError)  a result is NaN or infinite
     ├── DeviceError        (RuntimeError)     a device is missing, or has too little memory
     └── MissingExtraError  (ImportError)      an optional package is not installed

Each class is also the builtin in parentheses, so callers may catch either. A message says what was
found, where, and what to do.

Other libraries raise their own errors for damaged or hostile files. Code that hands them a file
does so inside `reading(file)`, which puts the file's name on the error.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

# ASCII and Latin-1 controls except tab and newline; characters that reorder or break a line
# (bidirectional controls, U+2028, U+2029); halves of surrogate pairs, which no stream can encode
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    """`text` with control characters as escapes such as `\\x1b`; tabs and newlines stay."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def shortened(text: str, most: int = 2000) -> str:
    """`text`, cut after `most` characters; the number of omitted characters is added."""
    if len(text) <= most:
        return text
    return f"{text[:most]}... ({len(text) - most:,} more characters)"


def listed(items: Iterable[object], most: int = 5) -> str:
    """`a, b, c, d, e and 7 more`, or `none`."""
    names = [str(item) for item in items]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or "none"


def lines(items: Sequence[str], most: int = 5) -> list[str]:
    """The first items and, if there are more, a last line such as `and 7 more`."""
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return [*items[:most], *more]


def near_names(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names with a spelling similar to `name`, closest first; case is ignored.

    If no whole name is similar, their last parts are compared: `*.up_prj` and
    `layers.0.mlp.up_proj`.
    """
    # Each comparison takes about 10 us, and a model with experts has many names.
    known = list(dict.fromkeys(islice(names, 2000)))
    for part in (str, lambda dotted: dotted.rpartition(".")[2]):
        spellings = {part(full).lower(): full for full in reversed(known)}
        if near := difflib.get_close_matches(part(name).lower(), spellings, count, 0.5):
            return [spellings[spelling] for spelling in near]
    return []


def suggestion(name: str, names: Collection[str], count: int = 1) -> str:
    """The end of a message about an unknown name: similar names, or else the known ones."""
    if near := near_names(name, names, count):
        return f"; did you mean {' or '.join(near)}?"
    return f"; there are {listed(names, 20)}"


_EXPECTED = {  # types of pydantic's errors, and what was expected; in braces: of the context
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **{"finite_number": "a finite number", "bool_type": "true or false", "string_type": "text"},
    **dict.fromkeys(("dict_type", "model_type"), "keys with values"),
    **{"list_type": "a list", "literal_error": "{expected}", "none_required": "null"},
    **{"greater_than": "more than {gt}", "greater_than_equal": "at least {ge}"},
    **{"less_than": "less than {lt}", "less_than_equal": "at most {le}", "missing": "a value"},
    **{"string_too_short": "some text", "string_too_long": "at most {max_length} characters"},
    **{"too_short": "at least {min_length} in it", "too_long": "at most {max_length} in it"},
}


def expected(problem: Mapping[str, Any]) -> str:
    """What a value should be, from an entry of pydantic's `errors()`: `a whole number`."""
    words: str = _EXPECTED.get(problem["type"], "another value")
    return words.format(**problem.get("ctx", {}))


def problem_text(problem: Mapping[str, Any]) -> str:
    """The whole entry: `groups.0.bits is 'x'; it must be a whole number`."""
    key, found = ".".join(map(str, problem["loc"])), shortened(repr(problem["input"]), 80)
    return f"{key} is {found}; it must be {expected(problem)}"


def duration(seconds: float) -> str:
    """`0:12:30`"""
    return str(timedelta(seconds=round(seconds)))


def size(count_bytes: float) -> str:
    """`45.6 kB`, `149.5 MB`, `1.9 GB`: decimal, one decimal."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count_bytes >= factor:
            return f"{count_bytes / factor:,.1f} {unit}"
    return f"{count_bytes / 1e3:.1f} kB"


LESS_MEMORY = (
    "Free memory, or use less: a smaller model, smaller data.sequence_tokens or "
    "adapters.batch_sequences, or gradient_checkpointing: true"
)
_NOTE = "while reading "
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# In the text of torch's allocators. That of a CPU raises a bare RuntimeError.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class QwloraError(Exception):
    """Base class: catches every error that QWLoRA raises on purpose."""


class QwloraWarning(UserWarning):
    """Base class of every warning that QWLoRA gives; the command line prints it in one line."""


class RecipeError(QwloraError, ValueError):
    """The recipe cannot be followed; `problems` lists every finding, so one edit fixes them all."""

    def __init__(self, source: str, problems: Sequence[str]):
        self.source, self.problems = source, tuple(problems)
        super().__init__(_report(f"{source}: {_counted(problems)} in the recipe", problems))


class SourceError(QwloraError, ValueError):
    """A model or data source is missing, empty, damaged or of an unknown kind."""


class GridError(QwloraError, ValueError):
    """A scheme, an encoding or codes do not fit the tensor that they are applied to."""


class FingerprintError(QwloraError, ValueError):
    """Artifacts that must share a base do not, or a file differs from the digest saved with it."""


class DirectoryError(QwloraError, OSError):
    """An output directory or file belongs to something else, or cannot be written."""

    def __str__(self) -> str:
        return str(self.args[0])


class MergeError(QwloraError, RuntimeError):
    """An adapter cannot be merged: rounding its update to the base's integers would lose it."""


class DeviceError(QwloraError, RuntimeError):
    """The device that `device` names is not there, or is out of memory."""


class ProcessError(QwloraError, RuntimeError):
    """Another process of the run failed or was stopped, so this one cannot finish its part."""


class TrainingError(QwloraError, RuntimeError):
    """Training would change the base, or the loss is NaN or infinite."""


class CaptureError(QwloraError, RuntimeError):
    """torch.export cannot capture the model, or its graph computes other values."""


class CalibrationError(QwloraError, ValueError):
    """A tensor received no data, or values that no grid can hold (NaN, infinity)."""


class ExportError(QwloraError, RuntimeError):
    """The target format cannot hold what was simulated."""


class EncodingsFileError(QwloraError, ValueError):
    """An encodings file cannot be read or written; `problems` lists every finding."""

    def __init__(self, source: str, problems: Sequence[str]):
        self.source, self.problems = source, tuple(problems)
        super().__init__(_report(f"{source}: {_counted(problems)}", problems))


class ConversionError(QwloraError, ValueError):
    """A conversion would lose the content in `lost`, or needs content that the file lacks."""

    def __init__(self, what: str, lost: Sequence[str] = ()):
        self.lost = tuple(lost)
        heading = f"{what} would lose this (accept it with convert(..., lossy=True)):"
        super().__init__(_report(heading, lost) if lost else what)


def _counted(problems: Sequence[str]) -> str:
    return "1 problem" if len(problems) == 1 else f"{len(problems)} problems"


def _report(heading: str, items: Sequence[str]) -> str:
    return "\n".join([heading, *(f"  - {shortened(line)}" for line in lines(items, 50))])


class VerificationError(QwloraError, RuntimeError):
    """A runtime's results differ from what was trained by more than the recipe allows.

    Args:
        problems: a sentence for each limit that is exceeded; a part of the message.
        results: what was measured, in the form of results.json.
    """

    def __init__(
        self, what: str, problems: Sequence[str] = (), results: dict[str, Any] | None = None
    ):
        self.problems, self.results = tuple(problems), results
        super().__init__("\n  ".join([what, *map(shortened, lines(self.problems, 50))]))


class UploadError(QwloraError, RuntimeError):
    """The hub refused an upload, or cannot be reached. Nothing was changed there, unless the error
    says that it `may_have_happened`."""

    def __init__(self, message: str, may_have_happened: bool = False):
        self.may_have_happened = may_have_happened
        super().__init__(message)


class NonFiniteError(QwloraError, ArithmeticError):
    """A perplexity or another result is NaN or infinite."""


class MissingExtraError(QwloraError, ImportError):
    """An optional dependency is needed; the message names the extra to install."""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Put `path` on any error raised inside that is not QWLoRA's, as a note (PEP 678)."""
    try:
        yield
    except QwloraError:
        raise
    except Exception as error:
        # The innermost file is the damaged one: an index may name the file that fails.
        if file_being_read(error) is None:
            error.add_note(f"{_NOTE}{path}")
        raise


def file_being_read(error: BaseException) -> str | None:
    """The file that `reading` put on `error`."""
    notes: list[str] = getattr(error, "__notes__", [])
    return next((n.removeprefix(_NOTE) for n in notes if n.startswith(_NOTE)), None)


def described(error: BaseException) -> str:
    """The message of `error`, after its class name if the message is a single word."""
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    name = type(error).__name__
    return text if " " in text else f"{name}: {text}" if text else name


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short: MemoryError, or what torch raises on a CPU or an accelerator."""
    # By name, because the command line must not import torch to print an error.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(w in str(error) for w in _OUT_OF_MEMORY)


def is_out_of_space(error: BaseException) -> bool:
    """Whether a disk was full."""
    # Native writers (safetensors, onnx) say so in their text only.
    is_said = any(words in str(error) for words in ("No space left", "quota exceeded"))
    return is_said or getattr(error, "errno", None) in _FULL_DISK


def remedy_of(error: BaseException) -> str:
    """What to do about an error whose message may not say it."""
    if is_out_of_memory(error):
        return f"{LESS_MEMORY}."
    if isinstance(error, VerificationError):
        return (
            "Do not use the exported files until the check passes. If only the perplexity differs "
            "slightly, raise verify.sequences."
        )
    if isinstance(error, QwloraError | OSError):
        return "Correct what the message names."
    return "This may be a bug: run the command again with --debug and report the traceback."


@contextmanager
def foreign_as(kind: type[QwloraError], what: str, remedy: str = "") -> Iterator[None]:
    """Raise any error of other libraries inside as `kind`: `what: the error; remedy`."""
    # Errors of memory and of full disks pass as they are, for the remedy that `main` knows.
    try:
        yield
    except QwloraError:
        raise
    # mlx-lm exits where it lacks a package.
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error) or is_out_of_space(error):
            raise
        raise kind(f"{what}: {described(error).rstrip('.')}{remedy and f'; {remedy}'}") from error
