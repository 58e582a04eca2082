"""What the site has besides docs/, and the links between all of it: a hook of MkDocs.

A page has to be good where it lies in the repository too, so its links say where a file is there:
../benchmarks/results/bench_step.md. This hook

- adds what lies outside docs/: the kernels' page, the changelog, the tables of results, and every
  source file that a page links to;
- writes pages of what the code says of itself: one of the command line, one of each package;
- turns links into those of the site. One that leads nowhere is left alone, and the strict build
  fails on it.

In the navigation of mkdocs.yml a name with a slash at its end, as results/, stands for all pages
of that folder.
"""

import json
import os
import posixpath
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from lorsa import PUBLIC, cli
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ELSEWHERE = {
    "README.md": "index.md",
    "kernels/README.md": "kernels.md",
    "CHANGELOG.md": "changelog.md",
}
"""Where the site has what lies elsewhere in the repository."""
RESULTS = "benchmarks/results"
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#\s])")
"""The path in a link's target: neither an address nor a place on the same page."""
SOURCES = {
    ".py": "py", ".toml": "toml", ".txt": "text", ".sh": "sh", ".yml": "yaml", ".cff": "yaml",
    ".ipynb": "py",
}  # fmt: skip
"""Suffixes of files that are shown as they are, and what they are written in."""


ALONE = """      show_root_heading: true
      show_root_toc_entry: true
      show_root_full_path: false"""
"""What mkdocstrings is given for an object that stands by itself on a page."""


@event_priority(100)  # before mkdocstrings looks for the package
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lay out the package for mkdocstrings and fill in the navigation."""
    root = _root(config)
    _link_package(root)
    if config.nav is not None:
        pages = [*_generated(root), *_shown(root).values()]
        config.nav = _filled(config.nav, pages)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    root = _root(config)
    for path, uri in _shown(root).items():
        if uri not in files.src_uris:
            files.append(File.generated(config, uri, abs_src_path=str(root / path)))
    for uri, text in _generated(root).items():
        files.append(File.generated(config, uri, content=text))
    aside = InclusionLevel.NOT_IN_NAV
    for path in sorted(set(_linked_sources(files, root))):
        page = _source_page(path, (root / path).read_text("utf-8"))
        files.append(File.generated(config, _source_uri(path), content=page, inclusion=aside))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to places in the repository into links to pages of the site."""
    root = _root(config)

    def of_site(match: re.Match[str]) -> str:
        path = _place(match[1], page.file.src_uri, root)
        uri = _shown(root).get(path) or (_source_uri(path) if _is_source(path, root) else None)
        if uri is None or uri not in files.src_uris:
            return match[1]
        return posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(of_site, markdown)


def _root(config: MkDocsConfig) -> Path:
    """Return the repository's root, where mkdocs.yml is."""
    return Path(str(config.config_file_path)).resolve().parent


def _shown(root: Path) -> dict[str, str]:
    """Return the pages that are files: path in the repository -> page of the site."""
    docs = {path.relative_to(root).as_posix(): path.name for path in (root / "docs").glob("*.md")}
    results = {
        path.relative_to(root).as_posix(): f"results/{path.name}"
        for path in sorted((root / RESULTS).glob("*.md"))
    }
    elsewhere = {path: uri for path, uri in ELSEWHERE.items() if (root / path).exists()}
    return {**docs, **results, **elsewhere}


def _place(target: str, uri: str, root: Path) -> str:
    """Return where in the repository a link of a page leads, as a path from the root."""
    homes = {page: path for path, page in _shown(root).items() if path != "README.md"}
    if uri.startswith("source/"):
        homes[uri] = uri.removeprefix("source/").removesuffix(".md")
    here = posixpath.dirname(homes.get(uri, f"docs/{uri}"))
    return posixpath.normpath(posixpath.join(here, target))


def _is_source(path: str, root: Path) -> bool:
    """Return whether a path is that of a file in the repository that can be shown as it is."""
    return not path.startswith(("..", "/", "docs/")) and (
        Path(path).suffix in SOURCES and (root / path).is_file()
    )


def _source_uri(path: str) -> str:
    return f"source/{path}.md"


def _source_page(path: str, text: str) -> str:
    """Return a page that shows a file as it is, and a notebook cell by cell."""
    parts = [("code", text)]
    if path.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        parts = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    opens = f"~~~~{SOURCES[Path(path).suffix]}"
    shown = [f"{opens}\n{part.rstrip()}\n~~~~" if kind == "code" else part for kind, part in parts]
    return "\n\n".join(["---\nsearch:\n  exclude: true\n---", f"# {path}", *shown]) + "\n"


def _linked_sources(files: Files, root: Path) -> Iterator[str]:
    """Yield the source files that pages link to."""
    for file in files.documentation_pages():
        for target in LINK.findall(file.content_string):
            path = _place(target, file.src_uri, root)
            if _is_source(path, root):
                yield path


def _filled(nav: Any, pages: list[str]) -> Any:
    """Return the navigation with folders replaced by their pages, the index first."""
    if isinstance(nav, dict):
        return {title: _filled(entry, pages) for title, entry in nav.items()}
    if isinstance(nav, str):
        return _filled([nav], pages) if nav.endswith("/") else nav
    filled: list[Any] = []
    for entry in nav:
        if isinstance(entry, str) and entry.endswith("/"):
            within = [page for page in pages if page.startswith(entry)]
            filled += sorted(within, key=lambda page: (not page.endswith("/index.md"), page))
        else:
            filled.append(_filled(entry, pages))
    return filled


def _generated(root: Path) -> dict[str, str]:
    """Return the pages that the code writes: page of the site -> its text."""
    pages = {"cli.md": _command_line()}
    for room, names in _public(root).items():
        pages[f"reference/{room}.md"] = _reference(room, names)
    return pages


def _public(root: Path) -> dict[str, list[str]]:
    """Return the public names by the package or module that they are of, of those in a folder."""
    found: dict[str, list[str]] = {}
    for place in PUBLIC.values():
        room = place.split(".")[0]
        if (root / room).is_dir() or (root / f"{room}.py").is_file():
            found.setdefault(room, []).append(place)
    return found


def _reference(room: str, names: list[str]) -> str:
    """Return the page of a package: its public names."""
    parts = [f"::: lorsa.{name}\n    options:\n{ALONE}" for name in names]
    return "\n\n".join([f"# lorsa.{room}", *parts]) + "\n"


def _rooms(root: Path) -> list[str]:
    """Return the folders of the package, in the order of pyproject.toml."""
    facts = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    packages = [name.split(".") for name in facts["tool"]["setuptools"]["packages"]]
    return [name[1] for name in packages if len(name) == 2]


def _link_package(root: Path) -> None:
    """Make a folder with the package's name in which griffe finds nothing but the package.

    The repository root is the package, and has .venv, tests and more that is none of it.
    """
    package = root / ".site" / "lorsa"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in [*root.glob("*.py"), *(root / room for room in _rooms(root))]:
        os.symlink(path, package / path.name)


def _command_line() -> str:
    """Return the page of the command line: every command with its arguments and options."""
    group: Any = typer.main.get_command(cli.app)
    parts = ["# Command line", *_help(group.help)]
    for name, command in _commands(group, "lorsa"):
        context = typer.Context(command, info_name=name)
        rows = [param.get_help_record(context) for param in command.get_params(context)]
        table = [f"| `{_cell(row[0])}` | {_said(row[1])} |" for row in rows if row]
        parts += [f"## {name}", *_help(command.help), "\n".join(["| | |", "|---|---|", *table])]
    return "\n\n".join(parts) + "\n"


def _commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield name and command of everything that can be typed."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def _help(text: str) -> list[str]:
    """Return a help text as paragraphs, its example as code."""
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return [
        f"```sh\n{part.removeprefix('Example: ')}\n```" if part.startswith("Example: ") else part
        for part in (" ".join(part.split()) for part in paragraphs)
    ]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _said(text: str) -> str:
    """Return what is said of an option; typer puts a default that is told in words in brackets."""
    text = re.sub(r"\[default: \((.*)\)\]", r"[default: \1]", text)
    return _cell(text).replace("<", "&lt;")
