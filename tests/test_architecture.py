"""The folders know only those below them, and every library has one home."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARROWS = {
    "errors": set(),
    "kernels": set(),
    "store": set(),
    "model": {"kernels"},
    "stop": set(),
    "harvest": {"store", "model", "stop"},
    "train": {"kernels", "store", "model", "stop"},
    "analyze": {"kernels", "store", "model", "harvest", "stop"},
    "view": {"analyze", "stop"},
    "exchange": {"model", "harvest"},
    "publish": {"store", "model", "train", "analyze"},
    "tables": {"store"},
    "display": {"tables", "harvest", "store", "train", "analyze"},
    "watch": {"display", "tables", "train"},
    "demo": {"display", "harvest", "train", "analyze"},
    "settings": set(),
    "commands": {
        "settings",
        "display",
        "watch",
        "demo",
        "harvest",
        "store",
        "train",
        "analyze",
        "view",
        "exchange",
        "publish",
    },
    "cli": {"commands"},
}
HOMES = {
    "triton": {"kernels"},
    "zarr": {"store"},
    "numcodecs": {"store"},
    "obstore": {"store"},
    "transformers": {"harvest"},
    "huggingface_hub": {"model", "harvest", "publish"},
    "datasets": {"harvest"},
    "accelerate": {"harvest", "train"},
    "matplotlib": {"train"},
    "typer": {"cli", "commands"},
    "rich": {"tables", "display", "watch"},
}
FOREIGN = ROOT / "model" / "foreign.py"
"""Reads pickled files, as tensors alone."""
UNSAFE = {"pickle", "cloudpickle", "dill", "joblib", "shelve"}


def _files(room: str) -> list[Path]:
    path = ROOT / room
    return sorted(path.rglob("*.py")) if path.is_dir() else [ROOT / f"{room}.py"]


def _imports(file: Path) -> list[tuple[int, str]]:
    """Return (dots, dotted name) of every import of a file, in functions too."""
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.module is None:
                found += [(node.level, alias.name) for alias in node.names]
            else:
                found.append((node.level, node.module))
    return found


def _rooms_used(room: str) -> set[str]:
    used = set()
    for file in _files(room):
        depth = len(file.relative_to(ROOT).parts)
        for level, name in _imports(file):
            first = name.split(".")[0]
            if level == depth and first in ARROWS:
                used.add(first)
            if level == 0 and name.startswith("lorsa."):
                used.add(name.split(".")[1])
    return used - {room}


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_go_one_way(room: str) -> None:
    assert _rooms_used(room) <= ARROWS[room] | {"errors"}


@pytest.mark.parametrize("library", HOMES)
def test_library_has_one_home(library: str) -> None:
    users = {
        room
        for room in ARROWS
        for file in _files(room)
        if any(level == 0 and name.split(".")[0] == library for level, name in _imports(file))
    }
    assert users <= HOMES[library]


@pytest.mark.parametrize("room", ARROWS)
def test_nothing_is_pickled(room: str) -> None:
    for file in _files(room):
        assert not {name.split(".")[0] for _, name in _imports(file)} & UNSAFE
        if file != FOREIGN:
            assert "torch.load" not in file.read_text("utf-8")


def test_other_tools_files_are_read_as_tensors_alone() -> None:
    calls = [
        node
        for node in ast.walk(ast.parse(FOREIGN.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert len(calls) == 1
    assert "weights_only=True" in ast.unparse(calls[0])


def test_every_room_is_in_the_table() -> None:
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    modules = {p.stem for p in ROOT.glob("*.py")} - {"__init__", "__main__"}
    assert packages | modules == set(ARROWS)
