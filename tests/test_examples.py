"""The examples can be followed: settings are a TrainConfig, figures are ours, small ones run."""

import base64
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import nbformat
import pytest
from lorsa import cli
from lorsa.commands.settings import make_config
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.plan import cost
from lorsa.language.aliases import ALIASES
from lorsa.sites import Site
from lorsa.store.care.info import format_bytes
from lorsa.store.layered import pair_facts
from lorsa.store.layers import choose_layers
from lorsa.store.site_facts import SiteFacts
from lorsa.train.config import TrainConfig
from nbclient import NotebookClient
from tiny import N_CTX, make_model, make_tokenizer
from typer.testing import CliRunner

NOTEBOOK = Path(__file__).parent.parent / "examples/quickstart.ipynb"
EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.toml"))
SIZES = {
    "pythia-160m": (12, 768, 12),
    "gemma-2-2b": (26, 2304, 8),
    "qwen2-7b": (28, 3584, 28),
    "llama-3.1-8b": (32, 4096, 32),
}
"""Layers, width and heads of each model."""


def _comment(file: Path) -> str:
    lines = file.read_text("utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def _settings(file: Path) -> TrainConfig:
    given = {"store": "acts", "layer": 0, "out": Path("run")}
    return make_config(TrainConfig, given, file)


def test_there_is_one_for_each_model() -> None:
    assert {file.stem for file in EXAMPLES} == set(SIZES) <= set(ALIASES)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_a_config_with_a_reason_for_each_number(file: Path) -> None:
    _, d_model, n_heads = SIZES[file.stem]
    config = _settings(file)
    assert config.n_qk_heads == 4 * n_heads
    n_ov_heads = int(config.expansion * d_model)
    assert n_ov_heads % config.n_qk_heads == 0
    assert f"{n_ov_heads:,} OV heads" in file.read_text("utf-8")
    for line in file.read_text("utf-8").splitlines():
        assert line == "" or "#" in line
        assert len(line) <= 120


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_command_and_the_sizes_of_an_example_are_ours(file: Path) -> None:
    n_layers, d_model, n_heads = SIZES[file.stem]
    text = _comment(file)
    command = re.search(r"lorsa harvest (.*?) lorsa train", text)
    assert command is not None
    given = dict(re.findall(r"--([a-z-]+) (\S+)", command[1]))
    config = HarvestConfig(
        model=given.pop("model"),
        layers=given.pop("layers"),
        n_ctx=int(given.pop("n-ctx")),
        tokens=int(given.pop("tokens")),
        dtype=given.pop("dtype"),
        outputs=given.pop("outputs"),
    )
    assert not given
    assert config.model == file.stem
    layers = choose_layers(config.layers, range(n_layers), where=file.stem)
    assert layers == list(range(n_layers))
    assert config.tokens is not None

    def attention(n: int, outputs: str) -> dict[Site, SiteFacts]:
        pairs = (pair_facts(layer, d_model, outputs) for layer in range(n))
        return {site: about for pair in pairs for site, about in pair.items()}

    for n in (n_layers, 1):
        size = cost(attention(n, config.outputs), dtype=config.dtype, d_mlp=0).total(config.tokens)
        assert f"{format_bytes(size)} for {'one' if n == 1 else f'all {n}'}" in text
    plain = cost(attention(1, "store"), dtype="bfloat16", d_mlp=0).total(config.tokens)
    assert f"{format_bytes(plain)} for one, and no better Lorsa" in text
    settings = _settings(file)
    assert settings.train_tokens == 0.95 * config.tokens
    d_head = {"gemma-2-2b": 256}.get(file.stem, d_model // n_heads)
    n_qk, n_ov = 4 * n_heads, int(settings.expansion * d_model)
    n_parameters = 2 * n_qk * d_model * d_head + 2 * n_ov * d_model
    assert f"GPU memory in training: {format_bytes(16 * n_parameters)}" in text


def test_the_small_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny GPT-NeoX in Pythia's place, with fewer tokens."""
    monkeypatch.chdir(tmp_path)
    make_model("neox-partial").save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    Path("text").mkdir()
    Path("text/a.txt").write_text("A store keeps what a model saw, and heads read it. " * 400)
    example = next(file for file in EXAMPLES if file.stem == "pythia-160m")
    harvest = "harvest --model model --data text --layers 0-1 --device cpu --dtype int8"
    _run(f"{harvest} --outputs derive --n-ctx {N_CTX} --tokens {60 * N_CTX}")
    train = f"train --store ./acts --config {example} --layers 1 --batch-tokens {4 * N_CTX}"
    result = _run(f"{train} --tokens {40 * N_CTX}")["runs"][0]
    config = json.loads(Path("runs/layer-1/run.json").read_text())["config"]
    kept = _settings(example)
    for field in fields(TrainConfig):
        if field.name not in ("store", "layer", "out", "batch_tokens", "train_tokens", "betas"):
            assert config[field.name] == getattr(kept, field.name)
    assert result["n_qk_heads"] == kept.n_qk_heads
    assert result["fvu"] < 1


def _run(command: str) -> Any:
    result = CliRunner().invoke(cli.app, [*command.split(), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def _outputs(notebook: Any, kind: str) -> list[Any]:
    """Return a notebook's outputs of a kind: stream, display_data, error, ..."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [each for cell in cells for each in cell.outputs if each.output_type == kind]


def test_the_notebook_runs(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every cell, on a tiny model."""
    monkeypatch.setenv("LORSA_EXAMPLE_MODEL", str(model_folder))
    monkeypatch.setenv("LORSA_EXAMPLE_TOKENS", "8192")
    notebook = nbformat.read(NOTEBOOK, 4)
    committed = [each.output_type for cell in notebook.cells for each in cell.get("outputs", [])]
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=where).execute()
    ran = [each.output_type for cell in notebook.cells for each in cell.get("outputs", [])]
    assert len(_outputs(notebook, "display_data")) == 4
    told = "".join(each.text for each in _outputs(notebook, "stream") if each.name == "stdout")
    assert "layer 1 of 3" in told
    assert "8,192 tokens" in told
    assert (tmp_path / "quickstart/run/lorsa.safetensors").is_file()
    assert [kind for kind in ran if kind != "stream"] == [k for k in committed if k != "stream"]


def test_the_notebook_has_its_outputs_and_nothing_of_the_machine() -> None:
    text = NOTEBOOK.read_text("utf-8")
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not _outputs(notebook, "error")
    assert all(each.name == "stdout" for each in _outputs(notebook, "stream"))
    images = [base64.b64decode(o.data["image/png"]) for o in _outputs(notebook, "display_data")]
    assert len(images) == 4
    assert sum(map(len, images)) < 300_000
    assert not re.search(r"/(home|root|work|tmp|usr|opt|Users)/|\.gguf\"|\.venv", text)
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (NOTEBOOK.parent / link).exists(), link
