"""Traces on disk: written whole, read back, and refused in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from graphs import pair_rows, trace
from lorsa.circuits.tracing.files import (
    EDGES_FILE,
    FACTS,
    GRAPH,
    NODES_FILE,
    PAIRS_FILE,
    read_facts,
    read_trace,
    write_trace,
)
from lorsa.errors import AnalyzeError
from lorsa.seal import SEAL, write_seal
from lorsa.store.parquet import write_parquet
from lorsa.verify import verify_paths


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A whole trace."""
    write_trace(tmp_path / "traces/a", trace())
    return tmp_path / "traces/a"


def test_what_is_written_is_read_back(root: Path) -> None:
    found, wanted = read_trace(root), trace()
    assert found.nodes.equals(wanted.nodes)
    assert found.edges.equals(wanted.edges)
    assert found.pairs is None
    assert {name: found.facts[name] for name in wanted.facts} == wanted.facts
    assert sorted(path.name for path in root.iterdir()) == sorted(
        [FACTS, GRAPH, NODES_FILE, EDGES_FILE, SEAL]
    )
    assert list(root.parent.iterdir()) == [root]


def test_pairs_are_there_if_heads_were_taken_apart(tmp_path: Path) -> None:
    pairs = pair_rows()
    write_trace(tmp_path / "a", trace(pairs=pairs))
    assert read_trace(tmp_path / "a").pairs == pairs
    assert (tmp_path / "a" / PAIRS_FILE).is_file()
    far = pairs.set_column(5, "query_node", pa.array([99] * pairs.num_rows, pa.int32()))
    (tmp_path / "a" / PAIRS_FILE).write_bytes(write_parquet(far))
    write_seal(tmp_path / "a", [FACTS, GRAPH, NODES_FILE, EDGES_FILE, PAIRS_FILE])
    with pytest.raises(AnalyzeError, match="a pair is of no node"):
        read_trace(tmp_path / "a")


def test_rows_sum_to_their_totals_in_the_files(root: Path) -> None:
    found = read_trace(root)
    for row in found.nodes.to_pylist():
        if row["total"] is None:
            assert row["rest_positive"] is None
            continue
        edges = [e for e in found.edges.to_pylist() if e["target"] == row["node"]]
        made = sum(e["weight"] for e in edges) + row["rest_positive"] + row["rest_negative"]
        wanted = {4: 0.5, 7: 1.75, 9: -2.125, 10: 2.0}
        assert made == pytest.approx(wanted[row["node"]])


def test_columns_are_null_where_there_is_nothing_to_say(root: Path) -> None:
    rows = read_trace(root).nodes.to_pylist()
    assert [row["layer"] for row in rows] == [None] * 3 + [0] * 4 + [1] * 2 + [None] * 2
    assert [row["position"] for row in rows] == [0, 1, 2, None, 1, 1, 2, 2, 2, 2, 2]
    assert [row["run"] for row in rows] == [None] * 3 + [0] * 3 + [None, 1, 1, None, None]
    assert [row["feature"] for row in rows][3:9] == [None, 301, None, None, 17, None]
    assert [row["weight"] for row in rows][8:] == [0.0, 0.75, 0.25]


def test_a_name_that_is_taken_is_refused(root: Path) -> None:
    with pytest.raises(AnalyzeError, match="is there already; give --name"):
        write_trace(root, trace())


def _older(root: Path) -> None:
    content = json.loads((root / FACTS).read_text())
    (root / FACTS).write_text(json.dumps({**content, "version": 0}))


def _half(root: Path) -> None:
    (root / FACTS).unlink()


def _partial(root: Path) -> None:
    root.rename(root.with_name(root.name + ".partial"))


def _changed(root: Path) -> None:
    content = (root / EDGES_FILE).read_bytes()
    (root / EDGES_FILE).write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])


def _cut(root: Path) -> None:
    (root / FACTS).write_bytes((root / FACTS).read_bytes()[:99])


def _lacking(root: Path) -> None:
    (root / NODES_FILE).unlink()


def _unsealed(root: Path) -> None:
    (root / SEAL).unlink()


def _downwards(root: Path) -> None:
    """A hand that sealed an edge which leads down."""
    table = read_trace(root).edges
    turned = table.rename_columns(["source", "target", "weight"])
    (root / EDGES_FILE).write_bytes(write_parquet(turned))
    write_seal(root, [FACTS, GRAPH, NODES_FILE, EDGES_FILE])


def _outside(root: Path) -> None:
    table = read_trace(root).edges
    far = table.set_column(1, "source", pa.array([99] * table.num_rows, pa.int32()))
    (root / EDGES_FILE).write_bytes(write_parquet(far))
    write_seal(root, [FACTS, GRAPH, NODES_FILE, EDGES_FILE])


def _gone(root: Path) -> None:
    shutil.rmtree(root)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (_older, "is of version 0; this lorsa reads 1: trace again"),
        (_half, "is half-written: remove it, and trace again"),
        (_partial, "is half-written: remove it, and trace again"),
        (
            _changed,
            r"edges.parquet is damaged .* restore it from a copy, or remove it and trace again",
        ),
        (_cut, "trace.json is damaged; restore it from a copy, or remove it and trace again"),
        (
            _lacking,
            "nodes.parquet is missing; restore it from a copy, or remove it and trace again",
        ),
        (_unsealed, "seal.json is missing; restore it from a copy, or remove it and trace again"),
        (_downwards, "an edge leads down"),
        (_outside, "an edge is of no node"),
        (_gone, "is no trace; make one"),
    ],
)
def test_what_is_not_whole_is_a_line(root: Path, damage: Any, line: str) -> None:
    damage(root)
    with pytest.raises(AnalyzeError, match=line) as found:
        read_trace(root)
    assert "\n" not in str(found.value)
    assert str(root) in str(found.value)


def test_verify_names_what_is_wrong_with_a_trace(root: Path) -> None:
    whole = verify_paths([root.parent])
    assert (whole["ok"], [each["kind"] for each in whole["found"]]) == (True, ["trace"])
    _changed(root)
    (problem,) = verify_paths([root])["problems"]
    assert problem.startswith(f"{root / EDGES_FILE} is damaged")
    _older(root)
    assert not verify_paths([root])["ok"]


def test_facts_alone_are_read_without_the_seal(root: Path) -> None:
    _changed(root)
    assert read_facts(root)["name"] == "a-trace"


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorsa.circuits.tracing.files.write_seal", full)
    with pytest.raises(AnalyzeError, match="cannot be written"):
        write_trace(tmp_path / "traces/a", trace())
    assert list((tmp_path / "traces").iterdir()) == []
