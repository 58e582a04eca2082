"""The README can be read in one go, and what the pages tell people to type works."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import typer
import zarr
from lorsa import cli
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.store.read.reader import ActivationStore
from tiny import SIZES, make_tokenizer
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_LINES = 150


def test_the_readme_can_be_read_in_one_go() -> None:
    """It was 396 lines, 272 of them a list of files that had drifted from the files' own words."""
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= MOST_LINES
    folders = {match[1] for line in lines if (match := re.match(r" {4}([a-z]+)/ ", line))}
    assert folders == {path.parent.name for path in ROOT.glob("*/*") if _is_told(path)}


def _is_told(path: Path) -> bool:
    """Return whether a file makes its folder one that the README names."""
    folder = path.parent.name
    return (
        path.suffix in (".py", ".md", ".toml")
        and not folder.startswith((".", "__"))
        and (folder not in ("build", "dist", "site", "demo", "acts", "runs"))
    )


def _whole_lines(text: str) -> list[str]:
    """Return the lines of a text, those that go on after a backslash as one."""
    return re.sub(r"\\\n *", "", text).splitlines()


def _commands() -> Iterator[Any]:
    """Yield every lorsa command that a page shows."""
    for page in PAGES:
        for line in _whole_lines(page.read_text("utf-8")):
            for command in re.findall(r"^ {0,4}(lorsa [a-z].*?)(?:  +#.*)?$", line.split("`")[0]):
                yield pytest.param(command, id=f"{page.name}: {command[:40]}")


@pytest.mark.parametrize("command", list(_commands()))
def test_commands_in_the_pages_exist(command: str) -> None:
    words = shlex.split(command)[1:]
    group: Any = typer.main.get_command(cli.app)
    while words and hasattr(group, "commands"):
        group = group.commands[words.pop(0)]
    options = {name for each in group.get_params(typer.Context(group)) for name in each.opts}
    assert {word for word in words if word.startswith("--")} <= options


@pytest.fixture(scope="module")
def thirteen_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thirteen")
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 13, "max_position_embeddings": 256}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_the_readme_can_be_followed(
    thirteen_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command and the Python of "Use", on a smaller model and less text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BROWSER", "true")
    text = (ROOT / "README.md").read_text("utf-8")
    (shell,) = re.findall(r"```sh\n(lorsa harvest.*?)```", text, re.S)
    shell = shell.replace("smollm2-135m", str(thirteen_layers)).replace("400000", "12288")
    for line in shell.splitlines():
        result = CliRunner().invoke(cli.app, shlex.split(line)[1:])
        assert result.exit_code == 0, result.output
    python = re.findall(r"```python\n(.*?)```", text, re.S)[0]
    names: dict[str, Any] = {}
    exec(python.replace("[:4]", "[:2]"), names)
    assert names["y_hat"].shape == names["y"].shape


def test_the_store_page_can_be_followed(
    store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/store.md").read_text("utf-8").replace("layers/12", "layers/1")
    with_zarr, with_lorsa, derived = re.findall(r"```python\n(.*?)```", text, re.S)
    (tmp_path / "acts").symlink_to(store_folder)
    names: dict[str, Any] = {}
    exec(with_lorsa.replace("ports(12)", "ports(1)"), names)
    assert names["x"].shape[0] == names["tokens"].shape[0] == 8
    x, y = names["x"], names["y"]
    exec(re.sub(r"\b12\b", "1", derived), names)
    assert torch.equal(names["x"], x)
    assert torch.equal(names["y"], y)
    bits = torch.tensor([[1.5, -2.25]]).bfloat16().view(torch.uint16).numpy()
    group: Any = zarr.create_group(tmp_path / "half")
    group.create_array("layers/1/attn_in", data=bits, attributes={"lorsa_dtype": "bfloat16"})
    names = {}
    exec(with_zarr.replace('"acts"', f'"{tmp_path / "half"}"'), names)
    assert np.array_equal(names["first_sequence"], [1.5, -2.25])
    assert ActivationStore.open(store_folder).manifest.n_seq > 8


def test_the_fidelity_page_can_be_followed(
    store_folder: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acts").symlink_to(store_folder)
    words = ["train", "--store", "acts", "--top-k", "6", "--batch-tokens", "128"]
    assert CliRunner().invoke(cli.app, [*words, "--train-tokens", "512"]).exit_code == 0
    text = (ROOT / "docs/fidelity.md").read_text("utf-8").replace("(3, 12)", "(1, 2)")
    measured, changed = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, Any] = {}
    exec(measured.replace("smollm2-135m", str(model_folder)), names)
    assert [run.layer for run in names["found"].runs] == [1, 2]
    names = {
        "model": transformers.AutoModelForCausalLM.from_pretrained(model_folder),
        "lorsa": Lorsa.from_pretrained("runs/layer-1"),
        "ids": torch.arange(9)[None],
    }
    exec(changed.replace("12, {17: 0.0, 301: 2.0}", "1, {0: 0.0, 1: 2.0}"), names)
    assert names["logits"].shape == (1, 9, 400)


def test_the_analysis_page_can_be_followed(
    store_folder: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acts").symlink_to(store_folder)
    text = (ROOT / "docs/analysis.md").read_text("utf-8").replace("layer-17", "layer-1")
    text = text.replace("smollm2-135m", str(model_folder))
    words = ["train", "--store", "acts", "--layer", "1", "--top-k", "6", "--batch-tokens", "128"]
    assert CliRunner().invoke(cli.app, [*words, "--train-tokens", "512"]).exit_code == 0
    for line in re.findall(r"^    lorsa (.*)$", text, re.M):
        done = CliRunner().invoke(cli.app, line.split())
        assert done.exit_code == 0, done.output
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.S)[0], names)
    z = names["parts"].sum(dim=-1).relu()
    assert torch.allclose(z, names["acts"], atol=1e-4)


TUTORIAL_CHANGES = (
    ("smollm2-demo", "{model}"),
    ("/usr/share/doc/python3.11/html/_sources", "{text}"),
    ("--layers 16-18", "--layers 0-2"),
    ("layer-16", "layer-0"),
    ("layer-17", "layer-1"),
    ("layer-18", "layer-2"),
    ("--n-ctx 256", "--n-ctx 32"),
    ("--tokens 16384", "--tokens 640"),
    ("--tokens 393216", "--tokens 4160"),
    ("--ce-tokens 16384", "--ce-tokens 256"),
    ('== "induction"', '== "local"'),
)
"""What the tests' tiny model cannot do as the tutorial does it on SmolLM2."""


def _for_the_tiny_model(text: str, model: Path, corpus: Path) -> str:
    """Return a part of the tutorial with the sizes of the tiny model."""
    for told, ours in TUTORIAL_CHANGES:
        text = text.replace(told, ours.format(model=model, text=corpus))

    def within(match: re.Match[str]) -> str:
        heads = dict.fromkeys(int(head) % 256 for head in re.findall(r"\d+", match[2]))
        return match[1] + ",".join(map(str, heads))

    return re.sub(r"(--heads )(\d+(?:,\d+)*)", within, text)


def test_the_tutorial_can_be_followed(
    model_folder: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command and the Python of the page, in order."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/tutorial.md").read_text("utf-8")
    names: dict[str, Any] = {}
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", text, re.S):
        block = _for_the_tiny_model(block, model_folder, text_folder)
        if language == "python":
            exec(re.sub(r"\((\d+)\)", lambda head: f"({int(head[1]) % 256})", block), names)
            continue
        for line in _whole_lines(block):
            if not line.startswith("lorsa "):
                continue
            result = CliRunner().invoke(cli.app, shlex.split(line)[1:])
            is_silent = "so nothing changes" in result.stderr  # a head of other weights than ours
            assert result.exit_code == 0 or is_silent, f"{line}: {result.output}"


def test_no_page_points_outside_the_project() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
