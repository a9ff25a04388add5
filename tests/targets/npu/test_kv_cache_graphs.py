"""Which graph runs which tokens, where there are several sizes and contexts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qwlora.errors import ExportError
from qwlora.simulation.kv_cache_graph import cache_sizes
from qwlora.system import strict_json
from qwlora.targets.npu.kv_cache_graphs import CachedGraphs, most_tokens


def graphs(folder: Path, tokens: list[int], contexts: list[int]) -> CachedGraphs:
    record = {
        sizes.name: {
            "tokens": sizes.tokens,
            "context": sizes.context,
            "inputs": {"past_key_0_in": [1, 2, sizes.past, 4]},
            "host": None,
        }
        for sizes in cache_sizes(tokens, contexts)
    }
    (folder / "graphs.json").write_text(strict_json.dumps({"graphs": record}))
    return CachedGraphs(folder, {})


def calls(runtime: CachedGraphs, count: int, steps: int, monkeypatch: Any) -> list[tuple[str, int]]:
    """The graphs that run `count` tokens, each with how many of them."""
    made: list[tuple[str, int]] = []

    def call(name: str, ids: Any, past: int, cache: Any) -> Any:
        assert past == sum(number for _, number in made)
        assert past + runtime.tokens[name] <= runtime.contexts[name]
        made.append((name.removeprefix("prompt_").removeprefix("token_"), ids.shape[1]))
        return {}, {"logits": ids[..., None]}

    monkeypatch.setattr(runtime, "call", call)
    ids = torch.arange(count)[None]
    assert torch.equal(runtime.logits(ids, steps)[..., 0], ids)
    return made


@pytest.mark.parametrize(
    ("count", "steps", "expected"),
    [
        (14, 0, [("ar8_cl16", 8), ("ar8_cl16", 6)]),
        (20, 0, [("ar8_cl16", 8), ("ar8_cl16", 8), ("ar4_cl32", 4)]),
        (3, 0, [("ar4_cl16", 3)]),
        (6, 2, [("ar8_cl16", 1), ("ar4_cl16", 1), ("ar1_cl16", 1), ("ar8_cl32", 1)]),
        (
            30,
            2,
            [
                *(("ar8_cl16", 6), ("ar4_cl16", 4), ("ar1_cl16", 1)),
                *(("ar8_cl32", 8), ("ar4_cl32", 4), ("ar8_cl32", 5), ("ar1_cl32", 1)),
            ],
        ),
    ],
)
def test_a_short_context_first_and_every_graph_in_turn_where_it_is_proven(
    count: int, steps: int, expected: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = graphs(tmp_path, [1, 4, 8], [32, 16])
    assert (runtime.context, most_tokens(tmp_path)) == (32, 32)
    assert runtime.empty_cache()["past_key_0_in"].shape == (1, 2, 32, 4)
    made = calls(runtime, count, steps, monkeypatch)
    assert made[: len(expected)] == expected
    last = made[-steps:] if steps else []
    assert [number for _, number in last] == [1] * steps
    assert {name for name, _ in last} <= {"ar1_cl16", "ar1_cl32"}


def test_what_no_context_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = graphs(tmp_path, [8, 1], [16, 20])
    assert calls(runtime, 20, 0, monkeypatch)[2:] == [("ar1_cl20", 1)] * 4
    with pytest.raises(ExportError, match=r"21 tokens.*context of 20; give at most 20"):
        calls(runtime, 21, 0, monkeypatch)
    runtime = graphs(tmp_path, [8, 4], [16])  # the padding of the last call needs room too
    assert most_tokens(tmp_path) == 13
    assert calls(runtime, 13, 2, monkeypatch) == [("ar8_cl16", 8), ("ar8_cl16", 3), ("ar4_cl16", 2)]
