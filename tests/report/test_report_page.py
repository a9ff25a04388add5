"""The page: every number equals results.json, names are escaped, and any key may be missing."""

import json
import math
import re
from dataclasses import replace
from functools import reduce
from html.parser import HTMLParser
from operator import getitem
from typing import Any

import pytest

from qwlora.errors import size
from qwlora.report import number_format as shown_as
from qwlora.report.number_format import MINUS
from qwlora.report.page import render
from qwlora.report.results_view import Job, without_folders
from report.recorded import (
    NAMES,
    compared,
    job_of,
    leaves,
    results_of,
    running,
    without,
)

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


ALL = [*NAMES, "running", "compared"]


def job_named(name: str) -> Job:
    derived = {"running": running, "compared": compared}
    return derived[name]() if name in derived else job_of(name)


@pytest.mark.parametrize("name", ALL)
def test_every_number_equals_results_json_and_every_link_leads_somewhere(name: str) -> None:
    job = job_named(name)
    html = render(job)
    page = Page(html)
    assert ("KL to float LoRA, mean" in html) == (name == "compared")
    assert len(html.encode()) < 1.5e6
    assert ('http-equiv="refresh"' in html) == (name == "running")
    assert len(page.numbers) > 10
    for path, value, shown in page.numbers:
        assert value == reduce(getitem, path, job.results), path
        units = [""]
        if path[-1] == "bytes" and " " not in shown:  # in the column's head, or behind the number
            units = [" kB", " MB", " GB"]
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
    if isinstance(value, dict):
        return {hostile(k, old): hostile(v, old) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v, old) for v in value]
    if isinstance(value, str):
        return value.replace(old, HOSTILE)
    return value


@pytest.mark.parametrize(
    ("name", "old"), [("finished", "first"), ("two", "words"), ("failed", "layers")]
)
def test_names_are_escaped(name: str, old: str) -> None:
    job = job_of(name)
    results, recipe = hostile(job.results, old), hostile(job.recipe, old)
    changed = Job(results, recipe, job.recipe_text + HOSTILE, HOSTILE)
    html = render(changed)
    assert "<script>alert" not in html
    assert Page(html).scripts == 1
    assert "&lt;script&gt;alert" in html


def some(name: str) -> list[tuple[str, ...]]:
    """Keys of a recorded job, of the layers only one."""
    kept = re.compile(r"model\.layers\.0\.self_attn\.q_proj(\.weight|\.add)?")
    found = leaves(results_of(name))
    return [p for p in found if all("." not in k or kept.fullmatch(k) for k in p)]


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("two", 2),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in (("failed", 2), ("finished", 9))),
    ],
)
def test_any_key_may_be_missing(name: str, depth: int) -> None:
    results = results_of(name)
    keys = [path for path in some(name) if len(path) <= depth]
    assert len(keys) > 50
    for path in keys:
        html = render(job_of(name, without(results, path)))
        assert "<h1>" in html, path
    for empty in ({}, {"stages": {}}, {"run": {"state": "running"}}, {"parity": None}):
        assert "No verdict yet" in render(job_of(name, empty))


def test_plots_hold_every_value() -> None:
    job = job_of("finished")
    html = render(job)
    losses, layers = job.get("train", "first", "losses"), job.get("base", "layers")
    (raw, *_) = re.findall(r'<path d="([^"]*)" class="mark raw"', html)
    assert raw.count(",") == len(losses)
    wide = html.split("<title>Weight error by layer and projection</title>")[1].split("</svg>")[0]
    assert len(re.findall(r'class="mark q\d"', wide)) == len(layers)
    for name in ("Float model", "Packed base", "With adapter", "Simulated", "Exported file"):
        assert f"<title>{name}: " in html


def test_a_figure_has_one_source() -> None:
    """Several targets: the worst of each figure, wherever it is shown."""
    results = results_of("two")
    onnx = results["parity"]["onnx"]
    shown = {"top1_agreement": 0.9876, "tokens": 96}
    weights = {**onnx["words"], **shown, "of": "trained"}
    del weights["worst_layer_steps"]
    results["parity"]["hf"] = dict.fromkeys(("words", "digits"), weights)
    job = job_of("two", results)
    job = replace(job, recipe={**job.recipe, "export": {"targets": ["hf", "onnx"]}})
    html = render(job)
    table = html[html.index("All adapters. Select") :]
    worst = onnx["words"]["worst_layer_steps"]
    assert f'<data value="{worst!r}"' in table[: table.index("</table>")]
    figures = html[html.index('<dl class="keys">') :]
    assert "98.76%" in figures[: figures.index("</dl>")]
    assert f"transformers on 96 tokens each and ONNX Runtime on {onnx['words']['tokens']}" in html


def test_exact_and_shipped_figures_are_next_to_each_other() -> None:
    results = results_of("finished")
    proof = {**results["parity"]["onnx"]["first"], "of": "trained", "reference_perplexity": 50.0}
    own = {"perplexity": 50.5, "top1_agreement": 0.9629, "max_log_prob_difference": 0.963}
    exact = {"perplexity": 50.0, "top1_agreement": 1.0, "max_log_prob_difference": 1e-4}
    shipped = {f"shipped_{key}": value for key, value in own.items()}
    results["parity"] = {"gguf": {"first": {**proof, **exact, **shipped}}}
    job = job_of("finished", results)
    html = render(replace(job, recipe={**job.recipe, "export": {"targets": ["gguf"]}}))
    rows = [re.sub(r"(<[^>]*>\s*)+", "|", row) for row in html.split("<tr")]
    (copied,) = (row for row in rows if "llama.cpp, a float32 copy of its values" in row)
    (as_shipped,) = (row for row in rows if "llama.cpp, as shipped" in row)
    assert "|50.000|50.000|0.00%|0.000100|100.00%|" in copied
    assert "|passed|" in copied
    assert "|50.500|50.000|1.00%|0.963|96.29%|" in as_shipped
    assert "|reported|" in as_shipped
    assert "llama.cpp in float32; as shipped 96.29%" in html
    assert "+1.00%" in html  # what shipping costs


def test_answers_come_after_training_and_are_escaped() -> None:
    """The prompts are from the adapter's own text."""
    results = results_of("two")
    say = lambda who: [{"prompt": HOSTILE, "answer": f"{who}<i>"}]  # noqa: E731
    on = {name: {"float": say(f"F {name}"), "base": say("")} for name in ("words", "digits")}
    results["answers"] = {"on": on, "adapted": {"digits": say("A digits")}}
    html = render(job_of("two", results))
    shown = re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", html)
    answers = [pair for pair in shown if pair[1].endswith("&lt;i&gt;")]
    models = ["Float model", "Packed base", "With adapter"]
    texts = ["F words", "", "F digits", "", "A digits"]
    pairs = zip([*models[:2], *models], texts, strict=True)
    assert answers == [(model, f"{text}&lt;i&gt;") for model, text in pairs]
    assert "<script>alert" not in html
    order = ["training-1", "answers-1", "stages-1", "layers-1", "training-2", "figures", "cost"]
    places = [html.index(f' id="{part}"') for part in [*order, "reproduce"]]
    assert places == sorted(places)
    folded = re.findall('<details class="detail" id="([a-z]+)"', html)
    assert folded == ["layers", "data", "reproduce"]


def test_a_single_held_out_loss_is_measured() -> None:
    """An adapter with a start of its own has no held-out loss at step 0."""
    results = results_of("failed")
    results["train"]["first"]["settings"]["init"] = "svd"
    html = render(job_of("failed", results))
    after = math.log(results["perplexity"]["adapted"]["first"])
    assert f"Held-out loss at step 60: {after:.2f}." in html
    assert "On held-out text: " not in html


@pytest.mark.parametrize(("change", "color"), [(4e-5, "z"), (6e-5, "l1"), (-6e-5, "g1")])
def test_a_cell_is_colored_if_it_shows_a_change(change: float, color: str) -> None:
    results = results_of("two")
    on = results["perplexity"]["on"]["words"]
    on["adapted"]["words"] = on["base"] * (1 + change)
    html = render(job_of("two", results))
    (cell,) = re.findall(r'<span class="c (..?)">(?:(?!</span>).)*%</small></span></td><td', html)[
        :1
    ]
    shown = shown_as.percent(change, sign=True)
    assert f'class="c {color}"' in html
    assert cell == color
    assert (color == "z") == (shown == "0.00%")


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
        (shown_as.perplexity(49344.04), "49,344"),
        (shown_as.percent(-0.136, sign=True), f"{MINUS}13.6%"),
        (shown_as.percent(0.0011), "0.11%"),
        (shown_as.precise_percent(-1e-9, sign=True), "0.00%"),
        (shown_as.fixed(-0.001), "0.00"),
        (shown_as.seconds(125.7), "2 min 06 s"),
        (shown_as.seconds(59.96), "60.0 s"),
        (shown_as.significant(28344.2), "28,344"),
        (shown_as.significant(-1e-9), f"{MINUS}1.00e{MINUS}09"),
        (without_folders("'/a b/c' is damaged"), "'/a b/c' is damaged"),
        (without_folders("open /home/me/x.json: no"), "open x.json: no"),
        (without_folders("https://a.org/b/c and a/b/c"), "https://a.org/b/c and a/b/c"),
        (size(0), "0.0 kB"),
        (size(100_000), "100.0 kB"),
        (size(1_234_567_890), "1.2 GB"),
    ],
)
def test_numbers_and_paths_are_written_plainly(written: str, shown: str) -> None:
    assert written == shown
