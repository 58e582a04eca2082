"""The package's public names: complete, typed, documented, and what the page says of them works."""

import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import lorsa
import pytest
import torch
import typer
from chat_stub import Stub
from lorsa import cli, errors
from lorsa.harvest.config import HarvestConfig
from stub import STUB, public_names, stub

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/api.md").read_text("utf-8")
FUNCTIONS = {name for name in lorsa.__all__ if name.islower() and not name.startswith("_")}

LOOSE = {
    "attention_ports", "intervene", "load", "load_language_model", "ports_between", "read_trace",
}  # fmt: skip
"""Functions that are no command's."""


def test_the_stub_is_made_from_the_table_of_public_names() -> None:
    """For type checkers; `python tests/stub.py` writes it again."""
    assert STUB.read_text("utf-8") == stub()
    assert public_names() == lorsa.PUBLIC
    assert set(lorsa.__all__) == {*lorsa.PUBLIC, "__version__"} <= set(dir(lorsa))


def test_every_public_name_is_there_and_says_what_it_is() -> None:
    for name in set(lorsa.__all__) - {"__version__"}:
        found = getattr(lorsa, name)
        assert found.__doc__, name
        assert getattr(sys.modules[found.__module__], found.__name__) is found
    with pytest.raises(AttributeError, match="module 'lorsa' has no attribute 'lorsas'"):
        _ = lorsa.lorsas


def test_no_public_name_is_that_of_a_module() -> None:
    """Importing lorsa.train would put the folder in the function's place."""
    modules = {path.stem for path in ROOT.glob("*.py")} | {p.parent.name for p in ROOT.glob("*/*")}
    assert not modules & set(lorsa.__all__)


def test_names_are_loaded_when_they_are_used() -> None:
    code = (
        "import sys, lorsa\n"
        "from lorsa import LorsaError\n"
        "dir(lorsa)\n"
        "assert not {'torch', 'zarr', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "from lorsa import ActivationStore\n"
        "assert 'zarr' in sys.modules or 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_error_is_a_lorsa_error() -> None:
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    assert len(found) >= 9
    assert all(issubclass(error, lorsa.LorsaError) for error in found)


def _table() -> list[list[str]]:
    """Return the rows of the page's first table, each a list of what stands in backticks."""
    rows = [line for line in PAGE.splitlines() if line.startswith("| `lorsa ")]
    return [re.findall(r"`([^`]+)`", "|".join(row.split("|")[1:3])) for row in rows]


def test_every_command_has_a_function_on_the_page() -> None:
    group: Any = typer.main.get_command(cli.app)
    commands = {
        f"{name} {sub}" if sub else name
        for name, command in group.commands.items()
        for sub in getattr(command, "commands", [""])
    }
    shown = {re.sub(r" --.*", "", command.removeprefix("lorsa ")) for command, _ in _table()}
    assert shown == commands
    named = {name for _, name in _table()}
    assert named <= set(lorsa.__all__)
    assert FUNCTIONS - named == LOOSE


def test_the_page_names_all_that_is_public() -> None:
    assert [name for name in lorsa.__all__ if name not in PAGE] == ["__version__"]


def test_the_page_can_be_followed(
    model_folder: Path,
    text_folder: Path,
    harvest_config: HarvestConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its Python in order, on a tiny model and less text."""
    monkeypatch.chdir(tmp_path)
    other = {"store": Path("acts-b"), "layers": "0-1", "tokens": 1024, "data": str(text_folder)}
    lorsa.harvest_activations(
        HarvestConfig(model=str(model_folder), n_ctx=32, device="cpu", **other)
    )
    names: dict[str, Any] = {}
    page = PAGE
    with Stub() as stub:
        for told, ours in (
            ("smollm2-135m", str(model_folder)),
            ("http://127.0.0.1:8080/v1", stub.url),
            ("256", "32"),
            ("400_000", "2_080"),
            ("301", "30"),
            ("11,12", "0,1"),
            ('"11"', '"0"'),
        ):
            assert told in PAGE
            page = page.replace(told, ours)
        blocks = re.findall(r"```python\n(.*?)```", re.sub(r"\b12\b", "1", page), re.S)
        assert len(blocks) == 12
        for block in blocks:
            exec(block, names)
        assert stub.bodies
    _expect_shapes(names)
    assert all(outcome.failure is None for outcome in names["outcomes"])
    assert [row["top_k"] for row in names["swept"].rows] == [32, 32, 64, 64]
    assert Path("sweep/pareto.png").is_file()
    assert names["page"].file.is_file()
    assert torch.equal(names["again"].W_O, names["lorsa"].W_O)
    assert Path("theirs/config.json").is_file()
    assert list(lorsa.store_info("acts-ab")["layers"]) == ["1"]
    assert "runs/layer-99 holds no dictionary" in capsys.readouterr().out


def _expect_shapes(names: dict[str, Any]) -> None:
    """Check what the comments of the page say of shapes."""
    x, z, ids = names["x"], names["z"], names["ids"]
    n, seq = x.shape[:2]
    assert names["y_hat"].shape == names["y"].shape == x.shape
    assert z.shape == ids.shape == (n, seq, 64)
    assert names["pattern"].shape == (n, 2, seq, seq)
    assert names["parts"].shape == (n, seq, 64, seq)
    assert torch.allclose(names["parts"].sum(dim=-1).relu(), z, atol=1e-4)
    assert names["of_one"].shape == (n, seq, 1, seq)
    tokens, logits, changed = names["tokens"], names["logits"], names["changed"]
    assert names["y_hat_mlp"].shape == names["y_mlp"].shape
    assert [one.kind for one in names["found_all"].runs] == ["transcoder", "lorsa", "sae"]
    assert logits.shape == changed.shape == (*tokens.shape, 400)
    assert not torch.equal(logits, changed)
    assert names["x_here"].shape == names["y_here"].shape == (*tokens.shape, x.shape[2])


PROGRAM = """\
from pathlib import Path

from lorsa import (
    ActivationStore, EvalConfig, HarvestConfig, Lorsa, LorsaError, TrainConfig, ablate_heads,
    attention_ports, evaluate_lorsas, harvest_activations, intervene, sweep_lorsas, train_lorsa,
    train_lorsas,
)

def work(store: ActivationStore, model: object) -> None:
    lorsa = Lorsa.from_pretrained(Path("runs/layer-12"))
    x, _y = store.activations(attention_ports(12), store.held_out_seqs[:2])
    acts, ids = lorsa.encode(x)
    with lorsa.attach(model), intervene(model, lorsa, 12, {17: 0.0}):
        lorsa.pattern(x, ov_heads=ids[0, 0])
    lorsa.contributions(x, [17])
    reveal_type(store.layers)
    lorsa.attach(model, layer="12")

try:
    store: str = harvest_activations(HarvestConfig(model="gpt2"), report=print).store
    result = train_lorsa(TrainConfig(store=Path(store), layer=3, out=Path("run")), report=print)
    reveal_type(result.fvu)
    reveal_type(train_lorsas([])[0].failure)
    reveal_type(evaluate_lorsas([EvalConfig(run=Path("run"), store=Path(store))]).runs[0].l0)
    reveal_type(sweep_lorsas({"layer": 3}, {"top_k": [32, 64]}, "sweep", report=print).ok)
except LorsaError as error:
    reveal_type(error.args)
TrainConfig(layer=3, out=Path("run"))
ablate_heads("run")
"""
TOLD = [
    'Revealed type is "list[int]"',
    'Argument "layer" to "attach" of "Dictionary" has incompatible type "str"; '
    'expected "int | None"',
    'Revealed type is "float | None"',
    'Revealed type is "Exception | None"',
    'Revealed type is "float"',
    'Revealed type is "bool"',
    'Revealed type is "tuple[Any, ...]"',
    'Missing named argument "store" for "TrainConfig"',
    'Argument 1 to "ablate" has incompatible type "str"; expected "AblateConfig"',
]


def test_a_program_is_typed_as_an_installed_package_types_it(tmp_path: Path) -> None:
    """mypy finds lorsa where pip puts it, so by py.typed, and reads a program with some mistakes.

    Without torch, which takes it a minute; that our types and torch's agree, `check.sh` says.
    """
    venv.create(tmp_path / "venv", with_pip=False)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "lorsa").symlink_to(ROOT)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    options = ["--strict", "--python-executable", str(tmp_path / "venv/bin/python")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(program)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    said = re.findall(r": (?:error: (.*)  \[|note: (Revealed type .*))", done.stdout)
    assert [error or revealed for error, revealed in said] == TOLD, done.stdout + done.stderr
