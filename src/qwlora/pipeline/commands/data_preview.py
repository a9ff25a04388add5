"""Preview of a recipe's data: counts, and one training sequence with its loss tokens marked."""

from __future__ import annotations

from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from qwlora.data.prepared_data import summary
from qwlora.errors import SourceError
from qwlora.pipeline.plan.plan import JobTexts
from qwlora.pipeline.stages import new_context
from qwlora.recipe import Recipe
from qwlora.system.progress import Track, untracked

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
        number `sequence`, a list of runs {text, tokens, in_loss}.
    """
    from qwlora.data.sequences import IGNORED

    names = [a.name for a in recipe.adapters]
    if adapter is not None and adapter not in names:
        raise SourceError(f"there is no adapter {adapter!r}; the recipe has {', '.join(names)}")
    context = new_context(recipe, JobTexts(recipe, track), Path(), track)
    text = context.text(adapter or names[0])
    train = text.train
    if not 0 <= sequence < len(train):
        raise SourceError(
            f"training sequence {sequence} does not exist; choose one from 0 to {len(train) - 1}"
        )
    item = train[sequence]
    ids, in_loss = item["input_ids"].tolist(), (item["labels"] != IGNORED).tolist()
    positions = item["position_ids"].tolist() if "position_ids" in item else range(len(ids))
    starts = [i for i, position in enumerate(positions) if position == 0]
    documents = []
    for start, stop in pairwise([*starts, len(ids)]):
        end = stop  # without padding: tokens without loss at the end that repeat one id
        while end - start > 1 and not in_loss[end - 1] and ids[end - 1] == ids[end - 2]:
            end -= 1
        if end - start == 1 < stop - start and not in_loss[start]:
            continue  # it is all padding
        runs = groupby(range(start, end), key=in_loss.__getitem__)
        documents.append([_run(context.tokenizer, [ids[i] for i in run], n) for n, run in runs])
    return {"data": text.describe(), "sequence": sequence, "documents": documents}


def _run(tokenizer: Any, ids: list[int], in_loss: bool) -> dict[str, Any]:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return {"text": text, "tokens": len(ids), "in_loss": in_loss}


def format_preview(shown: dict[str, Any]) -> str:
    """The counts in one line, and the sequence as text, loss tokens between OPEN and CLOSE."""
    lines = [summary(shown["data"]), ""]
    lines += [f"training sequence {shown['sequence']}; loss tokens are in {OPEN} {CLOSE}"]
    for runs in shown["documents"]:
        texts = (f"{OPEN}{r['text']}{CLOSE}" if r["in_loss"] else r["text"] for r in runs)
        lines += ["-" * 40, "".join(texts)]
    return "\n".join(lines)
