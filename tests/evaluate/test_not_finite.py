"""Numbers that are not finite: a language model that rules tokens out, by logits of -inf."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lorsa import cli
from lorsa.commands.common import perform
from lorsa.evaluate.in_model import token_figures
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.train.config import TrainConfig
from lorsa.train.train import train
from lorsa.whole import finite, write_json
from runs import settings
from tiny import N_CTX, TEXT, make_model, make_tokenizer
from typer.testing import CliRunner

N_RULED_OUT = 20


class Made(NamedTuple):
    """What the commands are asked about."""

    run: Path
    store: Path
    model: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A Lorsa of a model whose last tokens, which no text has, get logits of -inf."""
    root = tmp_path_factory.mktemp("ruled-out")
    model = make_model("phi")
    with torch.no_grad():
        model.lm_head.bias[-N_RULED_OUT:] = -torch.inf
    model.save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text(TEXT * 3, "utf-8")
    request: dict[str, Any] = {"n_ctx": N_CTX, "tokens": 40 * N_CTX, "dtype": "float32"}
    data, store = str(root / "text.txt"), root / "acts"
    harvest(
        HarvestConfig(
            model=str(root / "model"), layers="1", store=store, data=data, device="cpu", **request
        )
    )
    train(TrainConfig(**settings(store, train_tokens=512), out=root / "run"))
    return Made(root / "run", store, root / "model")


def _json(*words: str | Path, code: int = 0) -> dict[str, Any]:
    """Return a command's JSON, in which NaN and Infinity are no numbers."""
    done = CliRunner().invoke(cli.app, [*map(str, words), "--device", "cpu", "--json"])
    assert done.exit_code == code, done.output

    def refuse(name: str) -> None:
        raise ValueError(name)

    found: dict[str, Any] = json.loads(done.stdout, parse_constant=refuse)
    return found


def test_an_evaluation_of_a_model_that_rules_tokens_out(made: Made) -> None:
    """The KL was NaN, for it took 0 times (-inf - -inf) in; --json ended with a traceback."""
    found = _json("eval", made.run, "--store", made.store, "--model", made.model)
    ce = found["cross_entropy"]
    assert ce["original"] > 0
    assert ce["kl"]["replaced"] > 0
    kept = json.loads((made.run / "eval.json").read_text("utf-8"))
    assert kept["cross_entropy"]["kl"] == ce["kl"]


def test_a_loss_that_is_infinite_is_said_in_a_line(made: Made, tmp_path: Path) -> None:
    """Of a text that has tokens which the model rules out no loss makes sense."""
    model = make_model("phi")
    with torch.no_grad():
        model.lm_head.bias[: 400 - N_RULED_OUT] = -torch.inf
    model.save_pretrained(tmp_path)
    words = ("eval", made.run, "--store", made.store, "--model", tmp_path)
    error = _json(*words, code=1)["error"]
    assert "the language model's loss (original) is not finite" in error


def test_an_ablation_of_a_model_that_rules_tokens_out(made: Made) -> None:
    """It was refused as a prediction of NaN, and a loss that is infinite has no JSON."""
    words = ("ablate", made.run, "--model", made.model, "--heads", "0-63", "--tokens")
    found = _json(*words, "5,17,301,399,9")
    losses = [token["loss_before"] for token in found["tokens"]]
    assert [loss is None for loss in losses] == [False, False, True, False, True]
    assert found["kl"] > 0
    assert all(token["kl"] is not None for token in found["tokens"])


def test_an_analysis_of_a_model_that_rules_tokens_out(made: Made) -> None:
    """So that every command with a language model is asked for its JSON."""
    found = _json("analyze", made.run, "--store", made.store, "--model", made.model)
    assert found["with_model"]


def test_tokens_that_are_ruled_out_add_nothing_to_the_kl() -> None:
    """The KL was NaN; it is that of the other tokens, and infinite where q alone rules one out."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 1, 5, 31, generator=generator)
    targets = torch.zeros(1, 5, dtype=torch.int64)
    rest = token_figures(q[..., :25], p[..., :25], targets)
    p[..., 25:] = q[..., 25:] = -torch.inf
    found = token_figures(q, p, targets)
    assert torch.allclose(found.kl, rest.kl, rtol=1e-5)
    assert torch.allclose(found.loss, rest.loss, rtol=1e-5)
    q[0, 3, 7] = -torch.inf
    assert token_figures(q, p, targets).kl.isinf().tolist() == [[False, False, False, True, False]]


def test_every_command_prints_null_for_what_is_not_finite(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A NaN in any result ended the command with a traceback."""
    result = {"fvu": float("nan"), "rows": [{"kl": float("inf")}, (1.5, -float("inf"))], "n": 3}
    perform("eval", lambda: result, as_json=True)
    expected = {"fvu": None, "rows": [{"kl": None}, [1.5, None]], "n": 3}
    printed = json.loads(capsys.readouterr().out)
    assert {name: printed[name] for name in expected} == expected == finite(result)
    write_json(tmp_path / "result.json", result)
    assert json.loads((tmp_path / "result.json").read_text("utf-8")) == expected
