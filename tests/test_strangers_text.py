"""Text of strangers reaches the terminal as text, from whichever field of whichever file."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import make_world, sealed_anew
from lorsa import cli
from lorsa.commands.ending import print_failure
from lorsa.display.bars import Bar, say
from lorsa.display.screen import Screen
from lorsa.display.words import fact_table
from lorsa.printable import PrintableStream, printable
from rich.text import Text
from typer.testing import CliRunner

NASTY = "a\x1b]0;owned\x1b\\\x1b[2J\x9b31m\r\x08\u202eb\u2066[red]c[link=file:///d]e[/]:bomb:\x00f"
"""Escape sequences of a title and of a screen, C1, carriage return, backspace, marks of direction,
rich's markup and emoji, NUL"""
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]|💣")
BARS = re.compile(r"\rLoading weights:[^\r\n]*")
"""Bars of transformers, which `cli.main` has turned off"""
STYLED = re.compile(r"[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|\x1b[^\[]")


@pytest.fixture(scope="module")
def world(model_folder: Path, text_folder: Path, store_folder: Path, tmp_path_factory: Any) -> Path:
    """A model, its text, store, run and analysis, with an explanation."""
    folder: Path = tmp_path_factory.mktemp("strangers")
    make_world(folder, model_folder, text_folder, store_folder)
    told = [{"head": 0, "text": "x", "model": "m"}, {"head": 0, "error": "y"}]
    lines = "\n".join(json.dumps(line) for line in told)
    (folder / "runs/layer-1/analysis/explanations.jsonl").write_text(lines)
    return folder


def _texts(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where texts are in a JSON, those that are numbers too: a stranger may write any."""
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content[:2])
        for key, value in items:
            yield from _texts(value, (*at, key))
    else:
        yield at


def _with_text(content: Any, at: tuple[Any, ...]) -> Any:
    changed = json.loads(json.dumps(content))
    holder = changed
    for step in at[:-1]:
        holder = holder[step]
    holder[at[-1]] = NASTY
    return sealed_anew(changed)


def _say(folder: Path, *argv: str, code: int | None = None) -> str:
    """Run a command in this process and return all that it printed, for people and as JSON."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("LORSA_DEBUG", raising=False)
        done = CliRunner().invoke(cli.app, list(argv))
    assert done.exit_code in (0, 1, 2), done.output
    told = BARS.sub("", done.output)
    assert not OBEYED.search(told), repr(told)
    return told


COMMANDS: dict[str, list[list[str]]] = {
    "acts/manifest.json": [["store", "info", "acts"], ["store", "verify", "acts"]],
    "acts/layers/1/attn_in/zarr.json": [["store", "verify", "acts"]],
    "runs/layer-1/run.json": [["push", "runs/layer-1", "--repo", "./p", "--dry-run"]],
    "runs/layer-1/config.json": [["push", "runs/layer-1", "--repo", "./p", "--dry-run"]],
    "runs/layer-1/analysis/analysis.json": [["find", "local", "runs/layer-1", "--least", "0"]],
    "runs/layer-1/analysis/explanations.jsonl": [
        ["explain", "runs/layer-1", "--endpoint", "http://127.0.0.1:9/v1", "--model", "m"],
        ["explain", "runs/layer-1", "--endpoint", "http://127.0.0.1:9/v1", "--model", "m",
         "--heads", "0", "--yes"],
    ],
    "model/config.json": [["harvest", "--model", "model", "--data", "text", "--store", "new",
                           "--tokens", "64", "--n-ctx", "16", "--layers", "1", "--dry-run"]],
}  # fmt: skip


@pytest.mark.parametrize("file", COMMANDS)
def test_no_field_of_a_file_reaches_the_terminal_as_a_command(file: str, world: Path) -> None:
    """Facts of stores and runs moved the cursor, and rewrote the command that "next:" said."""
    path = world / file
    before = path.read_text("utf-8")
    lines = before.splitlines() if path.suffix == ".jsonl" else [before]
    shown = 0
    try:
        for n, line in enumerate(lines):
            for at in list(_texts(json.loads(line)))[:80]:
                other = [*lines[:n], json.dumps(_with_text(json.loads(line), at)), *lines[n + 1 :]]
                path.write_text("\n".join(other), "utf-8")
                for argv in COMMANDS[file]:
                    shown += "owned" in _say(world, *argv)
    finally:
        path.write_text(before, "utf-8")
    assert shown > 0, "nothing of it was printed at all"


def test_no_column_of_an_analysis_reaches_the_terminal_as_a_command(world: Path) -> None:
    folder = world / "runs/layer-1/analysis"
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path, use_threads=False)
        before = path.read_bytes()
        for i, field in enumerate(table.schema):
            if pa.types.is_string(field.type):
                nasty = pa.array([NASTY] * len(table))
                pq.write_table(table.set_column(i, field, nasty), path)
                _say(world, "find", "local", "runs/layer-1", "--least", "0")
                path.write_bytes(before)


def test_no_name_of_a_file_reaches_the_terminal_as_a_command(world: Path, tmp_path: Path) -> None:
    name = NASTY.replace("\x00", "").replace("/", "|")
    for where in ("text", "acts", "runs"):
        shutil.copytree(world / where, tmp_path / f"{name}{where}")
    told = _say(tmp_path, "store", "info", f"{name}acts")
    assert "a<1B>]0;owned<1B>\\<1B>[2J<9B>31m<0D><08><202E>b<2066>[red]c" in told
    assert "owned" in _say(tmp_path, "store", "info", f"{name}nowhere")
    assert "owned" in _say(tmp_path, "store", "verify", f"{name}acts")
    assert "owned" in _say(tmp_path, "eval", f"{name}runs/layer-1", "--store", f"{name}acts")
    assert "owned" in _say(tmp_path, "view", f"{name}runs/layer-1")
    assert "owned" in _say(tmp_path, "find", name)


def test_what_libraries_say_is_text_too(tmp_path: Path) -> None:
    """A warning of transformers quotes a model's config.json; its colours were the terminal's."""
    code = "import sys, warnings; from lorsa.cli import guard_streams; guard_streams()\n"
    code += f"text = {NASTY!r}\nwarnings.warn(text)\nprint(text, file=sys.stderr)\n"
    code += "print('\\x1b[31mred\\x1b[0m', file=sys.stderr)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    told = done.stderr.decode()
    assert told.count("owned") >= 2
    assert not OBEYED.search(told)
    assert told.endswith("red\n")


@pytest.mark.parametrize("width", [20, 60, 200])
def test_a_terminal_obeys_rich_alone(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal there are colours, which are ours, and nothing else that it obeys."""
    screen = Screen()
    monkeypatch.setattr(screen, "_force_terminal", True)
    screen.width = width
    with screen.capture() as capture:
        screen.print(fact_table(NASTY, {NASTY: NASTY}))
        screen.print(Text(NASTY, style="red"))
        screen.print(NASTY, markup=False)
    told = capture.get()
    assert not STYLED.search(told), repr(told)
    assert "💣" not in told
    assert "file:///d" in told.replace("\n", "").replace(" ", "") or width == 20


def test_a_message_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A line break in a name began a line of its own, such as another "next:"."""
    say(f"one\nnext: rm {NASTY}")
    print_failure("x", "m", f"error: one\nnext: rm {NASTY}", as_json=False)
    with Bar(NASTY) as bar:
        bar.update(1, 1, NASTY)
    err = capsys.readouterr().err
    assert not OBEYED.search(err)
    assert not [line for line in err.splitlines() if line.startswith("next:")]
    assert "one↵next:" in err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a b\u00a0c\u3000d", "a b\u00a0c\u3000d"),
        ("\u0645\u06cc\u200c\u062e 👨\u200d👩", "\u0645\u06cc\u200c\u062e 👨\u200d👩"),
        ("a\r\nb\nc", "a↵b↵c"),
        ("\udcff\u00ad\ufeff\u2028", "<DCFF><AD><FEFF><2028>"),
        ("\x7f\x80\t\v", "<7F><80><09><0B>"),
    ],
)
def test_printable_spells_what_acts_and_leaves_what_is_read(text: str, told: str) -> None:
    assert printable(text) == told


def test_printable_stream_passes_for_the_stream(capsys: pytest.CaptureFixture[str]) -> None:
    stream = PrintableStream(sys.stderr)
    assert stream.write("a\x1b[1mb\tc\n") == 9
    stream.writelines(["\x07", "\n"])
    stream.flush()
    assert stream.isatty() is False
    assert capsys.readouterr().err == "ab      c\n<07>\n"
