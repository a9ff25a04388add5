"""The site builds without a warning, and its pages need no network: in mkdocs and in chromium."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from docs.snippets import ROOT
from report.test_report_browser import BROWSER, HAS_PLAYWRIGHT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="pip install -r requirements/docs.txt")
    pytest.importorskip("mkdocstrings", reason="pip install -r requirements/docs.txt")
    folder = tmp_path_factory.mktemp("site")
    ended = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "WARNING" not in ended.stderr
    return folder


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    loaded = r"""<(?:script|img|iframe)[^>]+src=["']?https?:|<link[^>]+stylesheet[^>]+https?:"""
    assert [p.name for p in pages if re.search(loaded, p.read_text())] == []
    styles = list(site.rglob("*.css"))
    assert [p.name for p in styles if re.search(r"url\(.?https?:", p.read_text())] == []


def test_every_function_was_filled_in(site: Path) -> None:
    left = re.compile(r"<!-- api: |^::: ", re.MULTILINE)
    assert [p.name for p in site.rglob("*.html") if left.search(p.read_text())] == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None or not HAS_PLAYWRIGHT:
        pytest.skip("the site was NOT tested in a browser: install chromium and playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


def test_pages_are_searched_from_disk(browser: Any, site: Path) -> None:
    page = browser.new_context(offline=True).new_page()
    page.goto((site / "errors/index.html").as_uri())
    page.locator(".md-search__input").first.press_sequentially("straight-through")
    found = page.locator(".md-search-result__link")
    found.first.wait_for(state="attached", timeout=300_000)  # ms; a busy machine
    hrefs = found.evaluate_all("links => links.map(link => link.href)")
    assert any("math.html" in href for href in hrefs)
    assert not any("/log/" in href for href in hrefs)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_pages_open_and_fit_the_width(browser: Any, site: Path, width: int, scheme: str) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    problems = []
    # 404.html has a server's paths
    for path in sorted(set(site.rglob("*.html")) - {site / "404.html"}):
        page, name = context.new_page(), str(path.relative_to(site))
        page.on("console", lambda m, name=name: problems.append(f"{name}: {m.text}"))
        page.on("pageerror", lambda e, name=name: problems.append(f"{name}: {e}"))
        page.goto(path.as_uri(), timeout=300_000)  # ms; a busy machine
        if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
            problems.append(f"{name}: wider than {width} pixels")
        page.close()
    context.close()
    assert problems == []
