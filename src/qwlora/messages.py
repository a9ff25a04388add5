"""Parts of messages: lists of names, suggestions for misspelled names, sizes, times, escapes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from itertools import islice

# ASCII and Latin-1 controls except tab and newline; characters that reorder or break a line
# (bidirectional controls, U+2028, U+2029); halves of surrogate pairs, which no stream can encode
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    """`text` with control characters as escapes such as `\\x1b`; tabs and newlines stay."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def shortened(text: str, most: int = 2000) -> str:
    """`text`, cut after `most` characters; the number of those left out is added."""
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

    Dotted names are compared by their last part (`*.up_prj` and `layers.0.mlp.up_proj`), or as a
    whole if the last part is correct or similar to none.
    """
    known = list(dict.fromkeys(islice(names, 2000)))  # each comparison takes about 10 us
    end = _last_part(name).lower()
    same_end = [other for other in known if _last_part(other).lower() == end]
    if "." not in name or not same_end:
        ends: dict[str, str] = {}
        for other in known:
            ends.setdefault(_last_part(other).lower(), other)
        if near := difflib.get_close_matches(end, ends, n=count, cutoff=0.5):
            return [ends[spelling] for spelling in near]
        if "." not in name:
            return []
    spellings = {other.lower(): other for other in same_end or known}
    near = difflib.get_close_matches(name.lower(), spellings, n=count, cutoff=0.4)
    return [spellings[spelling] for spelling in near]


def suggestion(name: str, names: Collection[str], count: int = 1) -> str:
    """The end of a message about an unknown name: similar names, or else the known ones."""
    if near := near_names(name, names, count):
        return f"; did you mean {' or '.join(near)}?"
    return f"; there are {listed(names, 20)}"


def size(count_bytes: int) -> str:
    """`12.3 MB`; below 0.1 MB `45.6 kB`. Both are decimal."""
    return f"{count_bytes / 1e6:,.1f} MB" if count_bytes >= 1e5 else f"{count_bytes / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    """`40 s`, `6 min`, `1 h 20 min`: rounded, for estimates."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    return f"{minutes} min" if not hours else f"{hours} h {rest} min" if rest else f"{hours} h"


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
