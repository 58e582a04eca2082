"""No command ends in a trace, whatever is wrong with its inputs; see benchmarks/fuzz.py."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import Outcome, fuzz, make_world, run_alone, sealed_anew

SECONDS = 5.0


@pytest.fixture(scope="module")
def world(
    model_folder: Path,
    text_folder: Path,
    store_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "world"
    folder.mkdir()
    make_world(folder, model_folder, text_folder, store_folder)
    return folder


def test_odd_inputs_end_in_a_line(world: Path) -> None:
    """Mistyped options, files and texts ended commands in traces of several dozen lines."""
    faults: list[str] = []

    def report(seed: int, found: Outcome) -> None:
        if found.fault is not None:
            faults.append(f"{seed}: {found.fault}: {found.argv}: {found.changed}: {found.err}")

    n = fuzz(world, range(10_000), seconds=SECONDS, report=report)
    assert n > 0
    assert not faults, "\n".join(faults)


def _ends_in_a_line(folder: Path, argv: list[str]) -> str:
    code, out, err = run_alone([*argv, "--json"], folder)
    found = Outcome(argv, "", code, out, err)
    assert found.fault is None, found
    assert code in (1, 2)
    told: str = json.loads(out)["error"]
    return told


@pytest.fixture
def case(world: Path, tmp_path: Path) -> Path:
    """A copy of the world, which may be changed."""
    folder = tmp_path / "case"
    shutil.copytree(world, folder)
    return folder


@pytest.mark.parametrize(
    "argv",
    [
        ["harvest", "--model", "model", "--data", "~nouser/x", "--store", "new", "--n-ctx", "16"],
        ["harvest", "--model", "~nouser/x", "--data", "text", "--store", "new"],
        ["eval", "runs/layer-1", "--store", "acts", "--model", "~nouser/x"],
    ],
)
def test_a_home_of_nobody_is_a_path_as_others(argv: list[str], case: Path) -> None:
    """`~nouser` was a RuntimeError."""
    assert "nouser" in _ends_in_a_line(case, argv)


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("sequences", lambda t: pa.concat_tables([t, t])),
        ("sequences", lambda t: t.set_column(1, "tokens", pa.array([[1]] * len(t)))),
        ("examples", lambda t: t.set_column(9, "sources", pa.nulls(len(t)))),
        ("heads", lambda t: t.set_column(0, "head", pa.nulls(len(t)))),
    ],
)
def test_tables_of_an_analysis_that_are_not_whole_are_told(
    table: str, change: Callable[[pa.Table], pa.Table], case: Path
) -> None:
    """A sequence that was there twice, or a null, ended `view` and `explain` in a trace."""
    folder = case / "runs/layer-1/analysis"
    path = folder / f"{table}.parquet"
    pq.write_table(change(pq.read_table(path, use_threads=False)), path)
    assert f"{table}.parquet" in _ends_in_a_line(case, ["view", "runs/layer-1"])


@pytest.mark.parametrize("settings", [{"model_max_length": []}, {"model_max_length": "x"}, -1])
def test_settings_of_a_tokenizer_that_are_mistyped_are_told(settings: Any, case: Path) -> None:
    """transformers looks at some of them when a text is read, and not before."""
    path = case / "model/tokenizer_config.json"
    content = json.loads(path.read_text("utf-8"))
    changed = settings if settings == -1 else content | settings
    path.write_text(json.dumps(changed), "utf-8")
    argv = ["ablate", "runs/layer-1", "--heads", "1", "--model", "model", "--prompt", "The fox"]
    assert "tokenizer" in _ends_in_a_line(case, argv)


@pytest.mark.parametrize(
    ("table", "changes"),
    [
        ("corpus", {"n_documents": "many"}),
        ("model", {"id": ["tiny"]}),
        ("tokenizer", {"special_token_ids": 3}),
        (None, {"uuid": 5}),
        (None, {"created": None}),
    ],
)
def test_facts_of_a_store_of_another_kind_are_told(
    table: str | None, changes: dict[str, Any], case: Path
) -> None:
    """`store info` printed them as numbers, and ended in a trace."""
    path = case / "acts/manifest.json"
    content = json.loads(path.read_text("utf-8"))
    (content if table is None else content[table]).update(changes)
    path.write_text(json.dumps(sealed_anew(content)), "utf-8")
    told = _ends_in_a_line(case, ["store", "info", "acts"])
    assert next(iter(changes)) in told
