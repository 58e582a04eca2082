"""Finding heads of a type."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lorsa.analyze.config import AnalyzeConfig
from lorsa.analyze.features import analyze_run
from lorsa.analyze.find import find_heads
from lorsa.analyze.found import evidence, in_words
from lorsa.analyze.result import Analysis
from lorsa.analyze.schema import HEADS
from lorsa.cli import app
from lorsa.display.analyze import analyze_table
from lorsa.errors import AnalyzeError
from lorsa.store.read.reader import ActivationStore
from lorsa.train.train import train
from rich.console import Console
from runs import config
from typer.testing import CliRunner
from unseal import change_json, unseal

from reading import make_analysis

runner = CliRunner()


@pytest.fixture(scope="module")
def run(store_folder: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("found") / "run"
    train(config(store_folder, out, {}))
    analyze_run(AnalyzeConfig(run=out, store=store_folder, model=str(model_folder)))
    return out


def test_the_best_come_first_with_evidence(run: Path, store_folder: Path) -> None:
    found = find_heads("previous-token", store=store_folder, runs=[run], n=4, least=0)
    assert 0 < len(found) <= 4
    scores = [head.score for head in found]
    assert scores == sorted(scores, reverse=True)
    assert found[0].measured_on == "both"
    assert "<" in (found[0].evidence or [""])[0]
    both = [
        min(row["previous_token_low"], row["probe_previous_token_low"])
        for row in Analysis.open(run).heads.to_pylist()
        if None not in (row["previous_token_low"], row["probe_previous_token_low"])
    ]
    assert found[0].score == pytest.approx(max(both))
    for head in found:
        assert head.score < min(head.score_on_text or 0, head.score_on_probes or 0)


def test_a_type_that_no_head_is_of_has_none(run: Path, store_folder: Path) -> None:
    """Ten heads of 0.02 were shown as induction heads."""
    kinds = ("previous_token", "induction", "duplicate_token")
    bests = {kind: find_heads(kind, runs=[run], n=1, least=0)[0] for kind in kinds}
    for kind, best in bests.items():
        assert [h.head for h in find_heads(kind, runs=[run], n=1, least=best.score)] == [best.head]
        assert find_heads(kind, runs=[run], least=best.score + 1e-6) == []


def test_heads_without_a_score_are_left_out(store_folder: Path, tmp_path: Path) -> None:
    """Too few scores made a head without one come up as None, and the order a TypeError."""
    root = make_analysis(tmp_path / "analysis", with_model=False)
    heads = pq.read_table(root / "heads.parquet").to_pylist()
    for row in heads:
        row["n_fired"], row["induction_low"] = 30, 0.5 if row["head"] == 3 else None
    pq.write_table(pa.Table.from_pylist(heads, HEADS), root / "heads.parquet")
    uuid = ActivationStore.open(store_folder).manifest.uuid
    unseal(root)
    change_json(root / "analysis.json", store_uuid=uuid)
    found = find_heads("induction", store=store_folder, runs=[root])
    assert [(head.head, head.score) for head in found] == [(3, 0.5)]
    for row in heads:
        row["induction_low"] = None
    pq.write_table(pa.Table.from_pylist(heads, HEADS), root / "heads.parquet")
    with pytest.raises(AnalyzeError, match="no head here has a score of induction"):
        find_heads("induction", store=store_folder, runs=[root])


def test_evidence_holds_no_controls_of_terminals(tmp_path: Path) -> None:
    """Text of a corpus reached the terminal with its escape sequences."""
    words = ["\x1b[2J", "\x9b", "a\r\n", " b", "\u202e"]
    analysis = Analysis.open(make_analysis(tmp_path / "analysis", words=words))
    lines = [in_words(analysis, each) for head in range(8) for each in analysis.examples(head)]
    assert all(line.isprintable() for line in lines)
    assert "<1B>" in "".join(lines)
    assert "a↵" in "".join(lines)


def test_evidence_has_whole_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters in pieces were shown as bytes."""
    words = [" a", "<0xC3>", "<0xA9>", " b"]
    analysis = Analysis.open(make_analysis(tmp_path / "analysis", words=words))
    monkeypatch.setattr(analysis, "tokens", lambda seq: np.array([0, 1, 2, 1, 2, 3, 0]))
    example = {"seq": 0, "position": 4, "sources": [1]}
    assert in_words(analysis, example) == " a[é]<é> b a"


def test_without_a_run_the_models_own_heads_are_scored(store_folder: Path) -> None:
    found = find_heads("first_token", store=store_folder, n=20, least=0)
    assert {head.measured_on for head in found} == {"text"}
    assert all(head.score < (head.score_on_text or 0) for head in found if head.score)
    assert {(head.layer, head.head) for head in found} == {(i, h) for i in (1, 2) for h in range(4)}
    assert all(0 <= head.score <= 1 for head in found)
    only = find_heads("first_token", store=store_folder, layers=[2], least=0)
    assert {head.layer for head in only} == {2}


def test_what_cannot_be_found_is_said(run: Path, store_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="type is 'inductive'; did you mean induction"):
        find_heads("inductive", store=store_folder)
    with pytest.raises(AnalyzeError, match="name a run"):
        find_heads("successor", store=store_folder)
    with pytest.raises(AnalyzeError, match="lorsa analyze"):
        find_heads("induction", store=store_folder, runs=[tmp_path])
    shutil.copytree(Analysis.open(run).root, tmp_path / "other")
    unseal(tmp_path / "other")
    change_json(tmp_path / "other/analysis.json", store_uuid="other")
    with pytest.raises(AnalyzeError, match="another store"):
        find_heads("induction", store=store_folder, runs=[tmp_path / "other"])


def test_the_command_prints_a_table_or_json(run: Path, store_folder: Path) -> None:
    words = ["find", "previous-token", str(run), "--store", str(store_folder)]
    shown = runner.invoke(app, [*words, "--least", "0"])
    assert shown.exit_code == 0, shown.output
    assert "previous-token heads" in shown.stdout
    assert "whichever is smaller, by a lower bound" in " ".join(shown.stdout.split())
    found = json.loads(runner.invoke(app, [*words, "--json", "--top", "3", "--least", "0"]).stdout)
    assert len(found["heads"]) == 3
    none = runner.invoke(app, [*words, "--least", "1"])
    assert none.exit_code == 0, none.output
    assert f"the best has a score of {found['best']:.2f}" in none.stdout
    assert "none here" in none.stdout
    told = json.loads(runner.invoke(app, [*words, "--json", "--least", "1"]).stdout)
    assert (told["heads"], told["best"]) == ([], found["best"])
    assert runner.invoke(app, ["find", "x", "--store", str(store_folder)]).exit_code == 2


def test_layers_of_runs_need_no_store(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """find RUNS --layers looked into ./acts for the layers, and failed where that is not."""
    monkeypatch.chdir(tmp_path)
    layer = Analysis.open(run).facts["layer"]
    words = ["find", "previous-token", str(run), "--json", "--least", "0", "--layers"]
    found = runner.invoke(app, [*words, str(layer)])
    assert found.exit_code == 0, found.output
    assert {head["layer"] for head in json.loads(found.stdout)["heads"]} == {layer}
    refused = runner.invoke(app, [*words, str(layer + 1)])
    assert refused.exit_code == 1
    assert f"layer {layer + 1} is not in the runs" in json.loads(refused.stdout)["error"]
    without = runner.invoke(app, ["find", "induction", "--layers", "1"])
    assert (without.exit_code, "acts does not exist" in without.stderr) == (1, True)


def test_analyze_prints_its_types(run: Path, store_folder: Path) -> None:
    words = ["analyze", str(run), "--store", str(store_folder), "--tokens", "200"]
    shown = runner.invoke(app, [*words, "--out", str(run / "small")])
    assert shown.exit_code == 0, shown.output
    assert "heads of layer 1" in shown.stdout
    assert "of which" in shown.stdout
    again = runner.invoke(app, [*words, "--out", str(run / "small"), "--json"])
    assert json.loads(again.stdout)["n_tokens"] == 192


def test_evidence_is_from_where_a_head_can_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sinks were shown by firings on the first token of a sequence, which reads itself."""

    places = [{"position": at, "rank": rank} for rank, at in enumerate((0, 0, 5, 0, 7))]
    monkeypatch.setattr(Analysis, "examples", lambda analysis, head: places)
    monkeypatch.setattr("lorsa.analyze.found.in_words", lambda analysis, each: str(each["rank"]))
    analysis = Analysis.open(make_analysis(tmp_path / "analysis"))
    assert evidence(analysis, 3) == ["2", "4", "0"]


def test_counts_of_types_say_what_probes_say() -> None:
    """1,259 heads were called induction heads, of which probes knew a few hundred."""
    family = {"n_heads": 438, "effect": 0.21, "verified": True}
    result = {
        "n_ov_heads": 4608,
        "n_tokens": 65_536,
        "types": {"induction": 997, "mixed": 3000, "silent": 611},
        "types_by_both": {"induction": 438},
        "families": {"induction": family, "previous_token": family | {"verified": False}},
        "with_model": True,
        "seconds": 1.0,
        "analysis": "a",
        "layer": 17,
        "run": "r",
    }
    console = Console(width=100, file=io.StringIO())
    console.print(analyze_table(result))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "997, of 438 probes say the same" in text
    assert "induction (copying costs +0.21 nats without them)" in text
    assert "previous-token (" not in text
