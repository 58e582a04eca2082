"""Search for the heads that are most of a type, with evidence.

Scores of analysed Lorsas are those of heads.parquet: on probes where the language model was given,
for there nothing matches by chance, else on text. Without runs, the heads are those of the language
model's own layers, scored on stored text in the same way. Their weights are in the store, so a
layer can be chosen before anything is trained.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..dictionaries.lorsa.contributions import BLOCK_ELEMENTS, patterns_of
from ..errors import AnalyzeError
from ..evaluate.opened import device_for
from ..language.attention import LayerWeights
from ..language.geometry import AttentionGeometry
from ..language.norms import in_chunks
from ..language.spelling import printable
from ..store.choices import DEFAULT_STORE
from ..store.places import Place, place
from ..store.read.reader import ActivationStore
from .attention.kinds import LEAST_FIRED, N_KINDS, kinds
from .attention.parents import layer_queries_keys
from .choices import STORE_SCORES
from .result import Analysis

SCORES = (*STORE_SCORES, "successor")
"""Types that can be searched for."""
SCAN_TOKENS = 8192
"""Stored tokens on which the language model's own heads are scored."""
WINDOW = 6
"""Tokens shown before and after a source or a firing token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundHead:
    """One head that is much of a type."""

    run: str | None
    """Run of the Lorsa; None for a head of the language model itself."""
    layer: int
    head: int
    """OV head of the Lorsa, or attention head of the language model."""
    score: float
    """Share of its reading that is of the type, 0..1."""
    measured_on: str
    """"probe" or "text"."""
    score_on_text: float | None
    """Score on stored text."""
    frequency: float | None = None
    """Share of tokens on which it fires; None for the language model's heads, which always do."""
    evidence: list[str] | None = None
    """Top examples: source tokens in [], the firing token in <>."""


def find_heads(
    kind: str,
    *,
    store: str | Place | None = None,
    runs: list[Path] | None = None,
    layers: list[int] | None = None,
    n: int = 10,
    device: str = "auto",
) -> list[FoundHead]:
    """Return the heads that are most of a type, the best first.

    Args:
        kind: one of SCORES.
        store: store whose layers are scanned; with runs, it must be the one they were analysed
            with. None scans the folder "acts", and with runs checks nothing.
        runs: analysed runs; None or none scans the language model's own heads.
        layers: layers to search; None takes all.
        n: heads to return at most.
        device: where to compute.

    Raises:
        ValueError: no such type.
        AnalyzeError: a run is not analysed or is of another store, or no head has a score.
        StoreError: the store cannot be read.
    """
    if kind not in SCORES:
        raise ValueError(f"type is {kind!r}; allowed: {', '.join(SCORES)}")
    if runs:
        theirs = None if store is None else ActivationStore.open(place(store))
        found = [each for run in runs for each in _of_run(kind, run, theirs, n)]
    elif kind == "successor":
        raise AnalyzeError("successor is known of analysed Lorsas only: name a run")
    else:
        opened = ActivationStore.open(place(DEFAULT_STORE if store is None else store))
        found = _of_model(kind, opened, layers, device)
    chosen = [each for each in found if layers is None or each.layer in layers]
    if not chosen:
        raise AnalyzeError(
            f"no head here has a score of {kind}: it takes {LEAST_FIRED} firings, on tokens that "
            "have such sources; analyze more --tokens, or name other --layers"
        )
    return sorted(chosen, key=lambda each: -each.score)[:n]


def _of_run(kind: str, run: Path, store: ActivationStore | None, n: int) -> list[FoundHead]:
    """Return the best heads of an analysed run."""
    analysis = Analysis.open(run)
    if store is not None and analysis.facts["store_uuid"] != store.manifest.uuid:
        raise AnalyzeError(f"{run} was analysed with another store, {analysis.facts['store']}")
    heads = analysis.heads
    on_probe = f"probe_{kind}" in heads.column_names and analysis.facts["with_model"]
    name, fired = (f"probe_{kind}", "probe_fired") if on_probe else (kind, "n_fired")
    score = heads[name].to_numpy()
    if kind == "successor" and not analysis.facts["with_model"]:
        raise AnalyzeError(f"{run} has no {kind} scores: analyze it again with --model")
    score = np.where(heads[fired].to_numpy() >= LEAST_FIRED, score, np.nan)
    ranked = np.argsort(-score, kind="stable")  # NaN comes last
    best = [int(head) for head in ranked[:n] if not np.isnan(score[head])]
    rows = [analysis.head(head) for head in best]
    return [
        FoundHead(
            run=str(run),
            layer=analysis.facts["layer"],
            head=row["head"],
            score=row[name],
            measured_on="probe" if on_probe else "text",
            score_on_text=row[kind],
            frequency=row["frequency"],
            evidence=[in_words(analysis, each) for each in _shown(analysis, row["head"])],
        )
        for row in rows
    ]


def _shown(analysis: Analysis, head: int) -> list[dict[str, Any]]:
    """Return three examples of a head; position 0, which can only read itself, comes last."""
    return sorted(analysis.examples(head), key=lambda example: example["position"] == 0)[:3]


def in_words(analysis: Analysis, example: dict[str, Any]) -> str:
    """Return an example in a line: source tokens in [], the firing token in <>, in their context.

    The two sources with the largest contributions are marked.

    Args:
        analysis: that the example is of.
        example: row of examples.parquet.
    """
    at = example["position"]
    sources = set(example["sources"][:2])
    shown = {i for s in {at, *sources} for i in range(s - WINDOW, s + 3)}
    line, last = "", None
    for places, text in analysis.passage(example["seq"]):
        if shown.isdisjoint(places):
            continue
        token = printable(text)
        token = token if sources.isdisjoint(places) else f"[{token}]"
        token = f"<{token}>" if at in places else token
        line += (" … " if last not in (None, places.start) else "") + token
        last = places.stop
    return line


def _of_model(
    kind: str, store: ActivationStore, layers: list[int] | None, device: str
) -> list[FoundHead]:
    """Return the score of every attention head of the store's layers."""
    manifest = store.manifest
    seqs = range(min(manifest.n_seq, max(1, SCAN_TOKENS // manifest.n_ctx)))
    tokens = store.tokens(list(seqs)).long()
    found = []
    for layer in store.layers if layers is None else layers:
        store.require_layer(layer)
        scores = _scan(store, layer, list(seqs), tokens, device_for(device))
        column = STORE_SCORES.index(kind)
        found += [
            FoundHead(
                run=None,
                layer=layer,
                head=head,
                score=float(row[column]),
                measured_on="text",
                score_on_text=float(row[column]),
            )
            for head, row in enumerate(scores)
        ]
    return found


@torch.no_grad()
def _scan(
    store: ActivationStore, layer: int, seqs: list[int], tokens: Tensor, device: str
) -> Tensor:
    """Return what share of ||P v|| each head of a layer reads from each kind, [n_heads, kinds]."""
    facts, weights = store.manifest.layers[layer].get("geometry"), store.weights(layer)
    if not facts or "W_Q" not in weights:
        raise AnalyzeError(f"layer {layer}: its attention is not known, so there are no patterns")
    own = LayerWeights(**weights).to(device, torch.float32)
    g = AttentionGeometry.from_dict(facts)
    by_kind = torch.zeros(g.n_heads, N_KINDS, dtype=torch.float64, device=device)
    offered = torch.zeros_like(by_kind)
    for number, ids in zip(seqs, tokens.to(device).split(1), strict=True):
        x = store.inputs(layer, [number]).to(device).float()
        values = torch.einsum("bsd,hdr->bhsr", x, own.W_V)
        if own.b_V is not None:
            values = values + own.b_V[None, :, None]
        lengths = values.norm(dim=-1).repeat_interleave(g.n_heads // g.n_kv_heads, dim=1)
        q, k = layer_queries_keys(x, own, g)
        seq = x.shape[1]
        for rows in in_chunks(seq, max(g.n_heads, N_KINDS) * seq, BLOCK_ELEMENTS):
            length = lengths[0, :, None, : rows.stop]
            read = patterns_of(g, q, k, rows)[0] * length  # [n_heads, t, s]
            kind = kinds(ids[:, : rows.stop], rows, g.window)[0].float()  # [t, s, kinds]
            by_kind += torch.einsum("hts,tsk->hk", read, kind).double()
            offered += torch.einsum("hts,tk->hk", read, kind.amax(dim=1)).double()
    return (by_kind / offered).nan_to_num().cpu()
