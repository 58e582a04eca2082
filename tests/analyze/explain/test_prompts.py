"""What is sent about a head, and how replies are read."""

import json
from pathlib import Path

import numpy as np
import pytest
from lorsa.analyze.choices import STORE_SCORES
from lorsa.analyze.explain.prompts import Prompts, Trial, read_explanation, read_fires
from lorsa.analyze.result import Analysis
from lorsa.analyze.said import said
from lorsa.analyze.trust import trusted_types

from reading import WORDS, make_analysis


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    return Analysis.open(make_analysis(tmp_path_factory.mktemp("analysis"), n_top=12, n_seq=40))


def test_the_prompt_marks_where_the_head_fires_and_what_it_reads(analysis: Analysis) -> None:
    """Every top example in a line: firing token, sources with shares, far ones too."""
    prompt = Prompts(analysis, seed=0).explain(2)
    assert "makes it" not in prompt.split("Passages:")[1]
    lines = [line for line in prompt.split("Passages:\n")[1].splitlines() if line[:1].isdigit()]
    assert len(lines) == 10
    for line, example in zip(lines, analysis.examples(2), strict=False):
        text = WORDS[example["token"]].replace("\n", "↵")
        share = f"{example['source_acts'][0] / example['act']:.0%}"
        assert f"<<{text}>>" in line or f"<<[[{text}|" in line
        for source, act in zip(example["sources"], example["source_acts"], strict=True):
            token = WORDS[analysis.tokens(example["seq"])[source]].replace("\n", "↵")
            assert f"[[{token}|{act / example['act']:.0%}]]" in line
        assert share in line
        far = [s for s in example["sources"] if s < example["position"] - 25]
        assert line.count(" … ") >= bool(far)


def test_the_prompt_names_a_type_that_can_be_trusted_only(analysis: Analysis) -> None:
    """Models were told "induction" of heads that probes showed to be none."""
    trust, types = trusted_types(analysis), analysis.heads["type"].to_pylist()
    sure, unsure = (np.flatnonzero(which) for which in (~np.isnan(trust), np.isnan(trust)))
    named = types[sure[0]].replace("_", " ")
    assert f"Kind of attention: {named}.\n" in Prompts(analysis, seed=0).explain(int(sure[0]))
    called = next(int(head) for head in unsure if types[head] in STORE_SCORES)
    assert "Kind of attention" not in Prompts(analysis, seed=0).explain(called)


def test_the_prompt_says_nothing_that_chance_explains(
    analysis: Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models were told that a head makes noise likelier, and put it into their line."""
    row = analysis.head(2)
    beyond = [WORDS[each["token"]] for each in said(row, "promoted") or []]
    words = ", ".join(json.dumps(word, ensure_ascii=False) for word in beyond)
    prompt = Prompts(analysis, seed=0).explain(2)
    assert f"Next tokens that it makes likelier: {words}.\n" in prompt
    assert 0 < len(beyond) < len(row["promoted"])
    for change in ({"promoted_list_z": 1.0}, {"promoted_z": [1.0] * 8}, {"promoted_z": None}):
        monkeypatch.setattr(analysis, "head", lambda head, change=change: row | change)
        assert "likelier:" not in Prompts(analysis, seed=0).explain(2)


def test_trials_hold_out_what_was_shown_and_end_at_the_token(analysis: Analysis) -> None:
    prompts = Prompts(analysis, seed=0)
    trial = prompts.trial(2)
    assert trial is not None
    assert trial == Prompts(analysis, seed=0).trial(2)
    assert trial != Prompts(analysis, seed=1).trial(2)
    assert trial.fires.count(True) == trial.fires.count(False) == 10
    assert all(passage.endswith(">>") and "[[" not in passage for passage in trial.passages)
    shown, held_out = prompts._split(2)
    firing = {p for p, fires in zip(trial.passages, trial.fires, strict=True) if fires}
    assert firing <= {prompts._tried(example) for example in held_out}
    assert not firing & {prompts._tried(example) for example in shown}
    assert "{" not in trial.prompt("odd {text}").split("odd {text}")[0]


PIECES = [" river", "<0xE4><0xBB>", "<0x8A>", "<0xE5>", "<0xA4><0xA9>", " lamp"]


def test_characters_in_pieces_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judges were shown bytes; a mark on any piece is on the character, and shares add up."""
    analysis = Analysis.open(make_analysis(tmp_path / "analysis", words=PIECES))
    tokens = np.array([0, 1, 2, 3, 4, 5, 1, 5])
    monkeypatch.setattr(analysis, "tokens", lambda seq: tokens)
    prompts = Prompts(analysis, seed=0)
    everything = set(range(8))
    for at in (3, 4):
        shown = prompts._passage(0, everything, at, {1: 0.5, 2: 0.25, 4: 0.125})
        assert shown == " river[[今|75%]]<<[[天|12%]]>> lamp<0xE4><0xBB> lamp"  # the last is torn
    assert prompts._passage(0, {2, 3}, 2, {}) == "… <<今>>天"
    assert prompts._passage(0, {0, 4}, 0, {}) == "<< river>> … 天"
    assert analysis.joined(0, range(4, 6)) == [(range(3, 5), "天")]
    assert analysis.joined(0, range(5, 8)) == []


def test_nothing_held_out_means_no_trial(tmp_path: Path) -> None:
    analysis = Analysis.open(make_analysis(tmp_path / "few", n_top=2))
    assert Prompts(analysis, seed=0).trial(2) is None


@pytest.mark.parametrize(
    ("chosen", "score"),
    [({1, 2}, 1.0), (set(), 0.5), ({1, 2, 3, 4}, 0.5), ({1, 3}, 0.5), ({1}, 0.75)],
)
def test_the_score_is_balanced(chosen: set[int], score: float) -> None:
    assert Trial(["a", "b", "c", "d"], [True, True, False, False]).score(chosen) == score


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ('{"explanation": "a"}', "a"),
        ('```json\n{"explanation": "a\n b\\u001b[0m"}\n```', "a b[0m"),
        ('<think>{"explanation": "draft"}</think> {"explanation": "a", "more": {"x": 1}}', "a"),
        ('{"n": 1} {"explanation": "a"} {broken', "a"),
        (f'{{"explanation": "{"a" * 400}"}}', "a" * 299 + "…"),
    ],
)
def test_an_explanation_is_read_tolerantly(reply: str, text: str) -> None:
    assert read_explanation(reply) == text


@pytest.mark.parametrize("reply", ["", "a", '{"explanation": ""}', '{"explanation": "..."}', "[1]"])
def test_no_explanation_is_an_error(reply: str) -> None:
    with pytest.raises(ValueError, match="no JSON object"):
        read_explanation(reply)


@pytest.mark.parametrize(
    ("reply", "chosen"),
    [
        ('{"fires": []}', set()),
        ('Sure: {"fires": [1, "3", 3]}.', {1, 3}),
        ('{"fires": [1, 9]} no: {"fires": [2]}', {2}),
    ],
)
def test_numbers_are_read_tolerantly(reply: str, chosen: set[int]) -> None:
    assert read_fires(reply, 4) == chosen


@pytest.mark.parametrize(
    "reply", ['{"fires": [5]}', '{"fires": [0]}', '{"fires": [true]}', '{"fires": 1}', "1, 2"]
)
def test_other_numbers_are_an_error(reply: str) -> None:
    with pytest.raises(ValueError, match=r"list of numbers of 1\.\.4"):
        read_fires(reply, 4)
