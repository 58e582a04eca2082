"""What a run's files say need not be typed again, and is checked as if it were."""

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from lorsa import cli
from lorsa.commands.following import following
from lorsa.seal import read_summed, write_summed
from lorsa.train.config import TrainConfig
from lorsa.train.origin import model_at_hand, store_of
from lorsa.train.train import train
from runs import settings
from small import edit_manifest
from typer.testing import CliRunner, Result


@pytest.fixture(scope="module")
def made(store_folder: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, and a run that names it by a relative path."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(store_folder, root / "acts")
    here = Path.cwd()
    os.chdir(root)
    try:
        train(TrainConfig(**settings(Path("acts"), train_tokens=512), out=Path("runs/layer-1")))
    finally:
        os.chdir(here)
    return root


def _lorsa(*words: object) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def _line(result: Result, code: int = 1) -> str:
    assert result.exit_code == code, result.output
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize("inside", [".", "runs", "runs/layer-1", "acts/layers"])
def test_store_and_model_are_those_of_the_run(
    made: Path, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both had to be typed for every command, the model as a path of 95 characters."""
    monkeypatch.chdir(made / inside)
    run = os.path.relpath(made / "runs/layer-1")
    done = _lorsa("eval", run, "--ce-tokens", 64, "--again", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["cross_entropy"]["replaced"] > 0
    store = os.path.relpath(made / "acts")
    assert f"not given, and so as {run} has it: store {store}, model tiny-llama" in done.stderr
    fires = _lorsa("ablate", run, "--heads", "0-255", "--tokens", "1-9", "--json")
    assert fires.exit_code == 0, fires.output
    assert f"not given, and so as {run} has it: model tiny-llama" in fires.stderr


def test_an_analysis_takes_both_and_none_leaves_the_model_out(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without --model a newcomer got no probes and no effects, and had to do it all again."""
    monkeypatch.chdir(made)
    words = ["analyze", "runs/layer-1", "--tokens", 256, "--json", "--out"]
    with_both = json.loads(_lorsa(*words, tmp_path / "a").stdout)
    assert (with_both["with_model"], with_both["store"]) == (True, "acts")
    assert with_both["next"] == following("view", tmp_path / "a", "--open")
    without = _lorsa(*words, tmp_path / "b", "--model", "none")
    assert json.loads(without.stdout)["with_model"] is False
    assert "model" not in without.stderr.splitlines()[0]


def test_another_store_under_the_name_is_not_taken(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store is told by its uuid; one that is nearer by its path may be another's."""
    shutil.copytree(made / "runs", tmp_path / "deep/runs")
    shutil.copytree(made / "acts", tmp_path / "acts")
    shutil.copytree(made / "acts", tmp_path / "deep/acts")
    edit_manifest(tmp_path / "deep/acts", uuid="of another")
    monkeypatch.chdir(tmp_path / "deep")
    assert store_of(Path("runs/layer-1")) == "../acts"
    content = (tmp_path / "acts/manifest.json").read_bytes()
    (tmp_path / "acts/manifest.json").write_bytes(content.replace(b'"n_seq": 1', b'"n_seq": 2'))
    assert "acts/manifest.json is damaged" in _line(_lorsa("eval", "runs/layer-1"))
    (tmp_path / "acts/manifest.json").unlink()
    line = _line(_lorsa("eval", "runs/layer-1"))
    assert line.startswith(
        "error: acts is another store than the one that runs/layer-1 is of (uuid"
    )
    shutil.rmtree(tmp_path / "deep/acts")
    line = _line(_lorsa("analyze", "runs/layer-1"))
    assert line == "error: the store of runs/layer-1, acts, is not there; give --store"


def test_a_model_that_is_not_here_is_not_fetched(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can do without it says so; what cannot ends in a line with the option."""
    shutil.copytree(made / "runs/layer-1", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run/config.json"
    content = path.read_text("utf-8")
    name = json.loads(content)["config"]["base_model"]
    for model, advice in (
        ("Qwen/Qwen2-7B", "give --model Qwen/Qwen2-7B"),
        ("/no/a.gguf", "give --model"),
    ):
        path.write_text(content.replace(name, model), "utf-8")
        assert model_at_hand(Path("run")) is None
        shown = model.rpartition("/")[2] if model.endswith("gguf") else model
        why = f"the language model of run, {shown}, is not on this machine"
        line = _line(_lorsa("ablate", "run", "--heads", "1", "--tokens", "1,2"))
        assert line == f"error: {why}; {advice}"
        # config.json is bound to the weights, so this run cannot be read any further
        done = _lorsa("eval", "run", "--store", made / "acts")
        assert f"{why}: what takes it is left out; for it, {advice}\n" in done.stderr


def test_a_run_without_facts_names_what_to_give(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for content in ("{}", "[]", '{"config": 3}', '{"config": {"store": 5}}'):
        (tmp_path / "run/run.json").write_text(content, "utf-8")
        assert _line(_lorsa("eval", "run")) == "error: run does not name its store; give --store"
    (tmp_path / "run/run.json").write_text("{", "utf-8")
    assert "run/run.json cannot be read" in _line(_lorsa("eval", "run"))


def test_runs_of_several_stores_are_told_apart(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run's would have been taken for all, and the second refused as of another."""
    monkeypatch.chdir(made)
    shutil.copytree(made / "runs/layer-1", tmp_path / "b")
    shutil.copytree(made / "acts", other := tmp_path / "other")
    content = read_summed(tmp_path / "b/run.json")
    content["config"]["store"] = str(other)
    write_summed(tmp_path / "b/run.json", content)
    words = ["eval", "runs/layer-1", tmp_path / "b", "--model", "none"]
    line = _line(_lorsa(*words), 2)
    assert line == f"error: the runs are of several stores (acts, {other}); give --store"
    assert _lorsa(*words, "--store", "acts").exit_code == 0


def test_a_conversion_takes_the_model_only_where_a_norm_is_folded(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --model it wrote a Lorsa that no hook of the other tool feeds, with a note."""
    monkeypatch.chdir(made)
    done = _lorsa("convert", "runs/layer-1", tmp_path / "theirs", "--to", "llamascopium", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["hook_in"] == "blocks.1.ln1.hook_normalized"
    assert "not given, and so as runs/layer-1 has it: model tiny-llama" in done.stderr
    done = _lorsa("convert", "runs/layer-1", tmp_path / "ours", "--json")
    assert json.loads(done.stdout)["hook_in"] == "x"
    assert "not given" not in done.stderr
    words = ["--to", "llamascopium", "--model", "none", "--json"]
    done = _lorsa("convert", "runs/layer-1", tmp_path / "as-it-is", *words)
    assert json.loads(done.stdout)["hook_in"] == "x"


def test_an_evaluation_is_not_done_twice(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call says in a line that it shows what was kept, and shows all of it."""
    monkeypatch.chdir(made)
    words = ["eval", "runs/layer-1", "--ce-tokens", 96]
    (made / "runs/layer-1/eval.json").unlink(missing_ok=True)
    first = _lorsa(*words, "--json")
    again = _lorsa(*words, "--json")
    assert json.loads(again.stdout) == json.loads(first.stdout)
    assert "measured before, and kept in runs/layer-1; --again measures anew" in again.stderr
    assert "measured before, and" not in first.stderr
    assert "by position in the sequence" in _lorsa(*words).stdout
    assert "measured before" not in _lorsa(*words, "--again").stderr


def test_each_stage_names_the_next(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only harvest and store info did; the paths are those of this run, and can be pasted."""
    monkeypatch.chdir(made)
    run = shlex.quote("my runs/layer-1")
    words = ["train", "--layers", 1, "--out", "my runs", "--train-tokens", 512, "--top-k", 6]
    trained = json.loads(_lorsa(*words, "--batch-tokens", 128, "--json").stdout)
    assert trained["next"] == f"lorsa eval {run}"
    words = [*shlex.split(trained["next"])[1:], "--model", "none", "--json"]
    measured = json.loads(_lorsa(*words).stdout)
    assert measured["next"] == f"lorsa analyze {run}"
    words = [*shlex.split(measured["next"])[1:], "--model", "none", "--tokens", 640]
    assert _lorsa(*words).stdout.splitlines()[-1] == f"next: lorsa view {run} --open"


def test_a_path_is_relative_where_that_is_shorter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pytest"])
    assert following("view", tmp_path / "runs/layer-1") == "lorsa view runs/layer-1"
    assert following("view", "/x") == "lorsa view /x"
    assert following("eval", "it's here") == "lorsa eval 'it'\"'\"'s here'"


def test_a_program_off_the_path_is_named_by_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `make demo` the shell knew no lorsa, and the next command began with it."""
    monkeypatch.chdir(tmp_path)
    program = tmp_path / ".venv/bin/lorsa"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.setattr("sys.argv", [str(program), "demo"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert following("view", "demo") == ".venv/bin/lorsa view demo"
    monkeypatch.setenv("PATH", str(program.parent))
    assert following("view", "demo") == "lorsa view demo"
    monkeypatch.setattr("sys.argv", ["/elsewhere/__main__.py"])
    monkeypatch.setenv("PATH", "")
    assert following("view", "demo") == "lorsa view demo"
