"""The command line: which commands there are, and what a wrong request gets.

Nothing heavy is imported before a command runs, so `lorsa --help` is quick. Results go to stdout,
as a table or with --json as one JSON object; what happens meanwhile goes to stderr. Exit code 0 is
done, 1 a known failure in one line, 2 a wrong request, 130 stopped.
"""

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .commands import circuits, evaluate, features, harvest, share, store, train, verify
from .commands.demo import demo
from .commands.ending import print_failure, told_in_a_line
from .commands.options import add_command
from .commands.panels import panel_of_command
from .printable import guard_streams
from .version import __version__

_ParserError: Any = typer.BadParameter.__base__
"""The option parser's UsageError, wherever this version of typer keeps it."""

app = typer.Typer(
    name="lorsa",
    help="Decompose the layers of a language model into parts that can be read: attention into "
    "heads (Lorsas, Low-Rank Sparse Attention), MLPs into features (transcoders), activations at "
    "any site into features (SAEs).\n\n"
    "Example: lorsa demo\n\n"
    "Example: lorsa harvest --model qwen2-7b --layers 0-27 && lorsa train --store ./acts\n\n"
    "Example: lorsa analyze runs/layer-12 && lorsa view runs/layer-12 --open",
    epilog="More: docs/index.md",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
store_app = typer.Typer(help="Look after activation stores.", no_args_is_help=True)

COMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "harvest": harvest.harvest,
    "train": train.train,
    "sweep": train.sweep,
    "eval": evaluate.evaluate,
    "analyze": features.analyze,
    "view": features.view,
    "find": features.find,
    "explain": features.explain,
    "ablate": circuits.ablate,
    "trace": circuits.trace,
    "push": share.push,
    "convert": share.exchange,
    "verify": verify.verify,
}
STORE_COMMANDS: dict[str, Callable[..., None]] = {
    "info": store.info,
    "verify": store.verify,
    "rm": store.remove,
    "merge": store.merge,
}
for name, command in COMMANDS.items():
    add_command(app, name, command)
app.add_typer(store_app, name="store", rich_help_panel=panel_of_command("store"))
for name, command in STORE_COMMANDS.items():
    add_command(store_app, name, command, of="store")


def _show_version(asked: bool) -> None:
    if asked:
        print(f"lorsa {__version__}")
        raise typer.Exit


@app.callback()
def common(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    """Options before a command."""


def _open_streams() -> None:
    """Give streams that were closed by who began us to nobody, or the next file would be one."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
            setattr(sys, name, open(number, mode))  # noqa: SIM115 - until the process ends


def main() -> None:
    """Run the command line."""
    _open_streams()
    os.environ.setdefault("TQDM_DISABLE", "1")  # other packages' bars disturb ours and log files
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost process gets one line of ours
    guard_streams()
    as_json = "--json" in sys.argv
    try:
        with told_in_a_line("", as_json):
            code = _run(as_json)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _run(as_json: bool) -> Any:
    """Run a command and return its exit code, if it says one."""
    try:
        return app(prog_name="lorsa", standalone_mode=False)
    except _ParserError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            raise typer.Exit(2) from None
        message = " ".join(error.format_message().split())
        command = _command(error.ctx)
        line = f"error: {message.rstrip('.')}. See: {' '.join(['lorsa', *command])} --help"
        print_failure(" ".join(command), message, line, as_json)
        raise typer.Exit(2) from None


def _command(context: Any) -> list[str]:
    """Return the words that name the command of the parser's context, after `lorsa`."""
    words: list[str] = []
    while context is not None and context.parent is not None:
        words.insert(0, context.info_name)
        context = context.parent
    return words
