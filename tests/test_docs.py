"""README.md and docs/ are short, complete and linked."""

import importlib
import re
from pathlib import Path

import pytest

import timm_tresnet
from timm_tresnet.models import layers

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")


def find_anchors(page):
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [README, *PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page):
    for link in filter(None, sum(LINK.findall(page.read_text(encoding="utf-8")), ())):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page.name} links to {link}"
        if anchor and not anchor.startswith("timm_tresnet."):
            assert anchor in find_anchors(target), f"{page.name} links to {link}"


def test_readme_has_at_most_900_words():
    assert len(README.read_text(encoding="utf-8").split()) <= 900


def test_readme_links_every_page():
    linked = set(re.findall(r"\]\(docs/(\w+\.md)", README.read_text(encoding="utf-8")))
    assert linked == {page.name for page in PAGES}


def test_reference_has_every_public_name():
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    objects = []
    for name in named:
        module, _, attribute = name.rpartition(".")
        objects.append(getattr(importlib.import_module(module), attribute))
    for package in (timm_tresnet, layers):
        missing = [name for name in package.__all__ if getattr(package, name) not in objects]
        assert not missing, f"docs/reference.md lacks {', '.join(missing)} of {package.__name__}"
