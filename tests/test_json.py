"""JSON of every command is what docs/json.md says: its names, all of them, and their kinds."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_stub import Stub, says
from lorsa import cli
from lorsa.version import __version__
from test_package import ROOT
from tiny import N_CTX
from typer.testing import CliRunner

PAGE = (ROOT / "docs/json.md").read_text("utf-8")
KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "whole number": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "true": lambda value: value is True,
    "false": lambda value: value is False,
    "null": lambda value: value is None,
    "object": lambda value: isinstance(value, dict),
    "list": lambda value: isinstance(value, list),
}
SMALL = ["--batch-tokens", 4 * N_CTX, "--train-tokens", 8 * N_CTX]
Table = dict[tuple[str, ...], str]
Outputs = dict[str, list[dict[str, Any]]]


def _steps(name: str) -> tuple[str, ...]:
    return tuple(name.replace("[]", ".[]").split("."))


def _tables() -> dict[str, Table]:
    """Return the kinds of what each command prints, by command and name."""
    found: dict[str, Table] = {}
    for section in PAGE.split("\n## ")[1:]:
        command = section.split("`")[1]
        rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| [^|]+ \|$", section, re.MULTILINE)
        found[command] = {_steps(name): kind for name, kind in rows}
    return found


TABLES = _tables()
ENVELOPE: Table = {
    ("lorsa",): "text",
    ("command",): "text",
    ("ok",): "true or false",
    ("next",): "text or null",
}


def _fits(step: str, told: str) -> bool:
    return told == step or (told == "*" and step != "[]")


def _under(table: Table, steps: tuple[str, ...]) -> Table:
    """Return the rows of a table below a name."""
    n = len(steps)
    return {
        told[n:]: kind
        for told, kind in table.items()
        if len(told) >= n and all(map(_fits, steps, told))
    }


def _resolved(table: Table) -> Table:
    """Return a table with what its kinds refer to beside them."""
    found = dict(table)
    for name, kind in table.items():
        if kind.startswith("as "):
            command, _, rest = kind.removeprefix("as ").partition(".")
            below = _under(TABLES[command], _steps(rest) if rest else ())
            below = {n: k for n, k in below.items() if name != ("runs", "[]") or n[0] != "runs"}
            found[name] = below.pop((), "object")
            found |= {name + below_name: k for below_name, k in _resolved(below).items()}
    return found


def _check(value: Any, at: tuple[str, ...], table: Table, seen: set[tuple[str, ...]]) -> None:
    """Compare what is printed at a name with the table, and note the rows that it has shown."""
    rows = _under(table, at)
    exact = [told for told in table if len(told) == len(at) and all(map(_fits, at, told))]
    told = max(exact, key=lambda name: -name.count("*"), default=None)
    if isinstance(value, dict | list):
        assert rows, f"{at} is not documented"
        items = value.items() if isinstance(value, dict) else (("[]", each) for each in value)
        for key, each in items:
            _check(each, (*at, key), table, seen)
        if not value:  # nothing in it to be seen
            seen |= {row for row in table if len(row) > len(at) and all(map(_fits, at, row))}
    else:
        assert told is not None, f"{at} is not documented"
        kind = table[told]
        kinds = [each.strip() for each in re.split(r",| or ", kind) if each.strip()]
        assert any(KINDS[each](value) for each in kinds), f"{at} is {value!r}, said to be {kind}"
    if told is not None:
        seen.add(told)


@pytest.fixture(scope="module")
def outputs(
    model_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outputs]:
    """What every command but `demo` prints, in each of its forms."""
    found: Outputs = {}
    with pytest.MonkeyPatch.context() as patch, Stub() as stub:
        patch.chdir(tmp_path_factory.mktemp("json"))
        patch.delenv("LORSA_DEBUG", raising=False)
        for command, *args in _commands(model_folder, text_folder, stub):
            done = CliRunner().invoke(cli.app, [*command.split(), *map(str, args), "--json"])
            assert done.stdout, (command, args, done.output)
            found.setdefault(command, []).append(json.loads(done.stdout))
        yield found


def _commands(model: Path, text: Path, stub: Stub) -> Iterator[list[object]]:
    harvest = ["--model", model, "--n-ctx", N_CTX, "--tokens", 60 * N_CTX, "--device", "cpu"]
    harvest += ["--data", text, "--layers", "0-1"]
    run, other = "runs/layer-1", "runs/layer-0"
    yield ["harvest", *harvest, "--dry-run"]
    yield ["harvest", *harvest]
    yield ["harvest", *harvest, "--dtype", "int8", "--store", "small"]
    yield ["store info", "small"]
    yield ["store verify", "acts"]
    Path("runs/layer-1").mkdir(parents=True)
    yield ["train", "--store", "acts", "--top-k", 4, *SMALL]
    yield ["train", "--store", "acts", "--top-k", 4, "--lr", 1e30, "--out", "failing", *SMALL]
    yield ["sweep", "--store", "acts", "--layer", 1, "--top-k", "4,9999", *SMALL]
    yield ["eval", run, "--store", "acts", "--model", model, "--ce-tokens", 64]
    yield ["eval", run, other, "--store", "acts", "--model", model, "--ce-tokens", 64]
    fox = ["--model", model, "--prompt", "The fox jumps over the dog, and the fox"]
    yield ["ablate", run, "--heads", "0-255", *fox]
    yield ["trace", run, other, *fox]
    yield ["trace", run, *fox, "--target", " fox", "--less", " dog"]
    yield ["trace", run, "--model", model, "--tokens", "5,17,301"]
    yield ["analyze", run, "--store", "acts", "--model", model]
    yield ["find", "induction", run, "--least", 0]
    yield ["find", "induction", "--store", "acts", "--least", 0]
    asked = [run, "--model", "m", "--heads"]
    yield ["explain", *asked, "0-40", "--endpoint", stub.url]
    yield ["explain", *asked, "0-40", "--endpoint", stub.url, "--yes"]
    stub.answer = lambda prompt: says("no JSON")
    yield ["explain", *asked, "0-60", "--endpoint", stub.url, "--yes"]
    yield ["view", run]
    yield ["verify", run, "acts"]
    yield ["convert", run, "theirs", "--to", "llamascopium"]
    yield ["push", run, "--repo", "./shared", "--dry-run"]
    yield ["push", run, "--repo", "./shared"]
    Path("other.txt").write_text("Nobody has seen what is told of here. " * 400, "utf-8")
    more = [*harvest[:-4], "--data", "other.txt", "--store", "more"]
    yield ["harvest", *more, "--layers", "0-1"]
    yield ["store merge", "acts", "more", "--out", "merged"]
    Path("acts/layers/1/attn_in/c/0/0/0").unlink()
    yield ["store verify", "acts"]
    yield ["verify", "acts"]
    yield ["store rm", "merged", "--layers", 0]


@pytest.mark.parametrize("command", [name for name in TABLES if name != "demo"])
def test_what_a_command_prints_is_documented(command: str, outputs: Outputs) -> None:
    """The names that scripts depend on stood nowhere, and no object said what it was of."""
    told = [each for each in outputs.get(command, []) if "--dry-run" not in command]
    told += [each for some in outputs.values() for each in some if each["command"] == command]
    assert told
    table = ENVELOPE | _resolved(TABLES[command])
    seen: set[tuple[str, ...]] = set()
    for each in told:
        if each["command"] != command:
            continue
        assert list(each)[:3] == ["lorsa", "command", "ok"]
        assert each["lorsa"] == __version__
        if each["ok"] or "error" not in each:
            _check(each, (), table | {(): "object"}, seen)
    assert (
        set(TABLES[command]) - seen - {n for n, k in TABLES[command].items() if "as " in k} == set()
    )


def test_every_command_is_documented() -> None:
    names = {*cli.COMMANDS, *(f"store {name}" for name in cli.STORE_COMMANDS)}
    assert set(TABLES) == names | {"harvest --dry-run"}
