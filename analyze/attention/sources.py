"""Sources of the firings that an analysis shows: where heads read, and which tokens."""

import time
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...dictionaries.lorsa.module import contributions_at
from ...evaluate.opened import Opened
from ...language.stored import site_reader
from ...progress import Measured, Report
from ...sites import Site
from ..chance import FEWEST_OTHERS, share_scores
from ..collect import READ_TOKENS, Chosen
from ..tables import Shown

N_SOURCES = 16
"""Sources of a firing that are listed at most."""
LEAST_SHARE = 0.01
"""Share of |act| below which a contribution goes into `rest`."""
N_READ = 10
"""Source tokens of a head that are listed at most."""


class Sources(NamedTuple):
    """Sources of n firings with the largest |P v|, the largest first."""

    positions: Tensor
    """Positions in the firing's sequence, int64, [n, n_sources]"""
    parts: Tensor
    """Contributions P v, [n, n_sources]"""
    total: Tensor
    """Sums of the contributions of all sources, [n]"""


def find_sources(opened: Opened, chosen: Chosen, report: Report) -> Sources:
    """Return the sources of firings.

    Args:
        opened: the Lorsa and its store.
        chosen: the firings.
        report: called with `Measured`.
    """
    lorsa, store = opened.lorsa, opened.store
    n_ctx, device = store.manifest.n_ctx, lorsa.W_V.device
    seqs, which = (chosen.places // n_ctx).unique(return_inverse=True)
    order = which.argsort(stable=True)
    bounds = torch.searchsorted(which[order], torch.arange(len(seqs) + 1))
    n = len(which)
    positions = torch.zeros(n, min(N_SOURCES, n_ctx), dtype=torch.int64)
    parts, total = torch.zeros(positions.shape), torch.zeros(n)
    step = max(1, READ_TOKENS // n_ctx)
    read = site_reader(store, Site(opened.layer, "attn_in"), device)
    began = time.perf_counter()
    for start in range(0, len(seqs), step):
        stop = min(start + step, len(seqs))
        mine = order[bounds[start] : bounds[stop]]
        some = seqs[start:stop].tolist()
        x = read(some)
        where = (which[mine] - start, chosen.places[mine] % n_ctx, chosen.features[mine])
        all_parts = contributions_at(lorsa, x, *(each.to(device) for each in where)).float().cpu()
        positions[mine] = all_parts.abs().topk(positions.shape[1], dim=1).indices
        parts[mine] = all_parts.gather(1, positions[mine])
        total[mine] = all_parts.sum(dim=1)
        rate = stop * n_ctx / (time.perf_counter() - began)
        report(Measured(stop * n_ctx, len(seqs) * n_ctx, "sources of examples", rate))
    return Sources(positions, parts, total)


def source_columns(chosen: Chosen, sources: Sources) -> dict[str, Any]:
    """Return the columns of examples.parquet that are of sources."""
    positions, parts, total = (each.numpy() for each in sources)
    least = np.maximum(LEAST_SHARE * np.abs(chosen.acts.numpy())[:, None], 1e-30)
    listed = np.abs(parts) >= least
    offsets = np.concatenate([[0], listed.sum(axis=1).cumsum()]).astype(np.int32)

    def ragged(values: Any, kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values[listed], kind))

    return {
        "sources": ragged(positions, pa.int32()),
        "source_acts": ragged(parts, pa.float32()),
        "rest": total - np.where(listed, parts, 0).sum(axis=1),
    }


def source_tokens(
    chosen: Chosen, sources: Sources, shown: Shown, n_heads: int
) -> tuple[list[list[dict[str, Any]]], list[list[float]]]:
    """Return the tokens that each head's top examples read most, with their shares; and their z.

    The z is that of the mean share of the examples, where a token is expected as often as it
    stands in the text, or as all heads read it, whichever is more.
    """
    mine = chosen.is_top.numpy()
    n_vocab = int(shown.tokens.max(initial=0)) + 1
    row, _position = shown.find(chosen.places.numpy()[mine])
    positions, parts, _total = (each.numpy()[mine] for each in sources)
    read = np.abs(parts).astype(np.float64)
    heads = chosen.features.numpy()[mine]
    keys = heads[:, None] * n_vocab + shown.tokens[row[:, None], positions]
    unique, inverse = np.unique(keys.reshape(-1), return_inverse=True)

    def summed(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        flat = inverse.reshape(-1), weights.reshape(-1)
        return np.bincount(*flat, minlength=len(unique)).astype(np.float64)

    amount = summed(read)
    head, token = unique // n_vocab, unique % n_vocab
    per_head = np.bincount(head, weights=amount, minlength=n_heads)
    n = np.bincount(heads, minlength=n_heads)
    mean = summed(read / read.sum(axis=1, keepdims=True).clip(1e-30)) / n[head].clip(1)
    in_text = np.bincount(shown.tokens.reshape(-1), minlength=n_vocab) / max(shown.tokens.size, 1)
    n_firing = int(np.count_nonzero(n))
    by_heads = np.bincount(token, weights=mean, minlength=n_vocab) / max(n_firing, 1)
    some = n_firing >= FEWEST_OTHERS
    z = share_scores(mean, (np.maximum(in_text, by_heads) if some else in_text)[token], n[head])
    lists: list[list[dict[str, Any]]] = [[] for _ in range(n_heads)]
    scores: list[list[float]] = [[] for _ in range(n_heads)]
    for each in np.lexsort((-amount, head)):
        listed = lists[head[each]]
        if len(listed) < N_READ and amount[each] > 0:
            share = float(amount[each] / per_head[head[each]])
            listed.append({"token": int(token[each]), "share": share})
            scores[head[each]].append(float(z[each]))
    return lists, scores
