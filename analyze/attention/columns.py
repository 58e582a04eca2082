"""Columns of the table of features that Lorsas alone have: sources, types, parents."""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...evaluate.opened import Opened
from ...language.attention import LayerWeights
from ...language.blocks import AttentionSite
from ...language.capture import Capture
from ...language.geometry import AttentionGeometry
from ...progress import Measured, Report
from ..collect import BATCH_TOKENS, Chosen, sources_of
from .parents import Parents, find_parents

N_SOURCES = 16
"""Sources of a firing that are listed at most."""


PARENT_TOKENS = 4096
"""Tokens on which attention patterns are compared."""


def where_from(
    opened: Opened, seqs: list[int], chosen: Chosen, report: Report
) -> tuple[tuple[Tensor, Tensor, Tensor], Any, Any, Any]:
    """Return the sources of the chosen firings; their sequences, with tokens and documents."""
    lorsa, store = opened.lorsa, opened.store
    n_ctx = store.manifest.n_ctx
    began = time.perf_counter()

    def read(rows: list[int]) -> Tensor:
        which = [seqs[row] for row in rows]
        return store.inputs(opened.layer, which).to(lorsa.W_V.device).float()

    def told(done: int, n: int) -> None:
        rate = done * n_ctx / (time.perf_counter() - began)
        report(Measured(done * n_ctx, n * n_ctx, "sources of examples", rate))

    sources = sources_of(
        lorsa,
        chosen,
        read,
        n_ctx=n_ctx,
        n_sources=N_SOURCES,
        batch_seqs=max(1, BATCH_TOKENS // n_ctx),
        report=told,
    )
    shown = np.unique(chosen.places.numpy() // n_ctx)
    if len(shown) == 0:  # no head fires: one sequence, so that the tables have their shape
        shown = np.zeros(1, np.int64)
    which = [seqs[i] for i in shown]
    return sources, shown, store.tokens(which).numpy(), store.documents(which).numpy()


def parents_of(opened: Opened, seqs: list[int], report: Report) -> Parents | None:
    """Return the parents of all heads; None of a layer whose weights are not known."""
    lorsa, store, layer = opened.lorsa, opened.store, opened.layer
    facts = store.manifest.layers[layer].get("geometry")
    weights = store.weights(layer)
    if not facts or not {"W_Q", "W_K", "W_V", "W_O"} <= weights.keys():
        return None
    report("comparing with the layer's own heads")
    device = lorsa.W_V.device
    some = seqs[: max(1, PARENT_TOKENS // store.manifest.n_ctx)]
    xs = (store.inputs(layer, [seq]).to(device) for seq in some)
    own = LayerWeights(**weights).to(device, torch.float32)
    return find_parents(lorsa, own, AttentionGeometry.from_dict(facts), xs)


def at_words(model: Any, site: AttentionSite, ids: list[int], bos: int | None) -> Tensor:
    """Return the layer's input at each word, after BOS or another word, [n_words, d_model]."""
    rows = [[ids[i - 1] if bos is None else bos, word] for i, word in enumerate(ids)]
    with Capture(model, [site]) as capture:
        x, _y = capture.run(torch.tensor(rows))[site.layer]
    return x[:, 1].float()
