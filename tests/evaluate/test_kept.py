"""An evaluation is kept beside the weights that it is of."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa.dictionaries.choices import CONFIG
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.errors import AnalyzeError
from lorsa.evaluate import kept as evaluation
from lorsa.evaluate.config import EvalConfig
from lorsa.evaluate.evaluate import evaluate_run
from lorsa.evaluate.kept import EVAL, keep_evaluation, kept_answer, kept_evaluation
from lorsa.seal import read_summed, write_summed
from lorsa.train.config import TrainConfig
from lorsa.train.train import train
from runs import settings
from small import edit_manifest
from unseal import change_json

LOSSES = {"original": 1.0, "recovered_from_zero": 0.5, "by_position": {"original": [1.0]}}
MEASURED: dict[str, Any] = {
    "run": "/home/me/runs",
    "layer": 1,
    "fvu": 0.2,
    "by_position": {},
    "frequency_histogram": {},
    "cross_entropy": LOSSES,
}
ASKED: dict[str, Any] = {"on_store": {"tokens": None}, "in_model": None}


def _save(folder: Path, scale: float = 1.0) -> None:
    config = LorsaConfig(d_model=8, n_qk_heads=2, d_qk_head=4, n_ov_heads=6, top_k=3, scale=scale)
    lorsa = Lorsa(config)
    torch.nn.init.constant_(lorsa.W_O, scale)
    lorsa.save_pretrained(folder)


def test_what_lorsa_eval_measures_is_kept(
    store_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    train(TrainConfig(**settings(store_folder, train_tokens=512), out=tmp_path / "run"))
    asked = EvalConfig(
        run=tmp_path / "run", store=store_folder, model=str(model_folder), ce_tokens=64
    )
    found = evaluate_run(asked)
    kept = kept_evaluation(tmp_path / "run")
    assert kept is not None
    assert kept["fvu"] == found.fvu
    assert found.cross_entropy is not None
    assert kept["cross_entropy"]["recovered_from_zero"] == found.cross_entropy.recovered_from_zero
    assert str(tmp_path) not in (tmp_path / "run" / EVAL).read_text()


def test_what_was_asked_before_is_answered_as_it_was(
    store_folder: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation of a finished run took minutes each time, though the answer was kept."""
    run = tmp_path / "run"
    train(TrainConfig(**settings(store_folder, train_tokens=512), out=run))
    asked = EvalConfig(run=run, store=store_folder, model=str(model_folder), ce_tokens=64)
    assert kept_answer(asked) is None
    found = evaluate_run(asked).to_dict()
    assert kept_answer(asked) == json.loads(json.dumps(found))
    alone = replace(asked, model=None)
    assert kept_answer(alone) == json.loads(json.dumps(found | {"cross_entropy": None}))
    whole = read_summed(run / EVAL)
    for name in ("kind", "writes", "random", "by_position", "frequency_histogram", "asked"):
        for odd in (None, 5, "x"):
            write_summed(run / EVAL, whole | {name: odd})
            assert kept_answer(asked) is None  # and not a KeyError of the table
    write_summed(run / EVAL, whole | {"cross_entropy": {}})
    assert kept_answer(asked) is None
    del (without := dict(whole))["config_sha256"]
    write_summed(run / EVAL, without)
    assert kept_answer(asked) is None  # it may be of another config
    write_summed(run / EVAL, whole)
    for change in ({"tokens": 32}, {"ce_tokens": 32}, {"model": str(tmp_path)}):
        assert kept_answer(replace(asked, **change)) is None
    shutil.copytree(store_folder, tmp_path / "other")
    edit_manifest(tmp_path / "other", uuid="another")
    assert kept_answer(replace(asked, store=tmp_path / "other")) is None
    assert kept_answer(replace(asked, store=tmp_path / "nowhere")) is None
    evaluate_run(replace(alone, tokens=32))  # the losses stay, and what they answer
    assert kept_answer(replace(asked, tokens=32)) is not None
    monkeypatch.setattr(evaluation, "__version__", "9")
    assert kept_answer(asked) is None


def test_an_earlier_version_s_figures_answer_no_request(tmp_path: Path) -> None:
    """They do not say what was asked; `lorsa push` shows them all the same."""
    _save(tmp_path)
    keep_evaluation(tmp_path, MEASURED, ASKED)
    content = json.loads((tmp_path / EVAL).read_text("utf-8"))
    del content["asked"], content["config_sha256"], content["crc32c"]
    (tmp_path / EVAL).write_text(json.dumps(content), "utf-8")
    assert kept_evaluation(tmp_path) is not None
    keep_evaluation(tmp_path, {**MEASURED, "cross_entropy": None}, ASKED)
    assert kept_evaluation(tmp_path)["cross_entropy"] == LOSSES  # type: ignore[index]


def test_losses_stay_where_none_are_measured_anew(tmp_path: Path) -> None:
    _save(tmp_path)
    keep_evaluation(tmp_path, MEASURED, ASKED)
    keep_evaluation(tmp_path, {**MEASURED, "fvu": 0.3, "cross_entropy": None}, ASKED)
    kept = kept_evaluation(tmp_path)
    assert kept is not None
    assert kept["fvu"] == 0.3
    assert kept["cross_entropy"] == LOSSES
    assert "run" not in kept


def test_a_number_that_is_not_finite_is_none(tmp_path: Path) -> None:
    """Earlier versions wrote NaN, which is no JSON, and `lorsa push` passed it on."""
    _save(tmp_path)
    keep_evaluation(tmp_path, {**MEASURED, "fvu": float("nan")}, ASKED)
    text = (tmp_path / EVAL).read_text("utf-8")
    assert "NaN" not in text
    (tmp_path / EVAL).write_text(text.replace('"fvu": null', '"fvu": NaN'), "utf-8")
    change_json(tmp_path / EVAL)
    kept = kept_evaluation(tmp_path)
    assert kept is not None
    assert kept["fvu"] is None


def test_figures_of_other_weights_are_not_told(tmp_path: Path) -> None:
    _save(tmp_path)
    keep_evaluation(tmp_path, MEASURED, ASKED)
    _save(tmp_path, scale=2.0)
    assert kept_evaluation(tmp_path) is None
    keep_evaluation(tmp_path, {**MEASURED, "cross_entropy": None}, ASKED)
    kept = kept_evaluation(tmp_path)
    assert kept is not None
    assert kept["cross_entropy"] is None


def test_figures_of_another_config_are_not_told(tmp_path: Path) -> None:
    """Of the same weights: fewer features fire, and the kept figures were shown as theirs."""
    _save(tmp_path)
    keep_evaluation(tmp_path, MEASURED, ASKED)
    before = (tmp_path / CONFIG).read_bytes()
    change_json(tmp_path / CONFIG, config={**json.loads(before)["config"], "top_k": 2})
    assert kept_evaluation(tmp_path) is None
    (tmp_path / CONFIG).write_bytes(before)
    kept = kept_evaluation(tmp_path)
    assert kept is not None
    assert kept["fvu"] == 0.2


@pytest.mark.parametrize("content", ["{", "[]", json.dumps(MEASURED), None])
def test_a_damaged_evaluation_is_named(tmp_path: Path, content: str | None) -> None:
    """It passed for none: `push` shared no figures, and `eval` dropped its losses, in silence."""
    _save(tmp_path)
    keep_evaluation(tmp_path, MEASURED, ASKED)
    path = tmp_path / EVAL
    path.write_text(content or path.read_text().replace("0.2", "0.3"))
    with pytest.raises(AnalyzeError, match=f"{path} is damaged .*delete it and evaluate again"):
        kept_evaluation(tmp_path)
    with pytest.raises(AnalyzeError, match=f"{path} is damaged"):
        keep_evaluation(tmp_path, {**MEASURED, "cross_entropy": None}, ASKED)


def test_an_evaluation_of_another_version_is_none_here(tmp_path: Path) -> None:
    _save(tmp_path)
    keep_evaluation(tmp_path, MEASURED, ASKED)
    change_json(tmp_path / EVAL, schema_version=99)
    assert kept_evaluation(tmp_path) is None


def test_a_run_that_cannot_be_written_is_measured_all_the_same(
    store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    train(TrainConfig(**settings(store_folder, train_tokens=512), out=tmp_path / "run"))
    monkeypatch.setattr(evaluation, "write_summed", refuse)
    told: list[object] = []
    found = evaluate_run(EvalConfig(run=tmp_path / "run", store=store_folder), report=told.append)
    assert found.fvu > 0
    assert told[-1] == (
        f"the figures of {tmp_path / 'run'} were not kept beside it: Permission denied"
    )


def test_an_evaluation_of_before_other_kinds_is_read_under_the_names_of_today(
    tmp_path: Path,
) -> None:
    """Its losses were of "lorsa", and nothing was of random features."""
    _save(tmp_path)
    keep_evaluation(tmp_path, MEASURED, ASKED)
    figures = {"lorsa": 1.5, "zero_ablated": 3.0, "mean_ablated": 2.0}
    losses = {"original": 1.0, **figures, "kl": figures, "by_position": {"lorsa": [1.5]}}
    change_json(
        tmp_path / EVAL,
        schema_version=1,
        cross_entropy=losses,
        frequency_histogram={"log10_from": [-1], "n_heads": [6], "n_silent": 0},
        asked={"on_store": {}, "in_model": {"ce_tokens": 64}},
    )
    kept = kept_evaluation(tmp_path)
    assert kept is not None
    assert kept["kind"] == "lorsa"
    found = kept["cross_entropy"]
    assert (found["replaced"], found["kl"]["replaced"]) == (1.5, 1.5)
    assert found["by_position"] == {"replaced": [1.5]}
    assert "lorsa" not in found
    assert kept["frequency_histogram"]["n_features"] == [6]
    assert kept["asked"]["in_model"] is None  # today that asks for random features too
