"""What the public CI runs exists here: its make targets, files and options."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def _loaded(path: Path) -> dict[Any, Any]:
    loaded = yaml.safe_load(path.read_text("utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def _steps() -> Iterator[dict[str, Any]]:
    for path in WORKFLOWS:
        for job in _loaded(path)["jobs"].values():
            yield from job["steps"]


def _commands() -> list[str]:
    return [line for step in _steps() for line in step.get("run", "").splitlines()]


def test_there_is_a_ci() -> None:
    assert "ci.yml" in [path.name for path in WORKFLOWS]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_reads_and_no_more(path: Path) -> None:
    workflow = _loaded(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())


def test_actions_have_a_version() -> None:
    used = [step["uses"] for step in _steps() if "uses" in step]
    assert used
    assert [name for name in used if not re.fullmatch(r"[\w.-]+(/[\w.-]+)+@v\d+", name)] == []


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.M))
    called = {word for line in _commands() if line.startswith("make ") for word in line.split()[1:]}
    assert {"test", "docs"} <= called
    assert called <= targets


def test_every_file_exists() -> None:
    words = " ".join(_commands()).split()
    words += [step.get("with", {}).get("cache-dependency-path", "") for step in _steps()]
    files = {word for word in words if re.fullmatch(r"[\w./-]+\.(py|txt|sh)", word)}
    assert "constraints.txt" in files
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_benchmarks_have_the_options() -> None:
    for line in _commands():
        script = re.search(r"benchmarks/\w+\.py", line)
        if script:
            text = (ROOT / script[0]).read_text("utf-8")
            assert [word for word in re.findall(r"--[\w-]+", line) if f'"{word}"' not in text] == []
            presets = re.findall(r"--preset (\S+)", line)
            cases = (ROOT / "benchmarks" / "step_cases.py").read_text("utf-8")
            assert [name for name in presets if f'"{name}"' not in cases] == []


def test_every_python_is_promised() -> None:
    """The matrix begins with the oldest Python that the package installs on."""
    matrix = _loaded(ROOT / ".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert facts["project"]["requires-python"] == f">={matrix['python'][0]}"


def test_the_mark_of_gpu_tests_is_the_one_that_is_asked_for() -> None:
    facts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    marks = [line.split(":")[0] for line in facts["tool"]["pytest"]["ini_options"]["markers"]]
    asked = re.findall(r"pytest -m (\w+)", "\n".join(_commands()))
    assert asked
    assert set(asked) <= set(marks)
