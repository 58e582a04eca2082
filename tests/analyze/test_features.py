"""An analysis against a pass by brute force: nothing streamed, nothing sparse."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.analyze.choices import STORE_SCORES
from lorsa.analyze.config import AnalyzeConfig
from lorsa.analyze.features import analyze_run
from lorsa.analyze.folder import save_partial
from lorsa.analyze.result import Analysis
from lorsa.analyze.schema import DISTANCES, VERSION
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.errors import AnalyzeError, HarvestError
from lorsa.progress import Measured
from lorsa.sites import Site
from lorsa.store.read.reader import ActivationStore
from lorsa.train.train import train
from runs import config
from tiny import N_CTX
from torch import Tensor

N_TOP, N_SAMPLES = 5, 3


@pytest.fixture(scope="session")
def run_folder(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained Lorsa of layer 1, not to be changed."""
    out = tmp_path_factory.mktemp("analysed") / "run"
    train(config(store_folder, out, {}))
    return out


@pytest.fixture(scope="session")
def request_(run_folder: Path, store_folder: Path, model_folder: Path) -> AnalyzeConfig:
    return AnalyzeConfig(
        run=run_folder,
        store=store_folder,
        model=str(model_folder),
        out=run_folder.parent / "analysis",
        n_top=N_TOP,
        n_samples=N_SAMPLES,
    )


@pytest.fixture(scope="session")
def analysis(request_: AnalyzeConfig) -> Analysis:
    analyze_run(request_)
    return Analysis.open(request_.folder)


class Dense:
    """All activations and patterns of a Lorsa on a store."""

    def __init__(self, run: Path, store: Path) -> None:
        opened = ActivationStore.open(store)
        self.tokens = opened.tokens(range(opened.manifest.n_seq)).long()
        x = opened.values(Site(1, "attn_in"), range(opened.manifest.n_seq)).float()
        lorsa = Lorsa.from_pretrained(run)
        c = lorsa.config
        with torch.no_grad():
            acts, ids = lorsa.encode(x)
            self.z = torch.zeros(*acts.shape[:2], c.n_ov_heads).scatter(2, ids.long(), acts)
            self.pattern = lorsa.pattern(x)  # [seq, n_qk_heads, q_pos, k_pos]
            self.v = lorsa.values(x)
        self.group = c.n_ov_heads // c.n_qk_heads

    def parts(self, seq: int, t: int, head: int) -> Tensor:
        """P[t, s] v[s], [n_ctx]."""
        return self.pattern[seq, head // self.group, t] * self.v[seq, :, head]


@pytest.fixture(scope="session")
def dense(run_folder: Path, store_folder: Path) -> Dense:
    return Dense(run_folder, store_folder)


def test_counts_and_means_are_those_of_all_tokens(analysis: Analysis, dense: Dense) -> None:
    z = dense.z.flatten(0, 1).double()
    n = (z != 0).sum(dim=0)
    assert analysis.heads["n_fired"].to_pylist() == n.tolist()
    assert analysis.heads["frequency"].to_pylist() == pytest.approx((n / len(z)).tolist())
    for head, row in enumerate(analysis.heads.to_pylist()):
        if n[head]:
            assert row["mean_act"] == pytest.approx(float(z[:, head].sum() / n[head]), rel=1e-5)
            assert row["max_act"] == pytest.approx(float(z[:, head].max()), rel=1e-5)
        else:
            assert row["type"] == "silent"
            assert row["max_act"] is row["mean_act"] is row["distance"] is None


def test_top_examples_are_the_largest(analysis: Analysis, dense: Dense) -> None:
    for head in range(dense.z.shape[2]):
        of_sequences = dense.z[:, :, head].max(dim=1)
        best = of_sequences.values.topk(N_TOP)
        expected = [
            (int(seq), int(of_sequences.indices[seq]), float(act))
            for act, seq in zip(*best, strict=True)
            if act > 0
        ]
        top = [row for row in analysis.examples(head) if row["kind"] == "top"]
        assert [row["rank"] for row in top] == list(range(len(expected)))
        assert [row["act"] for row in top] == pytest.approx([act for *_, act in expected], rel=1e-5)
        if len({act for *_, act in expected}) == len(expected):  # else several orders are right
            assert [(row["seq"], row["position"]) for row in top] == [e[:2] for e in expected]


def test_contributions_sum_to_the_activation(analysis: Analysis, dense: Dense) -> None:
    n_rows = 0
    for head in range(dense.z.shape[2]):
        for row in analysis.examples(head):
            n_rows += 1
            act = float(dense.z[row["seq"], row["position"], head])
            assert row["act"] == pytest.approx(act, abs=1e-5)
            assert sum(row["source_acts"]) + row["rest"] == pytest.approx(act, abs=1e-5)
            parts = dense.parts(row["seq"], row["position"], head)
            for source, part in zip(row["sources"], row["source_acts"], strict=True):
                assert part == pytest.approx(float(parts[source]), abs=1e-5)
            assert row["token"] == int(dense.tokens[row["seq"], row["position"]])
    assert n_rows > 100


def test_samples_are_spread_over_the_activations(analysis: Analysis, dense: Dense) -> None:
    for head in range(dense.z.shape[2]):
        fired = dense.z[:, :, head][dense.z[:, :, head] != 0]
        rows = [row for row in analysis.examples(head) if row["kind"] == "sample"]
        assert len(rows) == min(N_SAMPLES, len(fired))
        acts = [row["act"] for row in rows]
        assert acts == sorted(acts, reverse=True)
        for row in rows if len(fired) <= 64 else []:  # then the sample is all of them
            below, above = (float((fired < row["act"] + e).double().mean()) for e in (-1e-5, 1e-5))
            assert (
                below - 1e-6 <= row["quantile"] < above
            )  # the text repeats itself: there are ties


def test_what_heads_read_is_that_of_the_patterns(analysis: Analysis, dense: Dense) -> None:
    position = torch.arange(N_CTX)
    for head in range(0, dense.z.shape[2], 5):
        amount, previous, distance = 0.0, 0.0, 0.0
        for seq, t in (dense.z[:, :, head] != 0).nonzero().tolist():
            if t > 0:  # the first token has itself alone to read, and counts nowhere
                read = dense.parts(seq, t, head).abs().double()
                amount += float(read.sum())
                distance += float((read * (t - position).clamp(min=0)).sum())
                previous += float(read[t - 1])
        row = analysis.head(head)
        if amount:
            assert row["distance"] == pytest.approx(distance / amount, rel=1e-4)
            assert sum(row["by_distance"]) == pytest.approx(1, abs=1e-5)
            assert len(row["by_distance"]) == len(DISTANCES)
            assert row["previous_token"] == pytest.approx(previous / amount, rel=1e-4)


def test_every_column_is_there_with_a_model(analysis: Analysis) -> None:
    row = analysis.head(int(torch.tensor(analysis.heads["n_fired"].to_pylist()).argmax()))
    assert not [name for name in STORE_SCORES[:2] if row[name] is None]
    for name in ("parents", "promoted", "suppressed", "reads_embedding", "reads", "similar_o"):
        assert row[name], name
    logits = [each["logit"] for each in row["promoted"]]
    assert logits == sorted(logits, reverse=True)
    shares = [each["share"] for each in row["reads"]]
    assert 0 < sum(shares) <= 1.0001


def test_text_is_that_of_the_tokenizer(analysis: Analysis, dense: Dense) -> None:
    seq = analysis.examples(int(analysis.heads["n_fired"].to_pylist().index(max(
        analysis.heads["n_fired"].to_pylist()))))[0]["seq"]  # fmt: skip
    assert analysis.tokens(seq).tolist() == dense.tokens[seq].tolist()
    assert "the" in "".join(analysis.text(analysis.tokens(seq)))


def test_without_a_model_its_columns_are_null(request_: AnalyzeConfig, tmp_path: Path) -> None:
    analyze_run(replace(request_, model=None, out=tmp_path / "a"))
    found = Analysis.open(tmp_path / "a")
    for name in ("promoted", "probe_induction", "successor"):
        assert found.heads[name].null_count == found.heads.num_rows
    assert found.heads["parents"].null_count == 0


def test_a_stopped_analysis_goes_on_to_the_same(
    request_: AnalyzeConfig, analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorsa.analyze.features.READ_TOKENS", 10 * N_CTX)
    asked = replace(request_, out=tmp_path / "a")

    def ask_to_stop(told: str | Measured) -> None:
        if isinstance(told, Measured) and told.what == "reading heads":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        analyze_run(asked, report=ask_to_stop)
    with pytest.raises(AnalyzeError, match="unfinished"):
        Analysis.open(tmp_path / "a")
    told: list[Any] = []
    analyze_run(asked, report=told.append)
    assert f"going on after {10 * N_CTX} tokens" in told
    again = Analysis.open(tmp_path / "a")
    for name in ("head", "n_fired", "max_act", "type"):
        assert again.heads[name].equals(analysis.heads[name]), name
    for head in (0, 7):
        mine, theirs = again.examples(head), analysis.examples(head)
        places = [[(r["kind"], r["seq"], r["position"]) for r in rows] for rows in (mine, theirs)]
        assert places[0] == places[1]


def test_what_another_version_collected_is_not_resumed(
    request_: AnalyzeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stopped analysis whose file holds other tensors, nothing can be taken."""

    def load(path: Path, *_: object) -> tuple[dict[str, Tensor], int]:
        return {"reading.n_fired": torch.zeros(3)}, 1

    monkeypatch.setattr("lorsa.analyze.features.load_partial", load)
    told: list[Any] = []
    asked = replace(request_, model=None, out=tmp_path / "a", tokens=2 * N_CTX)
    assert analyze_run(asked, report=told.append)["n_tokens"] == 2 * N_CTX
    assert not [each for each in told if "going on" in str(each)]


def test_a_finished_analysis_is_not_made_again(request_: AnalyzeConfig, analysis: Analysis) -> None:
    told: list[Any] = []
    assert analyze_run(request_, report=told.append)["version"] == VERSION
    assert told == [f"{request_.folder} is finished already"]


def test_what_a_finished_analysis_collected_is_taken_away(
    request_: AnalyzeConfig, analysis: Analysis
) -> None:
    """A kill at the last step left it for good; that of another request is still wanted."""
    partial = request_.folder / "partial.safetensors"
    for request, stays in ((analysis.facts["request"], False), ({"version": 0}, True)):
        save_partial(partial, {"a": torch.ones(2)}, 1, request)
        analyze_run(request_)
        assert partial.exists() is stays
    partial.unlink()


@pytest.mark.parametrize("damage", ["another version", "torn", "a list", "no heads"])
def test_an_analysis_that_cannot_be_read_is_replaced(
    request_: AnalyzeConfig, tmp_path: Path, damage: str
) -> None:
    """One of another version was to be analysed again, which failed as it was of that version."""
    asked = replace(request_, model=None, out=tmp_path, tokens=N_CTX)
    facts = analyze_run(asked)
    path = tmp_path / "analysis.json"
    contents = {"another version": json.dumps(facts | {"version": 0}), "torn": "{", "a list": "[]"}
    if damage in contents:
        path.write_text(contents[damage])
    else:
        (tmp_path / "heads.parquet").unlink()
    with pytest.raises(AnalyzeError, match="analyze again"):
        Analysis.open(tmp_path)
    told: list[Any] = []
    analyze_run(asked, report=told.append)
    assert f"{tmp_path} holds another analysis, which is replaced when this one is done" in told
    assert Analysis.open(tmp_path).heads.num_rows


def test_another_model_is_not_finished_already(request_: AnalyzeConfig, analysis: Analysis) -> None:
    with pytest.raises(HarvestError, match="nowhere"):
        analyze_run(replace(request_, model="./nowhere"))


def test_a_lorsa_that_never_fires(request_: AnalyzeConfig, tmp_path: Path) -> None:
    lorsa = Lorsa.from_pretrained(request_.run)
    with torch.no_grad():
        lorsa.W_V.zero_()
        lorsa.b_V.fill_(-1)
    lorsa.save_pretrained(tmp_path / "run")
    facts = analyze_run(replace(request_, run=tmp_path / "run", out=tmp_path / "a"))
    found = Analysis.open(tmp_path / "a")
    assert facts["types"] == {"silent": found.heads.num_rows}
    assert found.examples(0) == []


def test_a_store_without_a_tokenizer_shows_ids(
    request_: AnalyzeConfig, store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorsa.language.subject.Subject.tokenizer", lambda subject, needed: None)
    told: list[Any] = []
    asked = replace(request_, model=None, out=tmp_path / "a", tokens=8 * N_CTX)
    analyze_run(asked, report=told.append)
    assert any("token ids are shown" in str(each) for each in told)
    found = Analysis.open(tmp_path / "a")
    assert found.text([5])[0] == "<5>"


def test_a_half_written_analysis_is_refused(analysis: Analysis, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "analysis.json").write_text(json.dumps(analysis.facts))
    with pytest.raises(AnalyzeError, match="lacks heads.parquet"):
        Analysis.open(folder)
    (folder / "analysis.json").write_text("{")
    with pytest.raises(AnalyzeError, match="is damaged"):
        Analysis.open(folder)


def test_a_run_of_another_model_is_refused(request_: AnalyzeConfig, tmp_path: Path) -> None:
    lorsa = Lorsa.from_pretrained(request_.run)
    lorsa.config = replace(lorsa.config, base_model="other", store_uuid="other")
    lorsa.save_pretrained(tmp_path / "run")
    with pytest.raises(AnalyzeError, match="is a Lorsa of other"):
        analyze_run(replace(request_, run=tmp_path / "run"))


def test_explanations_of_other_weights_are_archived(
    request_: AnalyzeConfig, tmp_path: Path
) -> None:
    asked = replace(request_, model=None, run=tmp_path / "run", out=tmp_path / "a", tokens=N_CTX)
    lorsa = Lorsa.from_pretrained(request_.run)
    lorsa.save_pretrained(tmp_path / "run")
    analyze_run(asked)
    said = tmp_path / "a" / "explanations.jsonl"
    said.write_text("{}\n")
    analyze_run(replace(asked, n_top=2))
    assert said.exists()  # of the same Lorsa
    with torch.no_grad():
        lorsa.W_O.mul_(2)
    lorsa.save_pretrained(tmp_path / "run")
    analyze_run(asked)
    assert not said.exists()
    assert len(list((tmp_path / "a").glob("explanations-*.jsonl"))) == 1
