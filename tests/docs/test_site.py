"""The site builds without a warning, and its pages need no network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.snippets import ROOT

pytestmark = pytest.mark.slow


def test_the_site_builds_and_no_page_loads_anything_from_elsewhere(tmp_path: Path) -> None:
    for package in ("material", "mkdocstrings"):
        pytest.importorskip(package, reason="pip install -r requirements/docs.txt")
    ended = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "WARNING" not in ended.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 40
    loaded = r"""<(?:script|img|iframe)[^>]+src=["']?https?:|<link[^>]+stylesheet[^>]+https?:"""
    assert [p.name for p in pages if re.search(loaded, p.read_text())] == []
    left = re.compile(r"<!-- api: |^::: ", re.MULTILINE)  # a function that was not filled in
    assert [p.name for p in pages if left.search(p.read_text())] == []
    styles = list(tmp_path.rglob("*.css"))
    assert [p.name for p in styles if re.search(r"url\(.?https?:", p.read_text())] == []
