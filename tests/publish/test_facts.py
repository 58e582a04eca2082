"""training.json says what a run was, by commands that can be typed and names that can be told."""

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from lorsa import cli
from lorsa.dictionaries.linear_config import SaeConfig, TranscoderConfig
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.dictionaries.sae import Sae
from lorsa.dictionaries.transcoder import Transcoder
from lorsa.errors import PublishError
from lorsa.publish import facts
from lorsa.publish.facts import OPTIONS, public_model, public_name, training_facts
from lorsa.train.config import TrainConfig
from lorsa.train.recipe import KINDS
from unseal import change_json

CONFIG = LorsaConfig(
    d_model=8, n_qk_heads=2, d_qk_head=4, n_ov_heads=6, top_k=3, scale=0.5, layer=5
)

SAE = SaeConfig(d_model=8, n_features=40, top_k=3, layer=5, site="resid_mid", prefixes=(0.25, 1.0))
TRANSCODER = TranscoderConfig(d_model=8, n_features=40, top_k=3, layer=5, skip=True)


def _run(folder: Path, **settings: Any) -> dict[str, Any]:
    """Return training.json of a run as `lorsa train` leaves it."""
    config = TrainConfig(store=folder / "acts", layer=5, out=folder, **settings)
    saved = {"lorsa": Lorsa(CONFIG), "sae": Sae(SAE), "transcoder": Transcoder(TRANSCODER)}
    saved[config.kind].save_pretrained(folder)
    content = {
        "schema_version": 1,
        "config": config.to_dict(),
        "decisive": {**config.decisive(), "store_uuid": "u"},
        "versions": {"lorsa": "0"},
        "result": {"fvu": 0.2, "run": str(folder)},
    }
    (folder / "run.json").write_text(json.dumps(content))
    return training_facts(folder, saved[config.kind].config)


def _typed(command: str) -> dict[str, Any]:
    """Return what a command of `lorsa train` asks for, as the command line reads it."""
    train: Any = typer.main.get_command(cli.app).commands["train"]  # type: ignore[attr-defined]
    words = shlex.split(command, comments=True)
    assert words[:2] == ["lorsa", "train"]
    given = train.make_context("train", words[2:]).params
    known = {field.name for field in fields(TrainConfig)}
    return {n: v for n, v in given.items() if n in known and v is not None}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 32, "lr": 2e-3, "expansion": 4.0, "seed": 3, "minutes": 1.5},
        {"activation": "jumprelu", "init": "random", "train_tokens": 4096, "exact": True},
        {"loss_mask": "bos,first,norm>10x", "select": "abs", "n_ov_heads": 96, "n_qk_heads": 4},
        {"batch_tokens": 512, "precision": "float32"},
        {"kind": "sae", "site": "mlp_out", "n_features": 96, "prefixes": (0.25, 1)},
        {"kind": "sae", "lr": 2e-3},
        {"kind": "transcoder", "skip": True, "top_k": 8},
    ],
)
def test_the_command_asks_for_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    asked = TrainConfig(store="x", layer=5, out="y", **settings)
    typed = _typed(_run(tmp_path, **settings)["command"])
    assert TrainConfig(**{**typed, "layer": 5, "out": "y"}).decisive() == asked.decisive()


def test_settings_without_an_option_are_named_beside_the_command(tmp_path: Path) -> None:
    command = _run(tmp_path, betas=(0.9, 0.99), top_k=16, device="cpu")["command"]
    assert command == (
        "lorsa train --store acts --layers 5 --top-k 16 --config run.toml"
        "  # run.toml: betas = [0.9, 0.99]"
    )


def test_every_setting_that_has_an_option_is_in_the_command() -> None:
    """A new option of `lorsa train` that decides the weights must be told."""
    train: Any = typer.main.get_command(cli.app).commands["train"]  # type: ignore[attr-defined]
    options = {parameter.name for parameter in train.get_params(typer.Context(train))}
    decisive = {
        name
        for kind in KINDS
        for name in TrainConfig(store="x", layer=1, out="y", kind=kind).decisive()
    }
    assert set(OPTIONS) == options & (decisive - {"layer"})


def test_a_saved_lorsa_without_a_run_tells_its_shape(tmp_path: Path) -> None:
    Lorsa(CONFIG).save_pretrained(tmp_path)
    told = training_facts(tmp_path, CONFIG)
    assert told["shape"]["n_ov_heads"] == 6
    names = ("corpus", "trained", "evaluated", "settings", "command", "versions")
    assert [told[name] for name in names] == [None] * 6


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({"config": None}, "config"),
        ({"config": {"store": None}}, "config.store"),
        ({"decisive": []}, "decisive"),
        ({"result": []}, "result"),
    ],
)
def test_a_run_without_a_section_is_refused_in_a_line(
    tmp_path: Path, change: dict[str, Any], missing: str
) -> None:
    _run(tmp_path)
    change_json(tmp_path / "run.json", **change)
    with pytest.raises(PublishError, match=f"is damaged .no {missing}."):
        training_facts(tmp_path, CONFIG)


def test_a_run_of_before_tells_its_store_s_corpus(store_folder: Path, tmp_path: Path) -> None:
    """The corpus was not in run.json at first; a store of another uuid is not asked."""
    manifest = json.loads((store_folder / "manifest.json").read_text())
    _run(tmp_path)
    content = json.loads((tmp_path / "run.json").read_text())
    content["config"]["store"] = str(store_folder)
    for uuid, known in ((manifest["uuid"], True), ("another", False)):
        content["decisive"]["store_uuid"] = uuid
        (tmp_path / "run.json").write_text(json.dumps(content))
        corpus = training_facts(tmp_path, CONFIG)["corpus"]
        assert (corpus is not None) == known
        if known:
            assert corpus["data"] == Path(manifest["corpus"]["data"]).name
            assert corpus["n_documents"] == manifest["corpus"]["n_documents"] > 1


@pytest.mark.parametrize(
    ("data", "revision", "told"),
    [
        ("HuggingFaceFW/fineweb", "abc", "HuggingFaceFW/fineweb"),
        ("stdlib", None, "stdlib"),
        ("/home/me/secret/texts", None, "texts"),
        ("secret/texts/", None, "texts"),
        ("some/data + /home/me/secret/a.txt", "abc", "some/data + a.txt"),
        ("C:\\secret\\a.txt", None, "a.txt"),
    ],
)
def test_a_corpus_tells_no_path(tmp_path: Path, data: str, revision: str | None, told: str) -> None:
    _run(tmp_path)
    path = tmp_path / "run.json"
    corpus = {"data": data, "data_revision": revision, "unknown": "/home/me"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"corpus": corpus}))
    found = training_facts(tmp_path, CONFIG)["corpus"]
    assert found["data"] == told
    assert "unknown" not in found


def test_a_model_tells_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(base_model: str, revision: str | None = None) -> str | None:
        config = {**CONFIG.to_dict(), "base_model": base_model, "base_revision": revision}
        return public_model(LorsaConfig.from_dict(config))

    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/mine").mkdir(parents=True)
    assert told("Qwen/Qwen2-7B", "abc") == told("Qwen/Qwen2-7B") == "Qwen/Qwen2-7B"
    assert told("/home/me/models/mine.gguf") == "mine.gguf"
    assert told("models/mine") == "mine"
    assert public_name("a/b/c", is_hub=True) == "c"


def test_a_run_of_another_version_is_refused(tmp_path: Path) -> None:
    _run(tmp_path)
    (tmp_path / "run.json").write_text('{"schema_version": 99}')
    with pytest.raises(facts.PublishError, match="of another version of lorsa"):
        training_facts(tmp_path, CONFIG)


def test_other_kinds_tell_their_sites_and_their_shape(tmp_path: Path) -> None:
    told = {
        name: _run(tmp_path / name, kind=name, **({"site": "resid_mid"} if name == "sae" else {}))
        for name in ("sae", "transcoder")
    }
    assert {name: (one["kind"], one["schema_version"]) for name, one in told.items()} == {
        "sae": ("sae", 2), "transcoder": ("transcoder", 2),
    }  # fmt: skip
    assert told["sae"]["x"] == told["sae"]["y"]
    assert told["sae"]["shape"]["prefixes"] == [0.25, 1.0]
    assert told["transcoder"]["shape"]["skip"]
    assert [facts.folder_of(one) for one in told.values()] == ["5.resid_mid", "5.mlp"]
    assert "kind" not in _run(tmp_path / "lorsa")
    odd = told["sae"] | {"shape": {"d_model": 8, "n_features": "many", "site": "resid_mid"}}
    assert facts.wrong_fact(odd) == "shape.n_features is 'many'"
