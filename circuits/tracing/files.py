"""Traces on disk: a folder that is written whole, and read back.

    traces/NAME/
      nodes.parquet   nodes that are kept or in pairs, a row each, in the order of the model
      edges.parquet   edges between them, by target, the largest first
      pairs.parquet   pairs of nodes behind attention scores, of the most influential heads
      graph.json      the same graph for circuit-tracer's and Neuronpedia's pages
      trace.json      how it was made: model, dictionaries, prompt, settings, scores
      seal.json       sizes and checksums of all of them

The folder is written under another name and renamed, so one with this name is whole. Of a target

    total = constant + sum of its edges + rest_positive + rest_negative

holds in the files too: what was pruned is in the rest.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...errors import AnalyzeError, unreadable
from ...reading import read_json
from ...seal import SEAL, first_damage, is_sealed, write_seal
from ...store.parquet import read_parquet, write_parquet
from ...whole import json_text, partial_of, whole
from .graph_json import graph_json
from .tables import EDGES, NODES, PAIRS, require_pairs, require_sound

FORMAT = "lorsa-trace"
VERSION = 1
FACTS, GRAPH = "trace.json", "graph.json"
NODES_FILE, EDGES_FILE, PAIRS_FILE = "nodes.parquet", "edges.parquet", "pairs.parquet"

NEEDED = ("name", "lorsa", "model", "prompt", "tokens", "runs", "targets", "settings", "scores")
"""Facts that every trace must have."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trace:
    """A trace, to be written or read back."""

    facts: dict[str, Any]
    """Content of trace.json: how it was made"""
    nodes: pa.Table
    """Table in the schema NODES"""
    edges: pa.Table
    """Table in the schema EDGES, sorted by target"""
    pairs: pa.Table | None = None
    """Table in the schema PAIRS; None where no head was taken apart"""


def write_trace(root: Path, trace: Trace) -> None:
    """Write a trace as a folder, whole or not at all.

    Args:
        root: folder that is not there yet.
        trace: what to write; its format and version are added to the facts.

    Raises:
        AnalyzeError: there is something already, or the disk does not take it.
    """
    if root.exists():
        raise AnalyzeError(f"{root} is there already; give --name, or remove it")
    facts = {"format": FORMAT, "version": VERSION, **trace.facts}
    files: dict[str, bytes] = {
        NODES_FILE: write_parquet(trace.nodes.cast(NODES)),
        EDGES_FILE: write_parquet(trace.edges.cast(EDGES)),
        GRAPH: json_text(graph_json(facts, trace.nodes, trace.edges, trace.pairs)).encode(),
        FACTS: json_text(facts).encode(),
    }
    if trace.pairs is not None:
        files[PAIRS_FILE] = write_parquet(trace.pairs.cast(PAIRS))
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with whole(root) as partial:
            partial.mkdir()
            for name, content in files.items():
                (partial / name).write_bytes(content)
            write_seal(partial, files)
    except OSError as error:
        raise AnalyzeError(
            f"{root} cannot be written ({error.strerror}); make room, or give another --out"
        ) from None


def is_trace(root: Path) -> bool:
    """Return whether a folder is a trace, of any version."""
    return (root / FACTS).is_file()


def read_facts(root: Path) -> dict[str, Any]:
    """Return how a trace was made, without comparing its files.

    Raises:
        AnalyzeError: it is no trace, half of one, damaged, or of another version.
    """
    try:
        if not is_trace(root):
            raise AnalyzeError(_no_trace(root))
        facts = read_json(root / FACTS)
        if facts["format"] != FORMAT:
            raise AnalyzeError(f"{root} is no trace; make one: lorsa trace --prompt TEXT RUN")
        version = facts["version"]
        if version == VERSION:
            _ = [facts[name] for name in NEEDED]
    except OSError as error:
        raise AnalyzeError(unreadable(root, error)) from None
    except (ValueError, KeyError, TypeError):
        raise AnalyzeError(
            f"{root / FACTS} is damaged; restore it from a copy, or remove it and trace again"
        ) from None
    if version != VERSION:
        raise AnalyzeError(
            f"{root} is of version {version!r:.20}; this lorsa reads {VERSION}: trace again"
        )
    return dict(facts)


def read_trace(root: Path) -> Trace:
    """Read a trace, after comparing its files with their seal.

    Raises:
        AnalyzeError: it is no trace, half of one, damaged, or of another version.
    """
    facts = read_facts(root)
    try:
        problem = first_damage(root) if is_sealed(root) else f"{root / SEAL} is missing"
        if problem is not None:
            raise AnalyzeError(f"{problem}; restore it from a copy, or remove it and trace again")
        nodes = read_parquet(root / NODES_FILE, NODES)
        edges = read_parquet(root / EDGES_FILE, EDGES)
        path = root / PAIRS_FILE
        pairs = read_parquet(path, PAIRS) if path.exists() else None
        require_sound(nodes, edges)
        if pairs is not None:
            require_pairs(pairs, nodes.num_rows)
        if any(target["node"] not in range(nodes.num_rows) for target in facts["targets"]):
            raise ValueError("a target is no node")
    except (OSError, MemoryError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise AnalyzeError(unreadable(root, error)) from None
    return Trace(facts=facts, nodes=nodes, edges=edges, pairs=pairs)


def _no_trace(root: Path) -> str:
    """Return the line about a folder without trace.json."""
    if partial_of(root).is_dir() or is_sealed(root) or (root / NODES_FILE).exists():
        return f"{root} is half-written: remove it, and trace again"
    return f"{root} is no trace; make one: lorsa trace --prompt TEXT RUN"
