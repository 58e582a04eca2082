"""What the commands share: options, and work whose result is printed."""

import ctypes
import fcntl
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import LorsaError
from ..stop import stop_at_once
from .ending import FAILED, IS_MAIN, print_json, told_in_a_line

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file of settings; options win over it.")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.", show_default="auto")]

STDOUT, STDERR = 1, 2


def layers_of_store(store: str, layers: str | None) -> list[int]:
    """Return the layers of a store that are meant; all without a choice."""
    from ..store.facts import StoreFacts

    return chosen_layers(layers or "all", StoreFacts.open(store).layers, where=store)


def chosen_layers(layers: str, have: Sequence[int], *, where: str) -> list[int]:
    """Return which of some layers are meant.

    Raises:
        LorsaError: one is not there, or the text is no choice of layers.
    """
    from ..store.layers import choose_layers

    try:
        return choose_layers(layers, have, where=where)
    except ValueError as error:
        raise LorsaError(str(error)) from None


def perform(command: str, work: Callable[[], dict[str, Any]], as_json: bool) -> None:
    """Do a command's work and print its result; a failure is a line and an exit code.

    Args:
        command: as it is typed after `lorsa`.
        work: returns the result.
        as_json: whether it is printed as JSON.
    """
    with told_in_a_line(command, as_json):
        with _stdout_kept(), stop_at_once():
            result = work()
        if not IS_MAIN:
            return
        if as_json:
            print_json(command, result)
        else:
            from ..display.show import show

            show(command, result)
            sys.stdout.flush()
    if not result.get("ok", True):
        raise typer.Exit(FAILED)


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """Send to stderr what libraries say on stdout, which is for the result; Gloo does, from C++."""
    c = ctypes.CDLL(None)
    kept = fcntl.fcntl(STDOUT, fcntl.F_DUPFD_CLOEXEC, STDERR + 1)
    try:
        os.dup2(STDERR, STDOUT)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        c.fflush(None)  # C keeps back what it prints
        os.dup2(kept, STDOUT)
        os.close(kept)
