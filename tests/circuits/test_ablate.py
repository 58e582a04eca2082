"""`ablate`: what is found for a prompt, and what is refused."""

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa import cli
from lorsa.analyze.config import AnalyzeConfig
from lorsa.analyze.features import analyze_run
from lorsa.analyze.result import Analysis
from lorsa.circuits.ablate import ablate
from lorsa.circuits.config import AblateConfig
from lorsa.circuits.intervene import intervene
from lorsa.circuits.prompts import token_texts
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.display.ablate import ablate_tables
from lorsa.errors import AnalyzeError, AttachError, HarvestError
from lorsa.sites import attention_ports
from lorsa.store.read.reader import ActivationStore
from lorsa.train.config import TrainConfig
from lorsa.train.train import train
from rich.console import Console
from tiny import N_CTX, make_model, make_tokenizer
from typer.testing import CliRunner

PROMPT = "The quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def run(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "layer-1"
    settings: dict[str, Any] = {"top_k": 6, "batch_tokens": 4 * N_CTX, "train_tokens": 40 * N_CTX}
    train(TrainConfig(store=store_folder, layer=1, out=out, device="cpu", **settings))
    return out


@pytest.fixture
def config(run: Path, model_folder: Path) -> Callable[..., AblateConfig]:
    def make(**changes: Any) -> AblateConfig:
        usual = {"run": run, "model": str(model_folder), "features": "0-63", "prompt": PROMPT}
        return AblateConfig(**{**usual, "device": "cpu", **changes})

    return make


Make = Callable[..., AblateConfig]


@pytest.mark.parametrize(
    ("changes", "how", "number", "error"),
    [
        ({}, "scale", 0.0, "keep"),
        ({"scale": 2.0, "error": "drop"}, "scale", 2.0, "drop"),
        ({"value": 0.5}, "set", 0.5, "keep"),
    ],
)
def test_what_is_found_is_what_the_model_says(
    config: Make, run: Path, changes: dict[str, Any], how: str, number: float, error: str
) -> None:
    found = ablate(config(top=5, **changes))
    assert found.error == error
    lorsa, model, tokenizer = Lorsa.from_pretrained(run), make_model("llama-gqa"), make_tokenizer()
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        with intervene(model, lorsa, 1, {}, error=error):
            p = model(input_ids=ids).logits[0].log_softmax(-1)
        with intervene(model, lorsa, 1, dict.fromkeys(range(64), number), how=how, error=error):
            q = model(input_ids=ids).logits[0].log_softmax(-1)
    assert [token.id for token in found.tokens] == ids[0].tolist()
    assert "".join(str(token.text) for token in found.tokens) == PROMPT
    assert found.kl == pytest.approx(float((p[-1].exp() * (p[-1] - q[-1])).sum()), abs=1e-5)
    assert found.tokens[-1].loss_before is None
    for t, token in enumerate(found.tokens[:-1]):
        following = found.tokens[t + 1].id
        assert token.loss_before == pytest.approx(-float(p[t, following]), abs=1e-4)
        assert token.loss_after == pytest.approx(-float(q[t, following]), abs=1e-4)
    assert [token.id for token in found.likeliest_before] == p[-1].topk(5).indices.tolist()
    assert [token.id for token in found.likeliest_after] == q[-1].topk(5).indices.tolist()
    change = (q[-1].exp() - p[-1].exp()).abs()
    assert found.most_changed[0].id == int(change.argmax())
    first = found.likeliest_before[0]
    assert first.before == pytest.approx(float(p[-1, first.id].exp()), rel=1e-4)
    assert first.after == pytest.approx(float(q[-1, first.id].exp()), rel=1e-4)
    json.dumps(found.to_dict(), allow_nan=False)


def test_characters_in_pieces_are_whole_at_the_first() -> None:
    """A prompt in another script was shown as bytes; of pieces alone, the bytes stay."""
    spelled = {0: " a", 1: "<0xC3>", 2: "<0xA9>", 3: None}
    texts = token_texts([0, 1, 2, 3, 2, 1], spelled.__getitem__)
    assert texts == [" a", "é", "<0xA9>", None, "<0xA9>", "<0xC3>"]


def test_heads_that_fire_and_those_that_do_not(config: Make, run: Path) -> None:
    found = ablate(config())
    firing = {head for token in found.tokens for head in token.acts}
    assert firing
    assert sorted(firing | set(found.silent)) == list(range(64))
    assert not firing & set(found.silent)
    top_k = Lorsa.from_pretrained(run).config.top_k
    assert max(len(token.acts) for token in found.tokens) <= top_k
    assert found.silent
    last = found.tokens[-1].acts
    assert {head: last[head] for head in found.strongest if head in last} == {
        head: act for head, act in found.strongest.items() if head < 64
    }
    assert len(found.strongest) == top_k
    nothing = ablate(config(features=str(found.silent[0])))
    assert nothing.kl == 0
    assert all(token.loss_before == token.loss_after for token in nothing.tokens)


def test_a_factor_of_one_changes_nothing(config: Make) -> None:
    assert ablate(config(scale=1.0)).kl == 0
    assert ablate(config(scale=1.0, error="drop")).kl == 0


def test_the_error_on_the_prompt_is_that_of_the_store(
    config: Make, run: Path, store_folder: Path
) -> None:
    store = ActivationStore.open(store_folder)
    seqs = store.held_out_seqs[:1]
    ids = ",".join(map(str, store.tokens(seqs)[0].tolist()))
    found = ablate(config(prompt=None, tokens=ids))
    x, y = store.activations(attention_ports(1), seqs)
    with torch.no_grad():
        y_hat = Lorsa.from_pretrained(run)(x)
    expected = ((y - y_hat).square().sum(-1) / y.square().sum(-1)).mean()
    assert found.prompt_nmse == pytest.approx(float(expected), rel=1e-3)


def test_without_a_tokenizer_ids_are_taken(config: Make, tmp_path: Path) -> None:
    make_model("llama-gqa").save_pretrained(tmp_path / "bare")
    told: list[str] = []
    bare = config(model=str(tmp_path / "bare"), prompt=None, tokens="5,17,301")
    found = ablate(bare, report=told.append)
    assert [(token.id, token.text) for token in found.tokens] == [
        (5, None),
        (17, None),
        (301, None),
    ]
    assert any("taking" in text and "for the same model" in text for text in told)
    with pytest.raises(HarvestError, match="tokenizer"):
        ablate(dataclasses.replace(bare, prompt="Once", tokens=None))


def test_one_token_is_enough(config: Make) -> None:
    found = ablate(config(prompt=None, tokens="7"))
    assert [token.loss_before for token in found.tokens] == [None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "give one of --prompt TEXT and --tokens"),
        ({"tokens": "1,2"}, "give one of --prompt TEXT and --tokens"),
        ({"prompt": ""}, "prompt is empty"),
        ({"features": "1,x"}, "features is '1,x'; allowed: numbers such as 17,301 or 0-7"),
        ({"features": ""}, "features is ''"),
        ({"features": "-3"}, "features is '-3'"),
        ({"features": "7-3"}, "features is '7-3'"),
        ({"prompt": None, "tokens": "a"}, "tokens is 'a'"),
        ({"scale": 1.0, "value": 2.0}, "give one of them"),
        ({"scale": float("nan")}, "scale is nan; allowed: a finite number"),
        ({"error": "lose"}, "error is 'lose'; allowed: keep, drop"),
        ({"top": 0}, "top is 0; allowed: 1 or more"),
        ({"device": "tpu"}, "device is 'tpu'"),
    ],
)
def test_a_wrong_request_is_said(config: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_what_does_not_fit_is_said(config: Make, run: Path, tmp_path: Path) -> None:
    n = Lorsa.from_pretrained(run).config.n_ov_heads
    with pytest.raises(AnalyzeError, match=rf"head 99999 is outside the Lorsa; it has 0-{n - 1}"):
        ablate(config(features="3,99999"))
    with pytest.raises(AnalyzeError, match="token 400 is outside the vocabulary; it has 0-399"):
        ablate(config(prompt=None, tokens="5,400"))
    with pytest.raises(AnalyzeError, match="the prompt has 129 tokens; the model takes 128"):
        ablate(config(prompt=None, tokens="0-128"))
    wide = LorsaConfig(
        d_model=16, n_qk_heads=1, d_qk_head=4, n_ov_heads=4, top_k=1, scale=1.0, layer=1
    )
    Lorsa(wide).save_pretrained(tmp_path / "wide")
    with pytest.raises(AttachError, match=r"d_model 16\); the model given has d_model 32"):
        ablate(config(run=tmp_path / "wide", features="0"))
    Lorsa(dataclasses.replace(wide, layer=None)).save_pretrained(tmp_path / "nowhere")
    with pytest.raises(AnalyzeError, match="does not say which layer"):
        ablate(config(run=tmp_path / "nowhere", features="0"))
    Lorsa(dataclasses.replace(wide, d_model=32, layer=7)).save_pretrained(tmp_path / "high")
    with pytest.raises(AttachError, match="layer 7 is outside the model; it has 0-2"):
        ablate(config(run=tmp_path / "high", features="0"))


def test_nan_in_the_run_is_said(config: Make, run: Path, tmp_path: Path) -> None:
    lorsa = Lorsa.from_pretrained(run)
    with torch.no_grad():
        lorsa.b_O.fill_(float("nan"))
    lorsa.save_pretrained(tmp_path)
    with pytest.raises(AnalyzeError, match="the Lorsa gives NaN or Inf"):
        ablate(config(run=tmp_path))


def test_the_command_prints_tables_and_json(run: Path, model_folder: Path) -> None:
    words = ["ablate", str(run), "--heads", "0-63", "--model", str(model_folder)]
    words += ["--device", "cpu", "--top", "3"]
    shown = CliRunner().invoke(cli.app, [*words, "--prompt", PROMPT])
    assert shown.exit_code == 0, shown.output
    for part in ("scaled by 0", "stays", "the model as it is", "'The'", "the next token"):
        assert part in shown.stdout
    drop = CliRunner().invoke(cli.app, [*words, "--prompt", PROMPT, "--error", "drop"])
    assert "is dropped" in drop.stdout
    data = json.loads(CliRunner().invoke(cli.app, [*words, "--tokens", "1-4", "--json"]).stdout)
    assert [token["id"] for token in data["tokens"]] == [1, 2, 3, 4]
    assert len(data["likeliest_after"]) == 3
    wrong = CliRunner().invoke(cli.app, [*words, "--prompt", "", "--json"])
    assert wrong.exit_code == 2
    assert "prompt is empty" in json.loads(wrong.stdout)["error"]
    far = CliRunner().invoke(cli.app, [*words, "--prompt", "a", "--heads", "5000"])
    assert far.exit_code == 1
    assert "Traceback" not in far.output


def test_heads_that_do_not_fire_end_in_a_line(run: Path, model_folder: Path) -> None:
    """Three tables of +0.00 % were printed, and in one row of them that none fires."""
    words = ["ablate", str(run), "--model", str(model_folder), "--device", "cpu"]
    found = ablate(AblateConfig(run=run, model=str(model_folder), features="0-255", prompt=PROMPT))
    silent = ",".join(map(str, found.silent[:3]))
    done = CliRunner().invoke(cli.app, [*words, "--heads", silent, "--prompt", PROMPT])
    assert (done.exit_code, done.stdout) == (1, "")
    named = ", ".join(map(str, found.strongest))
    assert done.stderr.splitlines()[-1] == (
        "error: none of the 3 heads fires on this prompt, so nothing changes; strongest at its "
        f"last token: {named}"
    )
    for others in (
        ["--heads", silent, "--value", "1"],
        ["--heads", f"{silent},{named.split(',')[0]}"],
    ):
        done = CliRunner().invoke(cli.app, [*words, *others, "--prompt", PROMPT])
        assert done.exit_code == 0, done.output
    one = [*words, "--heads", silent.split(",")[0], "--prompt", PROMPT, "--json"]
    done = CliRunner().invoke(cli.app, one)
    assert "this head does not fire" in json.loads(done.stdout)["error"]


def test_the_next_tokens_are_one_table_sorted_by_change() -> None:
    """Three tables held the same tokens; the model was a path of 95 characters."""

    def token(text: str, before: float, after: float) -> dict[str, Any]:
        return {"id": len(text), "text": text, "before": before, "after": after}

    a, b, c = token("a", 0.5, 0.3), token("bb", 0.1, 0.5), token("ccc", 0.2, 0.1)
    result = {
        "run": "runs/layer-1", "kind": "lorsa", "model": "/long/path/Tiny.gguf", "layer": 1,
        "change": "scaled by 0",
        "features": list(range(30)), "silent": [4], "strongest": {7: 1.5}, "error": "keep",
        "before": "the model as it is", "prompt_nmse": 0.1, "kl": 0.2,
        "tokens": [
            {"position": 0, "id": 1, "text": "x", "acts": dict.fromkeys(range(9), 1.0),
             "loss_before": None, "loss_after": None, "kl": 0.0}
        ],
        "likeliest_before": [a, c], "likeliest_after": [b, a], "most_changed": [b, a],
    }  # fmt: skip
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(ablate_tables(result))
    shown = console.export_text()
    assert shown.index("+40.00%") < shown.index("-20.00%")
    assert shown.count("'bb'") == shown.count("'a'") == 1
    assert "in Tiny.gguf" in shown
    assert "30 heads (0-11, ...) scaled by 0" in shown
    assert "0: 1, 1: 1, 2: 1, 3: 1, 5 more" in " ".join(shown.split())


def test_all_heads_of_a_type_are_named_by_it(
    run: Path, store_folder: Path, model_folder: Path
) -> None:
    """They took a program of ten lines, though the types are in the run's analysis."""
    shutil.copytree(run, copy := run.parent / "analysed")
    words = ["ablate", str(copy), "--model", str(model_folder), "--device", "cpu"]
    words += ["--tokens", "0-31", "--json", "--heads"]
    refused = json.loads(CliRunner().invoke(cli.app, [*words, "local"]).stdout)
    assert "analysis is not there" in refused["error"]
    analyze_run(AnalyzeConfig(run=copy, store=store_folder))
    types = Analysis.open(copy).heads["type"].to_pylist()
    for name in ("local", "mixed"):
        done = json.loads(CliRunner().invoke(cli.app, [*words, name]).stdout)
        assert done["features"] == [head for head, kind in enumerate(types) if kind == name]
    refused = json.loads(CliRunner().invoke(cli.app, [*words, "long-range"]).stdout)
    assert "has no head of type long-range" in refused["error"]
