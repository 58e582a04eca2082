"""Lorsas from one tool's format to another's, their hooks and norms with them."""

import json
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from lorsa.cli import app
from lorsa.dictionaries import checkpoint_files
from lorsa.dictionaries.kinds import load
from lorsa.dictionaries.linear_config import TranscoderConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.dictionaries.transcoder import Transcoder
from lorsa.errors import CheckpointError, ExchangeError
from lorsa.exchange.config import ConvertConfig
from lorsa.exchange.convert import convert
from lorsa.language import subject
from lorsa.language.aliases import ModelPath
from lorsa.language.blocks import attention_sites
from lorsa.language.capture import Capture
from tiny import make_model, make_tokenizer, some_tokens
from torch import Tensor
from typer.testing import CliRunner

LAYER = 1
SHAPE: dict[str, Any] = {
    "d_model": 32,
    "n_ctx": 32,
    "n_qk_heads": 8,
    "hook_point_in": f"blocks.{LAYER}.ln1.hook_normalized",
    "hook_point_out": f"blocks.{LAYER}.hook_attn_out",
    "norm_activation": "inference",
}


def _around(model: Any) -> tuple[Tensor, Tensor]:
    """Return x of the layer, and the same before the norm's weight, by the norm's definition."""
    seen = []
    (site,) = attention_sites(model, [LAYER])
    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    handles = [
        m.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
        for m in norms
    ]
    with Capture(model, [site]) as capture:
        x = capture.calls(some_tokens())[LAYER].x.clone()
    for handle in handles:
        handle.remove()
    ((module, h, _),) = [s for s in seen if torch.equal(s[2], x)]
    if "RMS" not in type(module).__name__:
        h = h - h.mean(-1, keepdim=True)
    eps = next(getattr(module, n) for n in ("eps", "variance_epsilon") if hasattr(module, n))
    return x, h / (h.square().mean(-1, keepdim=True) + eps).sqrt()


def _folder(tmp_path: Path, family: str) -> tuple[Path, Any]:
    model = make_model(family)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subfolder": "../x"}, "subfolder is '../x'; allowed: a folder inside"),
        ({"revision": "v1"}, "revision is 'v1'; .* is a folder"),
    ],
)
def test_what_no_source_can_have_is_said(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExchangeError, match=message):
        convert(ConvertConfig(source=str(tmp_path), out=tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


FAMILIES = ["llama-gqa", "gemma", "neox-partial", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_lorsa_of_the_hook_becomes_one_of_the_input(family: str, tmp_path: Path) -> None:
    folder, model = _folder(tmp_path, family)
    x, n = _around(model)
    config = foreign.settings(**SHAPE)
    weights = foreign.tensors(config)
    theirs = foreign.write(tmp_path / "theirs", config, weights)
    made = convert(
        ConvertConfig(source=str(theirs), out=tmp_path / "ours", model=str(folder)),
    )
    assert made.hook_in == "x"
    lorsa = Lorsa.from_pretrained(tmp_path / "ours")
    expected = foreign.compute(n[:, :16], config, weights).y_hat
    torch.testing.assert_close(lorsa(x[:, :16]).double(), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_lorsa_of_the_input_becomes_one_of_the_hook(family: str, tmp_path: Path) -> None:
    folder, model = _folder(tmp_path, family)
    x, n = _around(model)
    config = foreign.settings(**{**SHAPE, "hook_point_in": "blocks.1.attn_input_weighted"})
    ours = foreign.write(tmp_path / "ours", config, foreign.tensors(config))
    lorsa = Lorsa.from_pretrained(ours)
    assert lorsa.config.hook_in is None
    out = tmp_path / "theirs"
    made = convert(ConvertConfig(source=str(ours), out=out, model=str(folder), to="llamascopium"))
    assert made.hook_in == SHAPE["hook_point_in"]
    written = json.loads((out / "config.json").read_text())
    assert written["hook_point_in"] == SHAPE["hook_point_in"]
    found = Lorsa.from_pretrained(out)(n[:, :16])
    torch.testing.assert_close(found, lorsa(x[:, :16]), atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_unprocessed_layer_norms_are_read_after_their_weight(tmp_path: Path) -> None:
    folder, _ = _folder(tmp_path, "neox-partial")
    config = foreign.settings(**SHAPE)
    theirs = foreign.write(tmp_path / "theirs", config, foreign.tensors(config))
    convert(
        ConvertConfig(source=str(theirs), out=tmp_path / "ours", model=str(folder), weighted=True)
    )
    one, other = Lorsa.from_pretrained(theirs), Lorsa.from_pretrained(tmp_path / "ours")
    assert other.config.hook_in is None
    assert torch.equal(one.W_Q, other.W_Q)


def test_a_norm_after_the_attention_is_named(tmp_path: Path) -> None:
    folder, _ = _folder(tmp_path, "gemma2")
    config = foreign.settings(**SHAPE)
    theirs = foreign.write(tmp_path / "theirs", config, foreign.tensors(config))
    with pytest.raises(ExchangeError, match="norms the attention's output once more"):
        convert(ConvertConfig(source=str(theirs), out=tmp_path / "ours", model=str(folder)))
    assert not (tmp_path / "ours").exists()


def test_a_norm_weight_of_zero_is_named(tmp_path: Path) -> None:
    model = make_model("llama-gqa")
    with torch.no_grad():
        model.model.layers[LAYER].input_layernorm.weight[5] = 0
    model.save_pretrained(tmp_path / "model")
    config = foreign.settings(**SHAPE)
    theirs = foreign.write(tmp_path / "theirs", config, foreign.tensors(config))
    with pytest.raises(ExchangeError, match="norm's weight of channel 5 is 0"):
        convert(
            ConvertConfig(source=str(theirs), out=tmp_path / "ours", model=str(tmp_path / "model"))
        )


@torch.no_grad()
def test_no_layer_after_the_norm_is_loaded(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole model was loaded for one norm: four bytes for each of its parameters."""
    models: list[Any] = []
    load = subject.load_model

    def spy(*args: Any, **settings: Any) -> Any:
        models.append(load(*args, **settings))
        return models[0]

    monkeypatch.setattr(subject, "load_model", spy)
    config = foreign.settings(**SHAPE)
    theirs = foreign.write(tmp_path / "theirs", config, foreign.tensors(config))
    convert(ConvertConfig(source=str(theirs), out=tmp_path / "ours", model=str(model_folder)))
    (model,) = models
    whole = make_model("llama-gqa")
    assert len(model.model.layers) == LAYER + 1 == len(whole.model.layers) - 1
    after = sum(p.numel() for p in whole.model.layers[LAYER + 1].parameters())
    assert model.num_parameters() == whole.num_parameters() - after


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_a_norm_in_half_precision_is_folded_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model("llama-gqa")
    weight = model.model.layers[LAYER].input_layernorm.weight
    weight.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(tmp_path / "model")
    config = foreign.settings(**SHAPE)
    theirs = foreign.write(tmp_path / "theirs", config, foreign.tensors(config))
    asked = ConvertConfig(source=str(theirs), out=tmp_path / "o", model=str(tmp_path / "model"))
    convert(asked)
    before, found = Lorsa.from_pretrained(theirs), Lorsa.from_pretrained(tmp_path / "o")
    assert torch.equal(found.W_V, (before.W_V.double() * (1 / weight.double())).float())


def test_a_model_of_another_width_is_named(tmp_path: Path, model_folder: Path) -> None:
    config = foreign.settings()
    theirs = foreign.write(tmp_path / "theirs", config, foreign.tensors(config))
    with pytest.raises(ExchangeError, match="has d_model 12; the model given has 32"):
        convert(ConvertConfig(source=str(theirs), out=tmp_path / "o", model=str(model_folder)))


def test_a_hook_of_another_place_is_named(tmp_path: Path, model_folder: Path) -> None:
    config = foreign.settings(**{**SHAPE, "hook_point_in": "blocks.1.hook_resid_pre"})
    theirs = foreign.write(tmp_path / "theirs", config, foreign.tensors(config))
    with pytest.raises(ExchangeError, match=r"reads blocks.1.hook_resid_pre; with a model, only"):
        convert(ConvertConfig(source=str(theirs), out=tmp_path / "o", model=str(model_folder)))


def test_a_folder_that_is_there_is_kept(tmp_path: Path) -> None:
    config = foreign.settings()
    theirs = foreign.write(tmp_path / "theirs", config, foreign.tensors(config))
    before = sorted(theirs.iterdir())
    with pytest.raises(ExchangeError, match="is there already; give a new folder"):
        convert(ConvertConfig(source=str(theirs), out=theirs, to="llamascopium"))
    assert sorted(theirs.iterdir()) == before


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("to", ["lorsa", "llamascopium"])
def test_a_full_disk_leaves_no_half(
    to: str, is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = foreign.settings()
    theirs = foreign.write(tmp_path / "theirs", config, foreign.tensors(config))
    request = ConvertConfig(source=str(theirs), out=tmp_path / "ours", to=to)
    if is_there:
        request.out.mkdir()

    def full(path: Path, content: Any) -> None:
        assert any(path.parent.iterdir())  # the weights are there already
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "write_json", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            convert(request)
    assert request.out.exists() == is_there
    assert not is_there or not any(request.out.iterdir())
    convert(request)  # the same command, once there is room
    assert Lorsa.from_pretrained(request.out).config.n_ov_heads == 24


def test_the_model_is_named_as_a_store_of_it_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what reads the store would take the Lorsa for one of another model."""
    loaded: list[ModelPath] = []

    def load(path: ModelPath, *_: Any, **__: Any) -> Any:
        loaded.append(path)
        return make_model("llama-gqa")

    path = ModelPath("some/folder", "model.gguf", revision="newest")
    monkeypatch.setattr(subject, "resolve", lambda name: path)
    monkeypatch.setattr(subject, "load_config", lambda path: make_model("llama-gqa").config)
    monkeypatch.setattr(subject, "load_model", load)
    config = foreign.settings(**SHAPE)
    theirs = foreign.write(tmp_path / "theirs", config, foreign.tensors(config))
    made = convert(ConvertConfig(source=str(theirs), out=tmp_path / "ours", model="x"))
    assert made.base_model == "some/folder/model.gguf"
    path = ModelPath("owner/model", revision="newest")
    config["lorsa"] = {"base_model": "owner/model", "base_revision": "old"}
    theirs = foreign.write(tmp_path / "old", config, foreign.tensors(config))
    convert(ConvertConfig(source=str(theirs), out=tmp_path / "again", model="x"))
    again = Lorsa.from_pretrained(tmp_path / "again").config
    assert (again.base_model, again.base_revision) == ("owner/model", "old")
    assert [each.revision for each in loaded] == ["newest", "old"]  # its own commit's norm
    told: list[str] = []
    path = ModelPath("other/model")
    convert(ConvertConfig(source=str(theirs), out=tmp_path / "b", model="x"), report=told.append)
    assert told[0] == "the Lorsa is of owner/model; taking other/model for the same model"


def test_a_limit_of_heads_is_kept(tmp_path: Path) -> None:
    config = foreign.settings(act_fn="jumprelu")
    theirs = foreign.write(tmp_path / "theirs", config, foreign.tensors(config))
    convert(ConvertConfig(source=str(theirs), out=tmp_path / "ours", max_l0=9))
    assert Lorsa.from_pretrained(tmp_path / "ours").config.max_l0 == 9
    with pytest.raises(ExchangeError, match="max_l0 is 4; allowed: 5..24"):
        convert(ConvertConfig(source=str(theirs), out=tmp_path / "more", max_l0=4))


def _run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, result.stdout, result.stderr


def test_a_foreign_lorsa_is_measured_once_it_reads_the_input(
    tmp_path: Path, model_folder: Path, store_folder: Path
) -> None:
    config = foreign.settings(**SHAPE)
    theirs = foreign.write(tmp_path / "theirs", config, foreign.tensors(config))
    code, _, told = _run("eval", str(theirs), "--store", str(store_folder), "--json")
    assert code == 1
    assert "reads blocks.1.ln1.hook_normalized" in told
    assert "lorsa convert" in told
    ours = str(tmp_path / "ours")
    code, out, told = _run("convert", str(theirs), ours, "--model", str(model_folder), "--json")
    assert code == 0, told
    made = json.loads(out)
    assert (made["layer"], made["hook_in"], made["notes"]) == (LAYER, "x", [])
    code, out, told = _run("eval", ours, "--store", str(store_folder), "--json")
    assert code == 0, told
    fvu = json.loads(out)["fvu"]
    assert fvu > 0
    again = str(tmp_path / "again")  # theirs in format, but of our x
    assert _run("convert", ours, again, "--to", "llamascopium", "--model", "none")[0] == 0
    code, out, told = _run("eval", again, "--store", str(store_folder), "--json")
    assert code == 0, told
    assert json.loads(out)["fvu"] == pytest.approx(fvu)
    assert "not kept" not in told
    assert (tmp_path / "again/eval.json").exists()
    assert _run("analyze", again, "--store", str(store_folder), "--json")[0] == 0


def test_what_was_made_is_shown(tmp_path: Path) -> None:
    config = foreign.settings(act_fn="batchtopk")
    theirs = foreign.write(tmp_path / "theirs", config, foreign.tensors(config))
    code, out, _ = _run("convert", str(theirs), str(tmp_path / "ours"))
    assert code == 0
    for part in ("24 OV, 6 QK", "batchtopk, top_k 5", foreign.HOOK_IN, "threshold is not known"):
        assert part in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (["--to", "saelens"], 2, "to is 'saelens'; allowed: lorsa, llamascopium"),
        (["--max-l0", "0"], 2, "max_l0 is 0"),
        (["--weighted"], 2, "give the model too"),
    ],
)
def test_wrong_requests_are_a_line(words: list[str], code: int, named: str, tmp_path: Path) -> None:
    config = foreign.settings()
    theirs = foreign.write(tmp_path / "theirs", config, foreign.tensors(config))
    found, _, told = _run("convert", str(theirs), str(tmp_path / "ours"), *words)
    assert found == code
    assert named in told
    assert not (tmp_path / "ours").exists()


def test_a_folder_without_a_lorsa_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"sae_type": "sae"}')
    code, _, told = _run("convert", str(tmp_path), str(tmp_path / "ours"))
    assert code == 1
    assert "is no dictionary's config" in told
    with pytest.raises(CheckpointError):
        Lorsa.from_pretrained(tmp_path)


def test_other_kinds_are_written_in_our_format_alone(tmp_path: Path) -> None:
    config = TranscoderConfig(d_model=8, n_features=40, top_k=3, layer=5, skip=True)
    transcoder = Transcoder(config)
    torch.nn.init.normal_(transcoder.W_E)
    transcoder.save_pretrained(tmp_path / "run")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "run"), str(tmp_path / "copy")])
    assert done.exit_code == 0, done.output
    assert "transcoder at layer 5" in done.stdout
    copy = load(tmp_path / "copy")
    assert isinstance(copy, Transcoder)
    assert torch.equal(copy.W_E, transcoder.W_E)
    for wrong, told in {
        ("--to", "llamascopium"): "holds a transcoder; --to llamascopium is for Lorsas",
        ("--model", "smollm2-135m"): "folded into Lorsas alone: leave --model out",
    }.items():
        words = ["convert", str(tmp_path / "run"), str(tmp_path / "other"), *wrong]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 1
        assert told in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "other").exists()
