"""Preview of a recipe's data: counts, and one training sequence with its loss tokens marked."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from qwlora.data.prepared_data import heading
from qwlora.errors import SourceError
from qwlora.pipeline.job.job_texts import JobTexts
from qwlora.pipeline.running.new_context import new_context
from qwlora.progress import Track, untracked
from qwlora.recipe import Recipe

OPEN, CLOSE = "⟦", "⟧"


def preview(
    recipe: Recipe,
    sequence: int = 0,
    adapter: str | None = None,
    track: Track = untracked,
) -> dict[str, Any]:
    """Counts and one training sequence.

    Args:
        adapter: whose text; default: the first adapter's.

    Returns:
        `data`: counts as in results.json. `documents`: for each document in training sequence
        number `sequence`, a list of runs {text, tokens, learnt}; `learnt` marks loss tokens.

    Raises:
        SourceError: see `load_documents` and `prepare`; or there is no sequence of that number.
    """
    from qwlora.data.sequences import IGNORED

    names = [a.name for a in recipe.adapters]
    if adapter is not None and adapter not in names:
        raise SourceError(f"there is no adapter {adapter!r}; the recipe has {', '.join(names)}")
    context = new_context(recipe, JobTexts(recipe, track), Path(), track)
    text = context.text(adapter or names[0])
    train = text.data.train
    if not 0 <= sequence < len(train):
        raise SourceError(
            f"training sequence {sequence} does not exist; choose one from 0 to {len(train) - 1}"
        )
    item = train[sequence]
    ids, in_loss = item["input_ids"].tolist(), (item["labels"] != IGNORED).tolist()
    positions = item["position_ids"].tolist() if "position_ids" in item else list(range(len(ids)))
    starts = [i for i, position in enumerate(positions) if position == 0]
    parts = [slice(start, end) for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
    shown = [
        [_run(context.tokenizer, list(run), flag) for flag, run in _runs(ids[part], in_loss[part])]
        for part in parts
    ]
    return {
        "data": text.describe(),
        "sequence": sequence,
        "documents": [runs for runs in shown if runs],
    }


def _runs(ids: list[int], in_loss: list[bool]) -> Any:
    """Runs of tokens that are all loss tokens or all not.

    Padding is left out: tokens without loss at the end that repeat one id.
    """
    end = len(ids)
    while end > 1 and not in_loss[end - 1] and ids[end - 1] == ids[end - 2]:
        end -= 1
    if end == 1 and len(ids) > 1 and not in_loss[0]:
        end = 0
    return (
        (flag, (i for i, _ in run))
        for flag, run in groupby(
            zip(ids[:end], in_loss[:end], strict=True), key=lambda pair: pair[1]
        )
    )


def _run(tokenizer: Any, ids: list[int], in_loss: bool) -> dict[str, Any]:
    return {
        "text": tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        ),
        "tokens": len(ids),
        "learnt": in_loss,
    }


def format_preview(found: dict[str, Any]) -> str:
    """The counts as a table and the sequence as text, loss tokens between OPEN and CLOSE."""
    data = found["data"]
    lines = [heading(data)]
    lines += [
        f"{data[key]:,} {key.replace('_', ' ')}"
        for key in ("skipped_records", "overlapping_documents", "overlapping_paragraphs")
        if data[key]
    ]
    lines += ["", f"{'':22}{'training':>12}{'held out':>12}"]
    lines += [
        f"{key.replace('_', ' '):22}{value:>12,}{data['held_out'][key]:>12,}"
        for key, value in data["train"].items()
    ]
    lines += ["", f"training sequence {found['sequence']}; loss tokens are in {OPEN} {CLOSE}"]
    for runs in found["documents"]:
        lines += [
            "-" * 40,
            "".join(
                f"{OPEN}{run['text']}{CLOSE}" if run["learnt"] else run["text"] for run in runs
            ),
        ]
    return "\n".join(lines)
