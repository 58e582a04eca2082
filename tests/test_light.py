"""What is imported before a command does anything: no library that takes seconds to load."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "numpy", "zarr", "pyarrow", "transformers", "triton", "numcodecs"}
HEAVY |= {"accelerate", "safetensors", "matplotlib", "huggingface_hub"}
CONFIGS = (
    "harvest.config",
    "train.config",
    "evaluate.config",
    "circuits.config",
    "analyze.config",
    "analyze.explain.config",
    "exchange.config",
    "publish.config",
)


def _modules_after(code: str) -> set[str]:
    """Return the modules that a fresh process has imported after some code."""
    lines = ["import sys", "try:", *(f"    {line}" for line in code.splitlines())]
    lines += ["finally:", "    print('modules', *sys.modules)"]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_load_nothing_heavy(name: str) -> None:
    """They loaded torch, so that the options of a command could not be made from them."""
    modules = _modules_after(f"import lorsa.{name}")
    assert f"lorsa.{name}" in modules
    assert not HEAVY & modules


@pytest.mark.parametrize("command", ["", "train", "harvest", "push", "store info"])
def test_help_loads_nothing_heavy(command: str) -> None:
    """A second and more would pass before anything is shown."""
    words = ["lorsa", *command.split(), "--help"]
    modules = _modules_after(f"sys.argv = {words}\nfrom lorsa.cli import main\nmain()")
    assert "lorsa.cli" in modules
    assert not HEAVY & modules


def test_help_of_all_reads_no_config() -> None:
    """Options are made when their command runs or shows its help, and no earlier."""
    modules = _modules_after("sys.argv = ['lorsa', '--help']\nfrom lorsa.cli import main\nmain()")
    assert not {f"lorsa.{name}" for name in CONFIGS} & modules
