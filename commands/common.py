"""What the commands share: options, settings from them, and how a command ends."""

import ctypes
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import LorsaError, UsageError
from ..whole import finite

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file of settings; options win over it.")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.", show_default="auto")]

IS_MAIN = os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"
"""Whether this process is the one of a run's that prints."""
STDOUT, STDERR = 1, 2
GOES_ON = ("harvest", "train", "sweep", "analyze", "explain", "demo", "rm", "merge")


def layers_of_store(store: str, layers: str | None) -> list[int]:
    """Return the layers of a store that are meant; all without a choice."""
    from ..store.read.reader import ActivationStore

    return chosen_layers(layers or "all", ActivationStore.open(store).layers, where=store)


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
    """Do a command's work and print its result; a known failure is a line and an exit code.

    In JSON, numbers that are not finite are null.
    """
    try:
        with _stdout_kept():
            result = work()
    except Exception as error:
        code, message = _explain(error)
        if message is None or os.environ.get("LORSA_DEBUG"):
            raise
        print_failure(message, f"error: {message}", as_json)
        raise typer.Exit(code) from None
    except KeyboardInterrupt:
        hint = "; the same command goes on from what is written" if command in GOES_ON else ""
        print_failure(f"stopped{hint}", f"stopped{hint}", as_json)
        raise typer.Exit(130) from None
    if not IS_MAIN:
        return
    if as_json:
        print(json.dumps(finite(result), allow_nan=False))
    else:
        from ..display.show import show

        show(command, result)
    if not result.get("ok", True):
        raise typer.Exit(1)


def print_failure(message: str, line: str, as_json: bool) -> None:
    """Print a line on stderr and, where JSON is asked for, the message on stdout."""
    if as_json and IS_MAIN:
        print(json.dumps({"error": message}))
    print(line, file=sys.stderr)


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


def _explain(error: Exception) -> tuple[int, str | None]:
    """Return exit code and message of a known failure; no message for a bug."""
    if isinstance(error, UsageError):
        return 2, str(error)
    if isinstance(error, LorsaError):
        return 1, str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return 1, (
            "the GPU's memory is full; use a smaller --batch-size (harvest), --batch-tokens "
            "(train) or --n-ctx"
        )
    if isinstance(error, OSError) and error.strerror:
        return 1, f"{error.filename or 'input or output'}: {error.strerror}"
    return 1, None
