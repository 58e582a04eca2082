"""Finding heads of a type."""

import json
from pathlib import Path

import pytest
from lorsa.analyze import Analysis, AnalyzeConfig, AnalyzeError, analyze_run, find_heads
from lorsa.cli import app
from lorsa.train import train
from runs import config
from typer.testing import CliRunner

runner = CliRunner()


@pytest.fixture(scope="module")
def run(store_folder: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("found") / "run"
    train(config(store_folder, out, {}))
    analyze_run(AnalyzeConfig(run=out, store=store_folder, model=str(model_folder)))
    return out


def test_the_best_come_first_with_evidence(run: Path, store_folder: Path) -> None:
    found = find_heads("previous_token", store=store_folder, runs=[run], n=4)
    assert 0 < len(found) <= 4
    scores = [head.score for head in found]
    assert scores == sorted(scores, reverse=True)
    assert found[0].measured_on == "probe"
    assert "<" in (found[0].evidence or [""])[0]
    heads = Analysis.open(run).heads.to_pylist()
    often = [row for row in heads if row["probe_fired"] >= 20]
    best = max(row["probe_previous_token"] or 0 for row in often)
    assert found[0].score == pytest.approx(best)


def test_without_a_run_the_models_own_heads_are_scored(store_folder: Path) -> None:
    found = find_heads("first_token", store=store_folder, n=20)
    assert {(head.layer, head.head) for head in found} == {(i, h) for i in (1, 2) for h in range(4)}
    assert all(0 <= head.score <= 1 for head in found)
    only = find_heads("first_token", store=store_folder, layers=[2])
    assert {head.layer for head in only} == {2}


def test_what_cannot_be_found_is_said(run: Path, store_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AnalyzeError, match="type is 'inductive'; allowed: previous_token"):
        find_heads("inductive", store=store_folder)
    with pytest.raises(AnalyzeError, match="name a run"):
        find_heads("successor", store=store_folder)
    with pytest.raises(AnalyzeError, match="lorsa analyze"):
        find_heads("induction", store=store_folder, runs=[tmp_path])
    facts = Analysis.open(run).root / "analysis.json"
    whole = facts.read_text()
    facts.write_text(json.dumps(json.loads(whole) | {"store_uuid": "other"}))
    with pytest.raises(AnalyzeError, match="another store"):
        find_heads("induction", store=store_folder, runs=[run])
    facts.write_text(whole)


def test_the_command_prints_a_table_or_json(run: Path, store_folder: Path) -> None:
    words = ["find", "previous-token", str(run), "--store", str(store_folder)]
    shown = runner.invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "previous-token heads" in shown.stdout
    found = json.loads(runner.invoke(app, [*words, "--json", "--top", "3"]).stdout)
    assert len(found["heads"]) <= 3
    assert runner.invoke(app, ["find", "x", "--store", str(store_folder)]).exit_code == 1


def test_analyze_prints_its_types(run: Path, store_folder: Path) -> None:
    words = ["analyze", str(run), "--store", str(store_folder), "--tokens", "200"]
    shown = runner.invoke(app, [*words, "--out", str(run / "small")])
    assert shown.exit_code == 0, shown.output
    assert "not done" in shown.stdout
    again = runner.invoke(app, [*words, "--out", str(run / "small"), "--json"])
    assert json.loads(again.stdout)["n_tokens"] == 192
