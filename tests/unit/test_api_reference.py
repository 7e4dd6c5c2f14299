"""docs/api-reference.md and the table of settings are what the code says."""

import re

import pytest

from scripts.api_reference import pages, reference, with_settings


def test_the_pages_are_up_to_date() -> None:
    stale = [path.name for path, text in pages() if path.read_text("utf-8") != text]
    assert stale == [], f"run: python scripts/api_reference.py ({', '.join(stale)} differ)"


def test_every_link_of_the_reference_leads_somewhere() -> None:
    text = reference()
    anchors = {heading.lower() for heading in re.findall(r"^#+ (\S+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


def test_a_page_without_its_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold"):
        with_settings("no markers here")
