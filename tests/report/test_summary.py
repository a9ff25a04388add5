"""The table at the end of a run, and sizes in it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from qwlora.errors import size
from qwlora.pipeline.results.results_table import result_rows
from qwlora.targets.proof.checks import at_least, at_most

PARITY = {
    "perplexity": 5.0,
    "reference_perplexity": 5.01,
    "of": "simulated",
    "sequences": 8,
    "tokens": 2048,
    "checks": [
        asdict(at_most("difference of perplexity", 0.002, 0.003, "share")),
        asdict(at_least("tokens with the same likeliest token", 0.99, 0.98, "share")),
        asdict(at_most("difference of layer up, the worst of 3", 1.0, 2.0, "steps")),
    ],
}


def rows(**parts: Any) -> list[tuple[str, str]]:
    return list(result_rows({"recipe": "tiny", "stages": {}, **parts}))


def test_a_parity_says_of_how_many_sequences_it_is_and_what_is_closest_to_a_limit() -> None:
    found = rows(perplexity={"simulated": {"first": 6.0}}, parity={"onnx": {"first": PARITY}})
    assert dict(found)["perplexity, simulated, adapter first"] == "6.000"
    assert dict(found)["parity onnx first"] == (
        "perplexity 5.000 in the runtime, 5.010 simulated (8 sequences, 2,048 tokens)"
    )
    closest = "tokens with the same likeliest token: 99.00% (limit: at least 98.00%)"
    assert f"3 checks; closest to its limit: {closest}" in [row for _, row in found]


def test_the_course_of_training_is_of_means() -> None:
    """Single steps differ more than training changes them."""
    train = {"steps": 10, "losses": [2.8, 3.0, *[2.7] * 6, 2.2, 3.2], "step_seconds": 1.0}
    train |= {"peak_rss_bytes": 10**9, "trainable_parameters": 5}
    found = rows(train={"first": train})
    assert ("training first", "10 steps, loss 2.900 to 2.700 (means of 2)") in found
    assert "warning" not in dict(found)


def test_every_name_in_the_table_is_there_once() -> None:
    found = rows(export={"onnx": {"first": {"bytes": 1}}}, parity={"onnx": {"first": PARITY}})
    names = [name for name, _ in found if name]
    assert len(set(names)) == len(names)
    assert dict(found)["verdict, onnx first"] == "PASS"


def test_what_the_base_costs_on_another_text_is_said() -> None:
    ratio = {"base": {"value": 1.0536, "stderr": 0.0031, "document_stderr": None}}
    kl = {"base": {"mean": 0.09119, "stderr": 0.0021, "document_stderr": None, "p999": 1.5}}
    found = dict(rows(perplexity_ratio={"on": {"legal": ratio}}, kl={"on": {"legal": kl}}))
    cost = "+5.4% ± 0.3% perplexity over float, KL 0.0912 ± 0.0021"
    assert found["base on the text of legal"] == cost


def test_distances_from_the_float_model_have_their_errors() -> None:
    base = {"mean": 0.09119, "stderr": 0.0021, "document_stderr": None, "p999": 1.5}
    only = {"mean": 0.5, "stderr": None, "document_stderr": None, "p999": 1.5}
    share = {"share": 0.8312, "stderr": 0.004, "document_stderr": None}
    kl = {"base": base, "adapted": {"first": only}}
    found = dict(rows(kl=kl, top1={"base": share, "adapted": {"first": share}}))
    assert found == found | {
        "KL from float, frozen base": "0.0912 ± 0.0021, same likeliest token 83.12% ± 0.40%",
        "KL from float, after adapter first": "0.5000, same likeliest token 83.12% ± 0.40%",
    }
    ratio = {"adapted": {"first": {"value": 1.0112, "stderr": 0.0031}}}
    reference = {"kl": {"adapted": {"first": base}}, "top1": {"adapted": {"first": share}}}
    found = dict(rows(reference={"perplexity_ratio": ratio, **reference}))
    assert found == found | {
        "over float LoRA, after adapter first": "+1.1% ± 0.3%",
        "KL from float LoRA, after adapter first": "0.0912 ± 0.0021, same likeliest token 83.12% "
        "± 0.40%",
    }


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0.0 kB"), (45_678, "45.7 kB"), (100_000, "100.0 kB"), (1_234_567_890, "1.2 GB")],
)
def test_sizes_do_not_round_to_nothing(count: int, words: str) -> None:
    assert size(count) == words
    assert dict(rows(export={"onnx": {"first": {"bytes": count}}}))["size, onnx first"] == words
