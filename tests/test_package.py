"""What is installed: files, dependencies, versions."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import lorsa
import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from release import known_files, package_files, same

ROOT = Path(__file__).parent.parent
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = SETTINGS["project"]
EXTRAS = ("datasets", "gguf", "s3")
FLOORS = [
    Requirement(text)
    for group in (PROJECT["dependencies"], *(PROJECT["optional-dependencies"][e] for e in EXTRAS))
    for text in group
]
"""Of what users install; the tools of developers have none to keep."""


def _versions(name: str) -> dict[str, Version]:
    """Return the version that a file of constraints gives each package."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {_spelt(package): Version(version) for package, version in pairs}


def _spelt(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_room_is_packaged() -> None:
    rooms = [
        "lorsa." + ".".join(file.parent.relative_to(ROOT).parts)
        for file in ROOT.glob("**/__init__.py")
        if file.parent != ROOT and not file.relative_to(ROOT).parts[0].startswith(".")
    ]
    assert sorted(SETTINGS["tool"]["setuptools"]["packages"]) == sorted(["lorsa", *rooms])


def test_every_file_that_is_read_is_packaged() -> None:
    """All but modules: they are named by patterns."""
    patterns = [
        f"{package.replace('.', '/')}/{pattern}"
        for package, found in SETTINGS["tool"]["setuptools"]["package-data"].items()
        for pattern in found
    ]
    wanted = [name for name in package_files(known_files()) if not name.endswith(".py")]
    assert wanted
    assert [n for n in wanted if not any(fnmatch(n, pattern) for pattern in patterns)] == []


def test_a_wheel_holds_the_package_and_nothing_else() -> None:
    found = package_files(known_files())
    assert {"lorsa/__init__.py", "lorsa/cli.py", "lorsa/py.typed"} <= found
    assert {"lorsa/view/static/index.html", "lorsa/kernels/triton_kernels.py"} <= found
    beside = ("lorsa/tests/", "lorsa/benchmarks/", "lorsa/docs/", "lorsa/examples/")
    assert [name for name in found if name.startswith(beside)] == []


def test_a_file_that_is_left_out_is_named() -> None:
    with pytest.raises(SystemExit, match=r"error: the wheel: missing \['b'\], too many \['c'\]"):
        same("the wheel", {"a", "c"}, {"a", "b"})


@pytest.mark.parametrize("needed", FLOORS, ids=str)
def test_oldest_constraints_are_the_lower_bounds(needed: Requirement) -> None:
    (bound,) = needed.specifier
    assert bound.operator == ">="
    assert _versions("constraints-oldest.txt")[_spelt(needed.name)] == Version(bound.version)


@pytest.mark.parametrize("needed", FLOORS, ids=str)
def test_constraints_have_a_version_that_is_allowed(needed: Requirement) -> None:
    assert _versions("constraints.txt")[_spelt(needed.name)] in needed.specifier


def test_the_pythons_that_are_named_are_allowed() -> None:
    named = [
        text.rsplit(" ", 1)[1] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)
    ]
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert named[0] == oldest
    tested = oldest if len(named) == 1 else f"{oldest} to {named[-1]}"
    assert f"Tested on Linux with Python {tested} " in (ROOT / "README.md").read_text("utf-8")


def test_the_changelog_begins_with_this_version() -> None:
    """Or with what is not released yet."""
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    sections = re.findall(r"^## \[(.+)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.M)
    assert len(sections) == len(re.findall(r"^## ", text, re.M))
    released = [name for name, date in sections if name != "Unreleased"]
    assert released[0] == lorsa.__version__
    assert all(date for name, date in sections if name != "Unreleased")
