"""CITATION.cff says what it has to, in the keys of its format, and agrees with the package."""

from pathlib import Path
from typing import Any

import lorsa
import pytest
import yaml

ROOT = Path(__file__).parent.parent
REQUIRED = {"cff-version", "message", "title", "authors"}
ALLOWED = REQUIRED | {
    "abstract", "keywords", "license", "preferred-citation", "type", "version",
}  # fmt: skip
PAPER = {"authors", "identifiers", "journal", "title", "type", "url", "year"}


@pytest.fixture(scope="module")
def citation() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def test_the_keys_are_those_of_the_format(citation: dict[str, Any]) -> None:
    assert set(citation) >= REQUIRED
    assert set(citation) <= ALLOWED
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert all(isinstance(author["name"], str) for author in citation["authors"])


def test_version_and_licence_are_those_of_the_package(citation: dict[str, Any]) -> None:
    assert citation["version"] == lorsa.__version__
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_the_paper_is_the_one_that_the_readme_names(citation: dict[str, Any]) -> None:
    paper = citation["preferred-citation"]
    assert set(paper) == PAPER
    assert paper["type"] == "article"
    assert paper["year"] == 2025
    assert [author["family-names"] for author in paper["authors"]] == [
        "He", "Wang", "Lin", "Ge", "Shu", "Tang", "Zhang", "Qiu",
    ]  # fmt: skip
    assert all(set(author) == {"given-names", "family-names"} for author in paper["authors"])
    assert paper["url"] in (ROOT / "README.md").read_text("utf-8")
    number = paper["url"].rsplit("/", 1)[1]
    assert paper["identifiers"] == [{"type": "other", "value": f"arXiv:{number}"}]
    assert number in paper["journal"]


def test_there_are_no_anchors() -> None:
    """Readers of the format load it without YAML's aliases."""
    with_events = yaml.parse((ROOT / "CITATION.cff").read_text("utf-8"))
    assert not any(isinstance(event, yaml.AliasEvent) for event in with_events)
