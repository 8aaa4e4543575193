"""The pages: links lead somewhere; the README stays one page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import localctl

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "docs" / "families").glob("*.md"),
    ROOT / "data" / "README.md",
    ROOT / "localctl" / "micro" / "MODEL_CARD.md",
    ROOT / "research" / "README.md",
]
SITE = {"api.md"}  # made when the site is built


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text)
    missing = [t for t in targets if "://" not in t and t not in SITE and not (page.parent / t).exists()]
    assert not missing


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


@pytest.mark.parametrize(("name", "line"), [("pyproject.toml", 'version = "{}"'), ("CITATION.cff", "version: {}")])
def test_files_agree_on_the_version(name: str, line: str) -> None:
    assert line.format(localctl.__version__) in (ROOT / name).read_text().splitlines()
