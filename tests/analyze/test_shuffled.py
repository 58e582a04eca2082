"""Nothing is named where there is nothing: a Lorsa of activations that belong to other tokens."""

from pathlib import Path

import pytest
from lorsa.analyze.config import AnalyzeConfig
from lorsa.analyze.features import analyze_run
from lorsa.analyze.named import named_heads
from lorsa.analyze.result import Analysis
from lorsa.analyze.trust import Start, starts
from lorsa.train.train import train
from runs import config
from shuffled import shuffled_store

NEVER = ("induction", "previous_token", "successor", "first_token")


@pytest.fixture(scope="module")
def analysis(
    store_folder: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Analysis:
    folder = tmp_path_factory.mktemp("shuffled")
    store = shuffled_store(store_folder, folder / "acts", 1)
    train(config(store, folder / "run", {}))
    analyze_run(AnalyzeConfig(run=folder / "run", store=store, model=str(model_folder)))
    return Analysis.open(folder / "run")


@pytest.fixture(scope="module")
def found(analysis: Analysis) -> dict[str, Start]:
    return {start.kind: start for start in starts(analysis)}


@pytest.mark.parametrize("kind", NEVER)
def test_no_head_is_named(found: dict[str, Start], kind: str) -> None:
    """A page named three heads of every kind, whatever they were."""
    assert found[kind].heads == []
    assert (found[kind].best or 0) < 0.5


def test_no_name_is_given_to_print(analysis: Analysis) -> None:
    assert not {head.type for head in named_heads(analysis, 50)} & set(NEVER)


def test_nothing_is_verified(analysis: Analysis) -> None:
    assert not [name for name, found in analysis.facts["families"].items() if found["verified"]]
