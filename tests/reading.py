"""An analysis made up by hand, of any size: no store, no model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from lorsa.analyze.choices import BAR, BY, LIST_BAR, LOWER, PROBE_SCORES, STORE_SCORES
from lorsa.analyze.result import write_analysis
from lorsa.analyze.schema import (
    DISTANCES,
    EXAMPLES,
    HEADS,
    LISTED,
    SEQUENCES,
    TESTED_AS_LISTS,
    TOKENS,
    TYPES,
)

N_CTX = 64
WORDS = (" the", " a", "cat", "\n", " sat", " on", "<script>alert(1)</script>", "é", " 東京", "<b>")
"""Texts of the token ids 0..9."""
OF_MODEL = ("promoted", "suppressed", "reads_embedding", "successor")
"""Columns that are null where no language model was given."""


def make_analysis(
    root: Path,
    *,
    n_heads: int = 24,
    n_top: int = 4,
    n_sample: int | None = None,
    n_seq: int = 8,
    n_ctx: int = N_CTX,
    n_sources: int = 3,
    words: Sequence[str] = WORDS,
    with_model: bool = True,
    tested: bool = True,
) -> Path:
    """Write an analysis of a made-up Lorsa; its last head never fired.

    Tokens are drawn by Zipf's law. Without a model, the columns that need one are null. Of what is
    listed the first half is beyond chance; all of it is untested where an earlier version wrote it.
    """
    rng = np.random.default_rng(0)
    chances = 1 / np.arange(1, len(words) + 1)
    tokens = rng.choice(len(words), (n_seq, n_ctx), p=chances / chances.sum())
    examples = [
        _example(rng, head, kind, rank, tokens, n_sources)
        for head in range(n_heads - 1)
        for kind, n in (("top", n_top), ("sample", n_top if n_sample is None else n_sample))
        for rank in range(n)
    ]
    heads = [_head(rng, i, n_heads, len(words)) for i in range(n_heads)]
    if not with_model:
        heads = [row | dict.fromkeys(OF_MODEL) for row in heads]
    for row in heads:
        if tested:
            row |= {f"{name}_z": _z(row.get(name)) for name in LISTED}
            row |= {f"{name}_list_z": row[name] and LIST_BAR for name in TESTED_AS_LISTS}
    tables = {
        "heads": pa.Table.from_pylist(heads, HEADS),
        "examples": pa.Table.from_pylist(examples, EXAMPLES),
        "sequences": pa.Table.from_pylist(
            [{"seq": 3 * i, "tokens": row.tolist()} for i, row in enumerate(tokens)], SEQUENCES
        ),
        "tokens": pa.Table.from_pylist(
            [{"token": i, "text": text} for i, text in enumerate(words)], TOKENS
        ),
    }
    facts = _facts(n_heads, n_seq) | {"n_tokens": n_seq * n_ctx, "n_ctx": n_ctx}
    write_analysis(root, facts | {"with_model": with_model}, tables)
    return root


def _facts(n_heads: int, n_seq: int) -> dict[str, Any]:
    return {
        "run": "runs/layer-1",
        "layer": 1,
        "model": "tiny",
        "store": "acts",
        "store_uuid": "u",
        "n_tokens": n_seq * N_CTX,
        "n_ctx": N_CTX,
        "n_ov_heads": n_heads,
        "n_qk_heads": n_heads // 2,
        "top_k": 8,
        "d_model": 32,
        "with_model": True,
        "fvu": 0.2,
        "l0": 8.0,
    }


def _head(rng: np.random.Generator, head: int, n_heads: int, n_words: int) -> dict[str, Any]:
    silent = head == n_heads - 1
    some = [int(token) for token in rng.permutation(min(n_words, 10_000))[:8]]
    row: dict[str, Any] = {
        "head": head,
        "qk_head": head // 2,
        "type": "silent" if silent else TYPES[head % 8],
        "type_by": None if silent or TYPES[head % 8] == "mixed" else BY[head // 8 % len(BY)],
        "n_fired": 0 if silent else 1 + head,
        "frequency": 0.0 if silent else 10 ** rng.uniform(-5, -1),
        "norm_o": 1.0,
        "norm_v": 2.0,
        "parents": [{"head": p, "ov": 0.9 - 0.3 * p, "qk": 0.8, "pattern": 0.7} for p in range(3)],
        "similar_o": [{"head": (head + i) % n_heads, "cosine": 0.9 / i} for i in (1, 2, 3)],
        "similar_v": [{"head": (head + i) % n_heads, "cosine": 0.8 / i} for i in (1, 2, 3)],
        "promoted": [{"token": t, "logit": 1.0 - 0.1 * i} for i, t in enumerate(some)],
        "suppressed": [{"token": t, "logit": -1.0 + 0.1 * i} for i, t in enumerate(some)],
        "reads_embedding": [{"token": t, "value": 1.0 - 0.1 * i} for i, t in enumerate(some)],
        "probe_fired": 0 if silent else 10,
    }
    if not silent:
        shares = rng.dirichlet(np.ones(len(DISTANCES)))
        row |= {
            "mean_act": 1.5,
            "max_act": float(rng.uniform(2, 9)),
            "act_quantiles": [0.5, 1.0, 1.5, 2.0, 2.5],
            "distance": float(rng.uniform(0, 40)),
            "entropy": float(rng.uniform(0, 4)),
            "by_distance": shares.tolist(),
            "successor": float(rng.uniform()),
            "reads": [{"token": t, "share": 0.2 - 0.02 * i} for i, t in enumerate(some)],
            **{name: float(rng.uniform()) for name in (*STORE_SCORES, *PROBE_SCORES)},
        }
        row |= {low: 0.9 * row[name] for name, low in LOWER.items()}
    return row


def _z(listed: list[dict[str, Any]] | None) -> list[float] | None:
    return (
        None
        if listed is None
        else [2 * BAR - 2 * BAR * i / len(listed) for i in range(len(listed))]
    )


def _example(
    rng: np.random.Generator,
    head: int,
    kind: str,
    rank: int,
    tokens: np.ndarray[Any, Any],
    n_sources: int,
) -> dict[str, Any]:
    n_seq, n_ctx = tokens.shape
    row, position = int(rng.integers(n_seq)), int(rng.integers(n_sources + 1, n_ctx))
    sources = rng.choice(position + 1, size=n_sources, replace=False).tolist()
    acts = [2.0 / (rank + 1), 1.0 / (rank + 1), -0.25]
    acts = [*acts, *rng.normal(0, 0.05, max(0, n_sources - 3)).tolist()][:n_sources]
    return {
        "head": head,
        "kind": kind,
        "rank": rank,
        "quantile": 1.0 if kind == "top" else 1 - (rank + 1) / 5,
        "act": sum(acts) + 0.125,
        "seq": 3 * row,
        "position": position,
        "token": int(tokens[row, position]),
        "document": f"text-{row % 2}.txt",
        "sources": sources,
        "source_acts": acts,
        "rest": 0.125,
    }
