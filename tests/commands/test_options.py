"""Options made from the fields of a config."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
import typer
from lorsa import cli
from lorsa.commands.options import FromConfig, Given, add_command, field_docs, first_sentence
from typer.testing import CliRunner


@dataclass(frozen=True, kw_only=True, slots=True)
class _Settings:
    """Settings of every kind."""

    runs: tuple[Path, ...]
    """Folders to read."""
    size: float = 2.0
    """Size of it,
    in metres. More is better."""
    n_heads: int | None = None
    """Heads. None takes all, or 4. There may be many."""
    mode: int | str = "auto"
    """Mode of it."""
    check: bool = True
    """Check it."""
    force: bool = False
    """Force it."""
    hidden: int = 3
    """Known to files alone."""
    layer: int = 0
    """Layer of one."""


Lorsa = Callable[..., Any]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> tuple[typer.Typer, dict[str, Any]]:
    """An app with a command of these settings, and what it was given last."""
    monkeypatch.setattr(FromConfig, "load", lambda _: _Settings)
    told: dict[str, Any] = {}
    shown = ("runs", "size", "n_heads", "mode", "check", "force")
    names = {"n_heads": ("--heads", "--head")}

    def run(
        given: Annotated[Given, FromConfig("", only=shown, arguments=("runs",), names=names)],
        layer: Annotated[str | None, typer.Option("--layers", help="Some.")] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say it.")] = False,
    ) -> None:
        """Run it."""
        told.clear()
        told.update(given=given, layer=layer, dry_run=dry_run)

    app = typer.Typer()
    add_command(app, "run", run)
    add_command(app, "other", lambda: None)
    return app, told


def test_what_is_typed_is_given_and_nothing_else(
    command: tuple[typer.Typer, dict[str, Any]],
) -> None:
    app, told = command
    done = CliRunner().invoke(app, ["run", "a", "b", "--head", "7", "--no-check", "--mode", "3"])
    assert done.exit_code == 0, done.output
    given = {"runs": [Path("a"), Path("b")], "n_heads": 7, "check": False, "mode": "3"}
    assert told == {"given": given, "layer": None, "dry_run": False}
    CliRunner().invoke(app, ["run", "a", "--layers", "1-2", "--dry-run", "--size", "3"])
    assert told == {"given": {"runs": [Path("a")], "size": 3.0}, "layer": "1-2", "dry_run": True}


@pytest.mark.parametrize("args", [[], ["a", "--hidden", "3"], ["a", "--no-force"], ["a", "--x"]])
def test_what_is_no_option_is_refused(
    command: tuple[typer.Typer, dict[str, Any]], args: list[str]
) -> None:
    assert CliRunner().invoke(command[0], ["run", *args]).exit_code == 2


def test_help_is_the_first_sentence_and_the_default(
    command: tuple[typer.Typer, dict[str, Any]],
) -> None:
    done = CliRunner().invoke(command[0], ["run", "--help"], env={"COLUMNS": "200"})
    told = " ".join(done.output.split())
    for words in (
        "Folders to read.",
        "Size of it, in metres. [default: (2)]",
        "Heads. [default: (all, or 4)]",
        "Mode of it. [default: (auto)]",
        "Check it. [default: (check)]",
    ):
        assert words in told
    assert "More is better" not in told
    assert "Known to files" not in told
    options = [told.index(name) for name in ("--size", "--heads", "--force", "--layers", "--dry")]
    assert options == sorted(options)  # the command's own `layer` in its field's place


def _sources() -> list[tuple[str, FromConfig, Any]]:
    """Return the commands with a config, where it is, and the command as typer has it."""
    group: Any = typer.main.get_command(cli.app)
    return [
        (name, each, group.commands[name])
        for name, function in cli.COMMANDS.items()
        for parameter in inspect.signature(function).parameters.values()
        for each in get_args(parameter.annotation)
        if isinstance(each, FromConfig)
    ]


@pytest.mark.parametrize(("name", "source", "command"), _sources(), ids=lambda each: str(each)[:9])
def test_every_setting_is_documented_once(name: str, source: FromConfig, command: Any) -> None:
    """Help was written beside every option, and again under every field of the configs."""
    config = source.load()
    docs = field_docs(config)
    assert list(docs) == [setting.name for setting in fields(config)]
    assert all(text.endswith((".", ")")) and text[0].isupper() for text in docs.values()), name
    own = inspect.signature(cli.COMMANDS[name]).parameters
    params = {param.name: param for param in command.get_params(typer.Context(command))}
    shown = [each for each in docs if each in params and each not in own]
    assert len(shown) >= 5
    for each in shown:
        assert params[each].help == first_sentence(docs[each])
        assert len(params[each].help) <= 160, each
