"""The report in Debian's chromium, headless: no error, no request, plots have data, tables sort."""

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwlora.report.page import render
from report.recorded import job_of, running

BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
BROWSER = next(filter(None, BROWSERS), None)
HAS_PLAYWRIGHT = importlib.util.find_spec("playwright") is not None
WIDTHS = (390, 700, 1050, 1150, 1440)
SMALLEST_TEXT = 10.5  # px

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None or not HAS_PLAYWRIGHT,
        reason="the report was NOT tested in a browser: install chromium (apt-get install chromium) "
        "and playwright (pip install playwright)",
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    jobs = {name: job_of(name) for name in ("finished", "two", "failed")}
    jobs["running"] = running()
    folder = tmp_path_factory.mktemp("pages")
    paths = {name: folder / f"{name}.html" for name in jobs}
    for name, job in jobs.items():
        paths[name].write_text(render(job), encoding="utf-8")
    return paths


NAMES = ("finished", "two", "failed", "running")
OPEN_FOLDS = "document.querySelectorAll('details').forEach(fold => fold.open = true)"


class Opened:
    """A page, with everything it wrote to the console and every request it made."""

    def __init__(self, browser: Any, path: Path, width: int = 1440, scheme: str = "light"):
        size = {"width": width, "height": 900}
        self.page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
        self.console: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_no_error_no_request(browser: Any, pages: dict[str, Path], name: str, scheme: str) -> None:
    opened = Opened(browser, pages[name], scheme=scheme)
    assert opened.console == []
    assert opened.requests == [pages[name].as_uri()]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_plots_have_visible_marks_and_text_and_fit(browser, pages, name, width) -> None:
    page = Opened(browser, pages[name], width).page
    page.evaluate(OPEN_FOLDS)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.evaluate(
        """[...document.querySelectorAll("svg.plot text")].filter(t => t.getClientRects().length).map(
            t => parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getScreenCTM().a)"""
    )
    assert len(sizes) > 10
    assert min(sizes) >= SMALLEST_TEXT - 0.01
    marks = page.evaluate(
        """[...document.querySelectorAll("svg.plot")].filter(p => p.getClientRects().length).map(p =>
            [...p.querySelectorAll(".mark")].filter(m => {
                const box = m.getBoundingClientRect(), style = getComputedStyle(m);
                return box.width + box.height > 0 && (style.fill !== "none" || style.stroke !== "none");
            }).length)"""
    )
    assert len(marks) >= 2
    assert min(marks) > 0


@pytest.mark.parametrize("name", ["finished", "two"])
def test_tables_sort_by_every_column(browser: Any, pages: dict[str, Path], name: str) -> None:
    page = Opened(browser, pages[name]).page
    page.evaluate(OPEN_FOLDS)
    tables = page.locator("table.sortable")
    assert tables.count() >= 1
    for number in range(tables.count()):
        table = tables.nth(number)
        for column in range(table.locator("thead th").count()):
            heading = table.locator("thead th").nth(column)
            for direction in ("descending", "ascending"):
                heading.locator("button").click()
                assert heading.get_attribute("aria-sort") == direction
                values = table.evaluate(
                    """(t, n) => [...t.tBodies[0].rows].map(row => {
                        const cell = row.children[n], data = cell.querySelector("data");
                        return cell.className === "e" ? null
                            : data ? +data.value : cell.textContent.trim();
                    })""",
                    column,
                )
                known = [v for v in values if v is not None]
                assert values[len(known) :] == [None] * (len(values) - len(known))
                keys = [_key(v) for v in known]
                assert keys == sorted(keys, reverse=direction == "descending"), (name, column)


def _key(value: Any) -> tuple[int, Any]:
    """Numbers before words; a cell of text that begins with a number counts as one."""
    digits = str(value).replace(",", "").replace("\u2212", "-").split(" ")[0].rstrip("%")
    try:
        return (0, float(digits))
    except ValueError:
        return (1, value)
