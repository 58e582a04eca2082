"""Files import downwards only, without a circle; libraries have homes.

The tables of docs/architecture.md are the one list of arrows; these tests read them.
"""

import ast
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from prose import ROOT, product_files

PAGE = (ROOT / "docs/architecture.md").read_text("utf-8")
FOREIGN = ROOT / "dictionaries/formats/foreign.py"
"""Reads pickled files, as tensors alone."""
UNSAFE = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
LATE = {"commands", "demo", "display", "evaluate"}
"""Rooms whose functions import: what a command or a stage of the demo needs, when it runs."""


class Import(NamedTuple):
    """An import of one of our files by another."""

    by: Path
    of: Path
    line: int
    late: bool
    """Whether it stands in a function"""


def table(heading: str) -> dict[str, set[str]]:
    """Return the rows of a table of the page: what stands in the first and in the last column."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    found = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            cells = line.split("|")
            names, last = (re.findall(r"[\w./]+", cell) for cell in (cells[1], cells[-2]))
            found |= {re.sub(r"(/|\.py)$", "", name): set(last) for name in names}
    return found


ROOMS = table("Rooms and arrows")
WINGS = table("Wings")
HOMES = table("Homes of libraries")


def _target(base: Path, name: str) -> Path | None:
    """Return the file that a dotted name below a folder is, if it is one of ours."""
    path = base.joinpath(*name.split(".")) if name else base
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file() and (name or file.name == "__init__.py"):
            return file
    return None


def _ours(file: Path, node: ast.ImportFrom | ast.Import) -> list[Path]:
    """Return the files of ours that an import loads: of a package's names, those that are files."""
    if isinstance(node, ast.Import):
        names = [a.name.removeprefix("lorsa.") for a in node.names if a.name.startswith("lorsa.")]
        return [found for name in names if (found := _target(ROOT, name))]
    if node.level == 0 and (node.module or "").split(".")[0] != "lorsa":
        return []
    base = file.parents[node.level - 1] if node.level else ROOT
    module = (
        (node.module or "") if node.level else (node.module or "").removeprefix("lorsa").lstrip(".")
    )
    found = set()
    for alias in node.names:
        inner = ".".join(part for part in (module, alias.name) if part)
        target = _target(base, inner) or _target(base, module)
        if target:
            found.add(target)
    return sorted(found)


@cache
def imports() -> list[Import]:
    """Return every import of the package's files by each other, in functions too."""
    found = []
    for file in product_files():
        tree = ast.parse(file.read_text("utf-8"))
        late = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                found += [
                    Import(file, of, node.lineno, id(node) in late) for of in _ours(file, node)
                ]
    return found


def _path(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def _room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def _wing(file: Path) -> str:
    return file.parent.relative_to(ROOT).as_posix()


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return the names that lead back to themselves, a list for each circle."""
    left = {name: set(ends) for name, ends in arrows.items()}
    while free := {name for name, ends in left.items() if not ends & left.keys()}:
        left = {name: ends for name, ends in left.items() if name not in free}
    while free := set(left) - {end for ends in left.values() for end in ends}:
        left = {name: ends for name, ends in left.items() if name not in free}
    groups: list[list[str]] = []
    for name in left:
        seen, ahead = set(), [name]
        while ahead:
            new = left.get(ahead.pop(), set()) & left.keys() - seen
            seen |= new
            ahead += new
        group = sorted(other for other in seen if name in _reach(left, other))
        if group and group not in groups:
            groups.append(group)
    return groups


def _reach(arrows: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    ahead = [start]
    while ahead:
        new = arrows.get(ahead.pop(), set()) - seen
        seen |= new
        ahead += new
    return seen


def test_a_circle_is_found() -> None:
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}
    assert circles(arrows) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_no_circle_of_files() -> None:
    """Imports in functions count; a test of rooms alone let a circle of seven files pass."""
    arrows: dict[str, set[str]] = {_path(file): set() for file in product_files()}
    for each in imports():
        arrows[_path(each.by)].add(_path(each.of))
    assert circles(arrows) == []
    assert sum(map(len, arrows.values())) > 500  # so that imports were found at all


def test_every_room_is_in_the_table() -> None:
    rooms = {_room(file) for file in product_files()} - {"__init__", "__main__"}
    assert rooms == set(ROOMS)


def test_the_table_goes_upwards() -> None:
    """A row names rows above it only, so nothing that it allows is an arrow up or a circle."""
    order = list(ROOMS)
    for room, below in ROOMS.items():
        assert below <= set(order[: order.index(room)]), room


def test_files_import_rooms_that_the_table_allows() -> None:
    wrong = [
        f"{_path(each.by)}:{each.line} imports {_path(each.of)}"
        for each in imports()
        if _room(each.by) != _room(each.of)
        and _room(each.by) not in ("__init__", "__main__")
        and _room(each.of) not in ROOMS[_room(each.by)]
    ]
    assert wrong == []


def test_the_table_allows_nothing_that_is_not_used() -> None:
    used = {(_room(each.by), _room(each.of)) for each in imports()}
    assert {(a, b) for a, below in ROOMS.items() for b in below} <= used


def test_wings_import_each_other_as_the_table_allows() -> None:
    """The folders within a room; what lies in the room itself, all its wings may see."""
    wings = {_wing(f) for f in product_files() if len(f.relative_to(ROOT).parts) > 2}
    assert wings == set(WINGS)
    for each in imports():
        by, of = _wing(each.by), _wing(each.of)
        if by in WINGS and of in WINGS and by != of and _room(each.by) == _room(each.of):
            assert of.split("/")[-1] in WINGS[by], (
                f"{_path(each.by)}:{each.line} imports {_path(each.of)}"
            )


def test_functions_import_where_a_command_begins_only() -> None:
    """An import within a function hides a circle, or makes a start slow that should be quick."""
    late = Counter(_room(each.by) for each in imports() if each.late)
    assert set(late) <= LATE


@pytest.mark.parametrize("library", HOMES)
def test_library_has_one_home(library: str) -> None:
    users = set()
    for file in product_files():
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            if library in {name.split(".")[0] for name in names}:
                users.add(_room(file))
    assert users == HOMES[library]


def test_nothing_is_pickled() -> None:
    for file in product_files():
        text = file.read_text("utf-8")
        names = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None) or "", *(a.name for a in node.names)]
        }
        assert not names & UNSAFE
        if file != FOREIGN:
            assert "torch.load" not in text


def test_other_tools_files_are_read_as_tensors_alone() -> None:
    calls = [
        node
        for node in ast.walk(ast.parse(FOREIGN.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(calls) == 1
    assert "weights_only=True" in ast.unparse(calls[0])


def test_the_list_of_files_is_that_of_the_modules() -> None:
    """`python docs/files.py` writes it again."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import files
    finally:
        sys.path.pop(0)
    assert files.PAGE.read_text("utf-8") == files.page()
