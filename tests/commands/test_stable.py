"""The options that there are: none is lost, and none changes, unless options.json says so too.

`python tests/commands/test_stable.py` writes options.json anew.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from lorsa import cli

FILE = Path(__file__).with_name("options.json")
GROUP: Any = typer.main.get_command(cli.app)
WORDS = {
    "text": "str",
    "float": "float",
    "integer": "int",
    "integer range": "int",
    "path": "Path",
    "boolean": "bool",
}


def _commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def _type_of(param: Any) -> str:
    if (descriptor := getattr(param, "type_descriptor", None)) is None:  # before typer 0.27
        return WORDS[param.type.name]
    return str(next(iter(get_args(descriptor.annotation)), descriptor.annotation).__name__)


def options_of(command: Any) -> list[str]:
    """Return what can be typed after a command: a line each of its names, type and default."""
    found = []
    for param in command.get_params(typer.Context(command)):
        names = [*param.opts, *param.secondary_opts]
        words = names if param.param_type_name == "option" else [param.name.upper()]
        words.append(_type_of(param))
        words += ["required"] if param.required else []
        words += ["many"] if getattr(param, "multiple", False) or param.nargs == -1 else []
        if param.default not in (None, False):  # an option that is not given is None or False
            words.append(f"default {param.default}")
        found.append(" ".join(words))
    return sorted(line for line in found if not line.startswith("--help"))


@pytest.mark.parametrize("name", dict(_commands(GROUP)))
def test_no_option_is_lost_or_changed(name: str) -> None:
    asked = json.loads(FILE.read_text("utf-8"))
    assert options_of(dict(_commands(GROUP))[name]) == asked[name]


def test_no_command_is_lost() -> None:
    assert list(dict(_commands(GROUP))) == list(json.loads(FILE.read_text("utf-8")))


if __name__ == "__main__":
    every = {name: options_of(command) for name, command in _commands(GROUP)}
    FILE.write_text(json.dumps(every, indent=1) + "\n", "utf-8")
