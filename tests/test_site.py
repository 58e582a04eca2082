"""The site has what the repository has, and a dead link stops its strict build."""

import importlib.util
import json
import posixpath
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import griffe
import lorsa
import pytest
import typer
import yaml
from lorsa import cli
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import Abort

ROOT = Path(__file__).parent.parent
HOOK = ROOT / "docs/site_pages.py"


class _Settings(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags are none of YAML's own."""


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    loaded = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader=_Settings)
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_pages", HOOK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._link_package(ROOT)
    return module


CELLS = [
    {"cell_type": "markdown", "source": ["Some\n", "words [sub](../docs/sub.md)"]},
    {"cell_type": "code", "source": ["cell = 1"]},
]
PAGES = {
    "docs/index.md": "# Home\n\n[a](../benchmarks/results/table.md#rows) [b](../code.py)\n"
    "[c](sub.md) [d](../examples/book.ipynb)\n",
    "docs/sub.md": "# Sub\n\n[up](../README.md) [kernels](../kernels/README.md#sizes)\n",
    "benchmarks/results/table.md": "# Table\n\n## Rows\n\n[back](../../docs/sub.md)\n",
    "kernels/README.md": "# Kernels\n\n## Sizes\n\n[code](../code.py)\n",
    "README.md": "# Front\n",
    "code.py": '"""A text with ``` in it."""\n',
    "examples/book.ipynb": json.dumps({"cells": CELLS}),
    "pyproject.toml": '[tool.setuptools]\npackages = ["lorsa"]\n',
}
"""A small repository."""


DEAD = (
    "gone.md", "../benchmarks/results/gone.md", "../gone.py", "../README.md/..", "sub.md#gone",
    "../benchmarks/results/table.md#gone", "/index.html", "../../secret.py", "../kernels",
)  # fmt: skip
"""Links of a page in docs/ that lead nowhere, or out of the repository."""


def _write(root: Path, files: dict[str, str], settings: dict[str, Any], theme: Any) -> MkDocsConfig:
    """Write a repository with the rules of mkdocs.yml; return the configuration of its site."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    chosen = {key: settings[key] for key in ("validation", "use_directory_urls", "exclude_docs")}
    nav = ["index.md", "sub.md", "kernels.md", "cli.md", {"Results": "results/"}]
    config = {**chosen, "site_name": "small", "nav": nav, "plugins": ["search"], "theme": theme}
    (root / "mkdocs.yml").write_text(yaml.safe_dump({**config, "hooks": [str(HOOK)]}), "utf-8")
    return load_config(str(root / "mkdocs.yml"), strict=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Path:
    """Return the small repository's site, in the theme of the real one."""
    config = _write(tmp_path_factory.mktemp("small"), PAGES, settings, settings["theme"])
    build(config)
    return Path(config.site_dir)


def _links(page: Path) -> list[str]:
    """Return where the text of a page leads."""
    text = page.read_text("utf-8").split("<article")[1].split("</article>")[0]
    return [link for link in re.findall(r'href="([^"]+)"', text) if not link.startswith("#")]


def test_links_of_the_repository_become_links_of_the_site(site: Path) -> None:
    assert _links(site / "index.html") == [
        "results/table.html#rows", "source/code.py.html", "sub.html",
        "source/examples/book.ipynb.html",
    ]  # fmt: skip
    assert _links(site / "sub.html") == ["index.html", "kernels.html#sizes"]
    assert _links(site / "results/table.html") == ["../sub.html"]
    assert _links(site / "kernels.html") == ["source/code.py.html"]
    book = (site / "source/examples/book.ipynb.html").read_text("utf-8")
    words = r'<p>Some\s+words <a href="../../sub.html">sub</a></p>'
    assert re.search(rf"{words}\s*<pre.*cell = 1", book, re.S)
    assert "A text with ``` in it." in (site / "source/code.py.html").read_text("utf-8")


def test_nothing_comes_from_another_server(site: Path, settings: dict[str, Any]) -> None:
    pages = [page.read_text("utf-8") for page in site.rglob("*.html")]
    tags = r"<(?:script|link|img|iframe)[^>]+?(?:src|href)=\"?([^\" >]+)"
    loaded = re.findall(tags, "".join(pages))
    assert loaded
    assert [address for address in loaded if re.match(r"(https?:)?//", address)] == []
    sheets = "".join(sheet.read_text("utf-8") for sheet in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)]*", sheets) == []
    assert "extra_javascript" not in settings


def _warnings(root: Path, files: dict[str, str], settings: dict[str, Any], caplog: Any) -> str:
    """Build a site that has faults; return what was said before the build gave up."""
    (root / "theme").mkdir()
    (root / "theme/main.html").write_text("<html>{{ page.content }}</html>", "utf-8")
    config = _write(root, files, settings, {"name": None, "custom_dir": str(root / "theme")})
    with caplog.at_level("WARNING", "mkdocs"), pytest.raises(Abort, match="strict mode"):
        build(config)
    return "\n".join(record.getMessage() for record in caplog.records)


def test_dead_links_stop_the_strict_build(
    tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "small"
    root.mkdir()
    (tmp_path / "secret.py").write_text("SECRET = 1\n", "utf-8")
    dead = "\n".join(f"[dead]({link})" for link in DEAD)
    files = PAGES | {
        "docs/sub.md": f"# Sub\n\n{dead}\n",
        "docs/lost.md": "# Not in the navigation\n",
    }
    outside = {"benchmarks/results/table.md": "lost.md", "kernels/README.md": "../tables.md"}
    for page, link in outside.items():
        files[page] = f"# Title\n\n## Rows\n\n## Sizes\n\n[dead]({link})\n"
    said = _warnings(root, files, settings, caplog)
    for link in (*DEAD, *outside.values()):
        told = posixpath.relpath(f"results/{link[22:]}") if "results/table" in link else link
        assert f"'{told}'" in said
    assert "  - lost.md" in said


def test_one_dead_link_is_enough(
    tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    files = PAGES | {"docs/sub.md": "# Sub\n\n[dead](../README.txt)\n"}
    said = _warnings(tmp_path, files, settings, caplog)
    assert said.count("\n") == 0
    assert "'../README.txt'" in said


def test_the_navigation_has_every_table_and_package(
    hook: ModuleType, settings: dict[str, Any]
) -> None:
    pages = [*hook._generated(ROOT), *hook._shown(ROOT).values()]
    nav = {title: page for entry in settings["nav"] for title, page in entry.items()}
    results = hook._filled(nav["Results"], pages)
    assert results == [
        f"results/{path.name}" for path in sorted((ROOT / hook.RESULTS).glob("*.md"))
    ]
    rooms = sorted({where.split(".")[0] for where in lorsa.PUBLIC.values()})
    assert [page for page in hook._filled(nav["Python API"], pages) if "/" in page] == [
        f"reference/{room}.md" for room in rooms
    ]


def test_every_public_name_is_on_a_page(hook: ModuleType) -> None:
    """Modules of the same name hid four functions."""
    pages = hook._generated(ROOT)
    everything = griffe.load("lorsa", search_paths=[ROOT / ".site"])
    text = "\n".join(pages[page] for page in pages if page.startswith("reference/"))
    shown = re.findall(r"^## (\S+) .*\n\n::: lorsa\.(\S+)$", text, re.M)
    assert dict(shown) == lorsa.PUBLIC
    for _, where in shown:
        assert everything[where].is_function or everything[where].is_class


def test_the_command_line_has_every_command_and_option(hook: ModuleType) -> None:
    page = hook._generated(ROOT)["cli.md"]
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page, re.M | re.S))
    group: Any = typer.main.get_command(cli.app)
    commands = {f"lorsa {name}": command for name, command in group.commands.items()}
    store = commands.pop("lorsa store").commands
    commands |= {f"lorsa store {name}": command for name, command in store.items()}
    assert set(sections) == set(commands)
    for name, command in commands.items():
        for param in command.get_params(typer.Context(command)):
            told = param.opts[0] if param.opts[0].startswith("--") else param.help
            assert told in sections[name], f"{name} {told}"
        example = re.search(r"Example: (.+)", command.help)
        assert not example or f"```sh\n{example[1]}" in sections[name]
