"""The end of a command: its result, a known failure in a line, or a bug with its trace kept."""

import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from ..errors import LorsaError, UsageError
from ..printable import printable
from ..version import __version__
from ..whole import finite

IS_MAIN = os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"
"""Whether this process is the one of a run's that prints."""
GOES_ON = ("harvest", "train", "sweep", "analyze", "explain", "demo", "store rm", "store merge")
FAILED, BUG, STOPPED = 1, 70, 130
"""Exit codes besides 0 and that of a wrong request, 2; 70 is EX_SOFTWARE of sysexits.h."""


@contextmanager
def told_in_a_line(command: str, as_json: bool) -> Iterator[None]:
    """End a command whose block raises: a line on stderr, JSON where it is asked for, exit code.

    The trace of a bug goes to a file that the line names. LORSA_DEBUG=1 raises the error as it is.

    Args:
        command: as it is typed after `lorsa`.
        as_json: whether stdout has the message too.

    Raises:
        typer.Exit: with the exit code.
    """
    try:
        yield
    except typer.Exit:
        raise
    except BrokenPipeError:  # who reads our output has enough of it
        _leave_stdout()
        raise typer.Exit(FAILED) from None
    except (KeyboardInterrupt, typer.Abort):
        hint = "; the same command goes on from what is written" if command in GOES_ON else ""
        print_failure(command, f"stopped{hint}", f"stopped{hint}", as_json)
        raise typer.Exit(STOPPED) from None
    except Exception as error:
        if os.environ.get("LORSA_DEBUG"):
            raise
        code, message = explain(error)
        print_failure(command, message, f"error: {message}", as_json)
        raise typer.Exit(code) from None


def print_json(command: str, result: dict[str, Any]) -> None:
    """Print an object on stdout: lorsa, command, ok, and the command's own names (docs/json.md).

    Numbers that are not finite are null.
    """
    content = {"lorsa": __version__, "command": command, "ok": True} | finite(result)
    print(json.dumps(content, allow_nan=False), flush=True)


def print_failure(command: str, message: str, line: str, as_json: bool) -> None:
    """Print a line on stderr and, where JSON is asked for, the message on stdout."""
    if as_json and IS_MAIN:
        try:
            print_json(command, {"ok": False, "error": message})
        except OSError:  # stdout itself is what failed
            _leave_stdout()
    print(printable(line), file=sys.stderr, flush=True)


def explain(error: Exception) -> tuple[int, str]:
    """Return exit code and message of a failure; the trace of one that is not known is kept."""
    if isinstance(error, UsageError):
        return 2, str(error)
    if isinstance(error, LorsaError):
        return FAILED, str(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return FAILED, (
            "the GPU's memory is full; use a smaller --batch-size (harvest), --batch-tokens "
            "(train) or --n-ctx"
        )
    if isinstance(error, MemoryError):
        return FAILED, "this machine's memory is full; end other programs, or ask for less at once"
    if isinstance(error, OSError) and error.strerror:
        return FAILED, f"{error.filename or 'input or output'}: {error.strerror}"
    return BUG, _bug(error)


def _bug(error: Exception) -> str:
    """Return a line about an error that nobody foresaw, after its trace is written to a file."""
    text = str(error)
    what = f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
    try:
        handle, path = tempfile.mkstemp(prefix="lorsa-trace-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"lorsa {__version__}, Python {platform.python_version()}\n")
            file.write(f"{sys.argv}\n\n{''.join(traceback.format_exception(error))}")
    except OSError as refused:
        where = f"cannot be kept ({refused.strerror})"
    else:
        where = f"is in {path}"
    return f"a bug of lorsa ({what}); its trace {where}, LORSA_DEBUG=1 shows it; please report it"


def _leave_stdout() -> None:
    """Give what is still to be printed to nobody, or Python would report the closed pipe."""
    nobody = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nobody, 1)
    os.close(nobody)
