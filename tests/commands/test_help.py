"""Help: panels, examples that can be typed, and what a shell completes."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
from lorsa import cli
from lorsa.commands import completing
from lorsa.commands.panels import COMMANDS, OPTIONS, PAGES, panel_of_option
from typer.testing import CliRunner

DOCS = Path(__file__).parents[2] / "docs"


def _every_command() -> dict[str, Any]:
    group: Any = typer.main.get_command(cli.app)
    commands = dict(group.commands)
    store = commands.pop("store").commands
    return commands | {f"store {name}": command for name, command in store.items()}


@pytest.mark.parametrize("name", _every_command())
def test_every_command_shows_three_examples_that_can_be_typed(name: str) -> None:
    """One example at most, and nothing tried whether its options exist."""
    command = _every_command()[name]
    examples = re.findall(rf"^Example: (.*lorsa {name}(?: .*)?)$", command.help, re.M)
    assert len(examples) >= 3
    assert f"More: docs/{PAGES[name.split()[0]]}.md" == command.epilog
    for example in examples:
        words = shlex.split(example.partition(f"lorsa {name}")[2].partition(" && ")[0])
        command.make_context(name, words)  # an option that is not there raises


def test_help_comes_in_panels() -> None:
    """Thirteen commands stood in one list with the demo second to last, 25 options in one box."""
    told = CliRunner().invoke(cli.app, ["-h"], env={"COLUMNS": "120"}).output
    titles = re.findall(r"─ (\w+) ─", told)
    assert titles == ["Options", *COMMANDS]
    order = [told.index(f"│ {name} ") for names in COMMANDS.values() for name in names]
    assert order == sorted(order)
    assert set(cli.COMMANDS) | {"store"} == {n for names in COMMANDS.values() for n in names}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_a_long_command_has_one_panel(name: str) -> None:
    command = _every_command()[name]
    params = command.get_params(typer.Context(command))
    placed = Counter(each for names in OPTIONS[name].values() for each in names)
    assert max(placed.values()) == 1
    options = {each.name for each in params if each.param_type_name == "option"}
    assert options <= set(placed)
    told = CliRunner().invoke(cli.app, [*name.split(), "-h"], env={"COLUMNS": "120"}).output
    assert set(re.findall(r"─ ([\w ]+) ─", told)) - {"Arguments"} == _used(name, options)


def _used(name: str, options: set[str]) -> set[str]:
    """Return the panels with an option of a command; a sweep has not all of a training's."""
    return {panel for panel, names in OPTIONS[name].items() if options & set(names)}


def test_no_command_has_more_than_ten_options_in_one_panel() -> None:
    for name, command in _every_command().items():
        params = command.get_params(typer.Context(command))
        boxes = Counter(panel_of_option(name, each.name) for each in params)
        assert max(boxes.values()) <= 10, name


def test_pages_that_help_names_are_there() -> None:
    assert set(PAGES) == {n for names in COMMANDS.values() for n in names}
    assert all((DOCS / f"{page}.md").is_file() for page in PAGES.values())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two stores and two runs, in it and one below."""
    sites = {f"{n}.{name}": {} for n in (3, 17, 12) for name in ("attn_in", "mlp_in")}
    for name, facts in (("acts", {"sites": sites}), ("other/acts", {"layers": {"5": {}}})):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps(facts))
    sited = {"sites": {"10.mlp_in": {}, "10.mlp_out": {}, "4.mlp_in": {}}}
    (tmp_path / "sited").mkdir()
    (tmp_path / "sited/manifest.json").write_text(json.dumps(sited))
    for name in ("runs/layer-3", "mine"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "run.json").touch()
    (tmp_path / "runs/notes").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("lorsa tra", {"trace", "train"}),
        ("lorsa store ver", {"verify"}),
        ("lorsa find previous", {"previous-token"}),
        ("lorsa find induction ", {"mine", "runs/layer-3"}),
        ("lorsa view ru", {"runs/layer-3"}),
        ("lorsa analyze mi", {"mine"}),
        ("lorsa store info ", {"acts", "other/acts", "sited"}),
        ("lorsa train --store oth", {"other/acts"}),
        ("lorsa train --store acts --layers ", {"3", "12", "17"}),
        ("lorsa train --layers 1", {"12", "17"}),
        ("lorsa train --layers 12,", {"12,3", "12,17"}),
        ("lorsa train --store other/acts --layers ", {"5"}),
        ("lorsa store rm other/acts --layers ", {"5"}),
        ("lorsa train --store none --layers ", set()),
        ("lorsa train --store sited --layers ", {"4", "10"}),
        ("lorsa train --kind tr", {"transcoder"}),
        ("lorsa sweep --kind sae,tr", {"sae,transcoder"}),
        ("lorsa train --site mlp_", {"mlp_in", "mlp_out"}),
        ("lorsa explain --ll", {"--llm"}),
    ],
)
def test_a_shell_completes(
    here: Path, monkeypatch: pytest.MonkeyPatch, typed: str, offered: set[str]
) -> None:
    """Completion was switched off."""
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1)}
    for name, value in {**words, "_LORSA_COMPLETE": "complete_bash"}.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(cli.app, prog_name="lorsa")
    assert set(done.output.split()) == offered


def test_names_that_glob_would_read_complete_nothing(here: Path) -> None:
    """A bracket in a name is no pattern; glob raised, or listed the whole disk."""
    for begun in ("[", "a*", "**/", "~", "runs/[x", "\0"):
        assert completing.runs(begun) == completing.stores(begun) == []


def test_completion_can_be_installed() -> None:
    told = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "120"}).output
    assert "--install-completion" in told
    assert "--show-completion" in told
