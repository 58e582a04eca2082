"""What is imported before a command does anything: no library that takes seconds to load."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from unseal import change_json, unseal

from reading import make_analysis

HEAVY = {"torch", "numpy", "zarr", "pyarrow", "transformers", "triton", "numcodecs"}
HEAVY |= {"accelerate", "safetensors", "matplotlib", "huggingface_hub"}
TENSORS = {"torch", "transformers", "zarr", "numcodecs", "pandas", "scipy", "safetensors"}
"""Libraries that take half a second and more, of no use to who reads Parquet and JSON."""
EVERY = [
    "", "demo", "harvest", "train", "sweep", "eval", "analyze", "view", "find", "explain", "ablate",
    "trace", "push", "convert", "store", "store info", "store verify", "verify", "store rm",
    "store merge",
]  # fmt: skip
CONFIGS = (
    "harvest.config",
    "train.config",
    "evaluate.config",
    "circuits.config",
    "circuits.tracing.config",
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
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_load_nothing_heavy(name: str) -> None:
    """They loaded torch, so that the options of a command could not be made from them."""
    modules = _modules_after(f"import lorsa.{name}")
    assert f"lorsa.{name}" in modules
    assert not HEAVY & modules


@pytest.mark.parametrize("command", EVERY)
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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, store_folder: Path) -> Path:
    """A folder with an analysis, of that store."""
    folder = tmp_path_factory.mktemp("light") / "run"
    make_analysis(folder / "analysis")
    unseal(folder / "analysis")
    manifest = json.loads((store_folder / "manifest.json").read_text())
    change_json(folder / "analysis/analysis.json", store_uuid=manifest["uuid"])
    return folder


def _loaded_by(*words: object) -> set[str]:
    """Return what a command that succeeds has imported."""
    typed = ["lorsa", *map(str, words)]
    modules = _modules_after(f"sys.argv = {typed}\nfrom lorsa.cli import main\nmain()")
    assert "lorsa.display.show" in modules, "it failed before it had a result"
    return modules


@pytest.mark.parametrize("with_json", [True, False])
def test_facts_of_a_store_load_no_tensors(store_folder: Path, with_json: bool) -> None:
    """store info loaded torch for what a manifest and a table say: 2 s and 340 MB."""
    words = ["--json"] if with_json else []
    modules = _modules_after(
        f"sys.argv = {['lorsa', 'store', 'info', str(store_folder), *words]}\n"
        "from lorsa.cli import main\nmain()"
    )
    assert "lorsa.store.facts" in modules
    assert not TENSORS & modules


def test_a_search_of_analyses_loads_no_tensors(run: Path, store_folder: Path) -> None:
    """find took 5 s to read a table of some megabytes."""
    for more in ((), ("--store", store_folder), ("--layers", "1")):
        assert not TENSORS & _loaded_by("find", "local", run, "--least", "0", *more)


def test_a_page_loads_no_tensors(run: Path) -> None:
    for _ in ("made", "up to date"):
        assert not TENSORS & _loaded_by("view", run)


@pytest.mark.parametrize(
    "use",
    [
        "analysis.heads.num_rows",
        "analysis.head(3), analysis.examples(3), analysis.passage(0)",
        "analysis.explanations(), analysis.vocabulary",
    ],
)
def test_an_analysis_is_read_without_tensors(run: Path, use: str) -> None:
    """Analysis.open imported torch, and pyarrow's short ways pandas."""
    modules = _modules_after(f"import lorsa\nanalysis = lorsa.Analysis.open({str(run)!r})\n{use}")
    assert "pyarrow" in modules
    assert not TENSORS & modules


@pytest.mark.parametrize(
    "words",
    [
        ["store", "info", "nowhere"],
        ["find", "induction", "nowhere"],
        ["find", "inductoin", "nowhere"],
        ["view", "nowhere"],
        ["train", "--store", "nowhere"],
        ["eval", "nowhere"],
    ],
)
def test_a_wrong_request_is_told_before_tensors_are_loaded(words: list[str]) -> None:
    """A folder that is not there took the seconds of a library that was not needed to say so."""
    modules = _modules_after(f"sys.argv = {['lorsa', *words]}\nfrom lorsa.cli import main\nmain()")
    assert "lorsa.cli" in modules
    assert not TENSORS & modules
