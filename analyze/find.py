"""Search for the heads that are most of a type, in runs or in the language model itself.

Without runs, the heads are those of the language model's own layers, scored on stored text alone.
Their weights are in the store, so a layer can be chosen before anything is trained.
"""

import math
from pathlib import Path

from ..errors import AnalyzeError
from ..evaluate.opened import device_for
from ..sites import Site
from ..store.choices import DEFAULT_STORE
from ..store.places import Place, place
from ..store.read.reader import ActivationStore
from .attention.own import own_types
from .choices import LABEL_FROM, STORE_SCORES
from .found import FoundHead, best_of, find_in_runs
from .type_names import type_named

SCAN_TOKENS = 8192
"""Stored tokens on which the language model's own heads are scored."""


def find_heads(
    kind: str,
    *,
    store: str | Place | None = None,
    runs: list[Path] | None = None,
    layers: list[int] | None = None,
    n: int = 10,
    least: float = LABEL_FROM,
    device: str = "auto",
) -> list[FoundHead]:
    """Return the heads that are most of a type, the best first; none where none is of it.

    Args:
        kind: one of KINDS; previous-token and previous_token are the same.
        store: store whose layers are scanned; with runs, it must be the one they were analysed
            with. None scans the folder "acts", and with runs checks nothing.
        runs: analysed runs; None or none scans the language model's own heads.
        layers: layers to search; None takes all.
        n: heads to return at most.
        least: score from which on a head is of the type; 0 returns the best, whatever they are.
        device: where to compute.

    Raises:
        ValueError: no such type.
        AnalyzeError: a run is not analysed or is of another store, or no head has a score.
        StoreError: the store cannot be read.
    """
    kind = type_named(kind)
    if runs:
        return find_in_runs(kind, runs, store=store, layers=layers, n=n, least=least)
    if kind == "successor":
        raise AnalyzeError("successor is known of analysed Lorsas only: name a run")
    opened = ActivationStore.open(place(DEFAULT_STORE if store is None else store))
    return best_of(kind, _of_model(kind, opened, layers, device), layers, n, least)


def _of_model(
    kind: str, store: ActivationStore, layers: list[int] | None, device: str
) -> list[FoundHead]:
    """Return the score of every attention head of the store's layers."""
    manifest = store.manifest
    seqs = range(min(manifest.n_seq, max(1, SCAN_TOKENS // manifest.n_ctx)))
    column, found = STORE_SCORES.index(kind), []
    for layer in store.layers if layers is None else layers:
        store.require_sites([Site(layer, "attn_in")])
        shares, bounds = own_types(store, layer, seqs, device_for(device))
        told = zip(shares[:, column].tolist(), bounds[:, column].tolist(), strict=True)
        found += [
            FoundHead(
                run=None,
                layer=layer,
                head=head,
                score=bound,
                measured_on="text",
                score_on_text=share,
            )
            for head, (share, bound) in enumerate(told)
            if not math.isnan(bound)
        ]
    return found
