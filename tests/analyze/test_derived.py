"""Analysis of a store whose attn_in is derived from the residual stream."""

from pathlib import Path

from lorsa.analyze.attention.own import own_types
from lorsa.analyze.config import AnalyzeConfig
from lorsa.analyze.features import analyze_run
from lorsa.analyze.result import Analysis
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.sites import Site
from lorsa.store.read.reader import ActivationStore
from lorsa.train.train import train
from runs import config
from tiny import N_CTX


def test_what_is_not_stored_is_derived(
    model_folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    asked = HarvestConfig(
        model=str(model_folder),
        data=str(text_folder),
        store=tmp_path / "acts",
        layers="1",
        sites="attn,mlp",
        outputs="derive",
        n_ctx=N_CTX,
        tokens=40 * N_CTX,
        device="cpu",
    )
    harvest(asked)
    store = ActivationStore.open(tmp_path / "acts")
    assert not store.is_stored(Site(1, "attn_in"))
    train(config(tmp_path / "acts", tmp_path / "run", {}))
    analyze_run(AnalyzeConfig(run=tmp_path / "run", store=tmp_path / "acts", n_samples=2))
    assert Analysis.open(tmp_path / "run/analysis").heads.num_rows > 0
    assert own_types(store, 1, [0, 1], "cpu").shares.isfinite().any()
