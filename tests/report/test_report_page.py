"""The page: every number equals results.json, names are escaped, and any key may be missing."""

import json
import re
from functools import reduce
from html.parser import HTMLParser
from operator import getitem
from typing import Any

import pytest
from markupsafe import escape

from qwlora.errors import size
from qwlora.report import number_format as shown_as
from qwlora.report.number_format import MINUS
from qwlora.report.page import render
from qwlora.report.results_view import Job, without_folders
from qwlora.report.sections.key_figures import tiles
from qwlora.report.summary_table import adapter_rows, summary_rows
from qwlora.report.verdict import Outcome, verdict
from report.recorded import NAMES, compared, job_of, leaves, results_of, running, shipped, without

HOSTILE = '<script>alert("x")</script>&\'"'


class Page(HTMLParser):
    """Numbers with a key, ids, links, and the elements that could load something."""

    def __init__(self, html: str):
        super().__init__()
        self.numbers: list[tuple[list[str], float, str]] = []
        self.ids, self.links, self.loads = list[str](), list[str](), list[str]()
        self.scripts = 0
        self._number: tuple[list[str], float] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.scripts += tag == "script"
        self.ids += [found["id"]] if "id" in found else []
        self.links += [v[1:] for k, v in found.items() if k == "href" and v.startswith("#")]
        self.loads += [v for k, v in found.items() if k in ("src", "href") and "//" in v]
        if tag == "data" and "data-key" in found:
            self._number = (json.loads(found["data-key"]), float(found["value"]))

    def handle_data(self, data: str) -> None:
        if self._number is not None:
            self.numbers.append((*self._number, data))
            self._number = None


def read(shown: str) -> tuple[float, float]:
    """A number as the page writes it, and half a unit of its last place."""
    text = shown.replace(MINUS, "-").replace(",", "").removeprefix("± ")
    if match := re.fullmatch(r"(?:(\d+) h )?(\d+) min(?: (\d\d) s)?", text):
        hours, minutes, rest = (int(part or 0) for part in match.groups())
        return 3600 * hours + 60 * minutes + rest, 0.5 if match[3] else 30
    number, _, unit = text.partition(" ")
    factor = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "ppm": 1e-6}.get(unit, 1.0)
    factor = 0.01 if number.endswith("%") else factor
    decimals = len(number.rstrip("%").partition(".")[2])
    return float(number.rstrip("%")) * factor, 0.5001 * 10**-decimals * factor


@pytest.mark.parametrize("name", [*NAMES, "running", "compared", "shipped"])
def test_every_number_equals_results_json_and_every_link_leads_somewhere(name: str) -> None:
    derived = {"running": running, "compared": compared, "shipped": shipped}
    job = derived[name]() if name in derived else job_of(name)
    html = render(job)
    page = Page(html)
    assert ("KL to float LoRA, mean" in html) == (name == "compared")
    assert ("llama.cpp, as shipped" in html) == (name == "shipped")
    assert len(html.encode()) < 1.5e6
    assert ('http-equiv="refresh"' in html) == (name == "running")
    assert len(page.numbers) > 10
    for path, value, shown in page.numbers:
        assert value == reduce(getitem, path, job.results), path
        in_head = path[-1] == "bytes" and " " not in shown  # the unit is in the column's head
        units = [" kB", " MB", " GB"] if in_head else [""]
        read_as = [read(shown + unit) for unit in units]
        assert any(abs(number - value) <= half for number, half in read_as), (path, shown)
    assert not page.loads
    assert "default-src 'none'" in html
    assert len(page.ids) == len(set(page.ids))
    assert {link for link in page.links if link} <= set(page.ids)
    text = re.sub(r"(?s)<script.*?</script>", "", html)
    assert not re.search(r"\bnan\b|\bNone\b(?! stands)|\binf\b|Undefined", text)


def hostile(value: Any, old: str) -> Any:
    """`value` with every name `old`, key or text, replaced by a hostile one."""
    return json.loads(json.dumps(value).replace(old, json.dumps(HOSTILE)[1:-1]))


@pytest.mark.parametrize(
    ("name", "old"), [("finished", "first"), ("two", "words"), ("failed", "layers")]
)
def test_names_are_escaped(name: str, old: str) -> None:
    job = job_of(name)
    results, recipe = hostile(job.results, old), hostile(job.recipe, old)
    changed = Job(results, recipe, job.recipe_text + HOSTILE, HOSTILE)
    said = {"float": [{"prompt": HOSTILE, "answer": HOSTILE}]}
    results["answers"] = said | {"on": dict.fromkeys(changed.adapters, said)}
    html = render(changed)
    assert "<script>alert" not in html
    assert Page(html).scripts == 1
    assert "&lt;script&gt;alert" in html


def some(name: str) -> list[tuple[str, ...]]:
    """Keys of a recorded job, of the layers only one."""
    kept = re.compile(r"model\.layers\.0\.self_attn\.q_proj(\.weight|\.add)?")
    found = leaves(results_of(name))
    return [p for p in found if all("." not in k or kept.fullmatch(k) for k in p)]


SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in (("failed", 2), ("finished", 9))]


@pytest.mark.parametrize(("name", "depth"), [("two", 2), *SLOW])
def test_any_key_may_be_missing(name: str, depth: int) -> None:
    results = results_of(name)
    keys = [path for path in some(name) if len(path) <= depth]
    assert len(keys) > 50
    for path in keys:
        html = render(job_of(name, without(results, path)))
        assert "<h1>" in html, path
    for empty in ({}, {"stages": {}}, {"run": {"state": "running"}}, {"parity": None}):
        assert "No verdict yet" in render(job_of(name, empty))


def test_a_figure_has_one_source() -> None:
    """Several targets: the worst of each figure, wherever it is shown."""
    results = results_of("two")
    onnx = results["parity"]["onnx"]
    shown = {"top1_agreement": 0.9876, "tokens": 96}
    weights = {**onnx["words"], **shown, "of": "trained"}
    del weights["worst_layer_steps"]
    results["parity"]["hf"] = dict.fromkeys(("words", "digits"), weights)
    html = render(job_of("two", results, targets=["hf", "onnx"]))
    table = html[html.index("All adapters. Select") :]
    worst = onnx["words"]["worst_layer_steps"]
    assert f'<data value="{worst!r}"' in table[: table.index("</table>")]
    figures = html[html.index('<dl class="keys">') :]
    assert "98.76%" in figures[: figures.index("</dl>")]
    assert f"transformers on 96 tokens each and ONNX Runtime on {onnx['words']['tokens']}" in html


def test_a_finished_page_has_no_absolute_path() -> None:
    job, results = job_of("finished"), results_of("finished")
    results["run"]["command"] = "qwlora run /home/me/job"
    recipe = {**job.recipe, "model": {"source": "/srv/models/tiny"}}
    text = job.recipe_text.replace("source: tiny-llama", "source: /srv/models/tiny")
    assert not re.search("/home/me|/srv/models", render(Job(results, recipe, text, "job")))


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (shown_as.perplexity(13.619), "13.62"),
        (shown_as.percent(-0.136, sign=True), f"{MINUS}13.6%"),
        (shown_as.percent(0.0011), "0.11%"),
        (shown_as.precise_percent(-1e-9, sign=True), "0.00%"),
        (shown_as.fixed(-0.001), "0.00"),
        (shown_as.seconds(125.7), "2 min 06 s"),
        (shown_as.seconds(59.96), "60.0 s"),
        (shown_as.significant(-1e-9), f"{MINUS}1.00e{MINUS}09"),
        (without_folders("'/a b/c' is damaged"), "'/a b/c' is damaged"),
        (without_folders("open /home/me/x.json: no"), "open x.json: no"),
        (without_folders("https://a.org/b/c and a/b/c"), "https://a.org/b/c and a/b/c"),
        (size(0), "0.0 kB"),
        (size(1_234_567_890), "1.2 GB"),
    ],
)
def test_numbers_and_paths_are_written_plainly(written: str, shown: str) -> None:
    assert written == shown


@pytest.mark.parametrize("name", NAMES)
def test_figures_and_checks_are_those_of_the_report(name: str) -> None:
    job = job_of(name)
    found = list(summary_rows(job))
    labels = [label for label, _ in found]
    for tile in tiles(job):
        assert labels.count(tile.label) == (tile.value is not None)
        if tile.value is not None:
            assert tile.value.striptags() in dict(found)[tile.label]
    evidence = verdict(job).evidence
    for outcome in (Outcome.FAILED, Outcome.CAUTION, Outcome.MISSING):
        assert labels.count(outcome.word) == sum(item.outcome is outcome for item in evidence)
    passed = sum(item.count for item in evidence if item.outcome is Outcome.PASSED)
    assert dict(found).get("Passed", "0").split()[0] == str(passed)
    for row, adapter in zip(adapter_rows(job), job.adapters, strict=True):
        losses = job.get("train", adapter, "losses")
        part = len(losses) // 5
        ends = [f"{sum(steps) / part:.3f}" for steps in (losses[:part], losses[-part:])]
        assert (row["adapter"], row["training loss"]) == (adapter, " to ".join(ends))
        assert size(job.results["sizes"][f"adapters/{adapter}"]) in row["files"]


def test_training_without_success_is_said() -> None:
    results = results_of("finished")
    for after, is_warned in ((4.0, False), (6.0, True)):
        results["perplexity"] = {"base": 5.0, "adapted": {"first": after}}
        titles = [title for title, _ in summary_rows(job_of("finished", results))]
        assert ("Warning" in titles) == is_warned


@pytest.mark.parametrize("settings", [{}, {"continue_from": "elsewhere"}])
def test_an_adapter_without_steps_is_called_what_it_is(settings: dict[str, str]) -> None:
    results = results_of("two")
    results["train"]["digits"] |= {"steps": 0, "losses": [], "settings": settings}
    job, word = job_of("two", results), "imported" if settings else "untrained"
    assert adapter_rows(job)[1]["training loss"] == word
    assert f"{word.capitalize()} digits" in dict(summary_rows(job))
    assert f"digits, {word}" in render(job)


def test_missing_data_is_at_the_top() -> None:
    texts = {"a": {"cautions": ["9% of <it>"]}, "b": {"cautions": []}}
    for results, shown in (
        ({"data": texts["a"]}, "9% of <it>"),
        ({"texts": texts}, "a: 9% of <it>"),
    ):
        job = Job({"recipe": "tiny", "stages": {}, "train": {}, **results}, {}, "", "tiny")
        assert ("Data caution", shown) in summary_rows(job)
        assert f"<p>{escape(shown)}.</p>" in render(job)
