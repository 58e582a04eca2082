"""From tensors to the tables of analyze/schema.py."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from ..dictionaries.lorsa.module import Lorsa
from ..language.norms import in_chunks
from ..language.spelling import token_text
from .attention.kinds import LEAST_FIRED, Reading, label
from .attention.parents import Parents
from .choices import PROBE_SCORES, STORE_SCORES
from .collect import Chosen, Collected
from .effects import Effects, Listed
from .schema import EXAMPLES, HEADS, QUANTILES, SEQUENCES, TOKENS

Array = npt.NDArray[Any]
N_NEIGHBOURS = 8
N_READ = 10
LEAST_SHARE = 0.01
"""Of |act|: smaller contributions go into `rest`."""


def heads_table(
    lorsa: Lorsa,
    found: Collected,
    quantile_acts: Tensor,
    n_tokens: int,
    *,
    reads: list[list[dict[str, Any]]],
    parents: Parents | None,
    probe: Reading | None,
    effects: Effects | None,
    successor: Tensor | None,
) -> pa.Table:
    """Return a row per OV head.

    Args:
        lorsa: whose heads they are.
        found: what was collected.
        quantile_acts: |act| at QUANTILES, NaN where it never fired, [n_ov_heads, quantiles].
        n_tokens: tokens that were looked at.
        reads: source tokens of each head.
        parents, probe, effects, successor: None where they are not known.
    """
    c, reading = lorsa.config, found.reading
    n = reading.n_fired
    shares = reading.shares()
    by_distance = (reading.by_distance / reading.amount[:, None]).numpy()
    columns: dict[str, Any] = {
        "head": np.arange(c.n_ov_heads),
        "qk_head": np.arange(c.n_ov_heads) // (c.n_ov_heads // c.n_qk_heads),
        "type": _labels(shares, n),
        "n_fired": n.long().numpy(),
        "frequency": (n / n_tokens).numpy(),
        "mean_act": _nullable(found.sum_act / n),
        "max_act": _nullable(torch.where(n > 0, found.top.acts[:, 0], torch.nan)),
        "act_quantiles": _lists(quantile_acts.numpy()),
        "norm_o": lorsa.W_O.detach().float().norm(dim=1).cpu().numpy(),
        "norm_v": lorsa.W_V.detach().float().norm(dim=1).cpu().numpy(),
        "distance": _nullable(reading.distance / reading.amount),
        "entropy": _nullable(reading.entropy / reading.amount),
        "by_distance": _lists(by_distance),
        **{name: _nullable(shares[name]) for name in STORE_SCORES},
        "reads": reads,
        "similar_o": _listed(neighbours(lorsa.W_O), "head", "cosine"),
        "similar_v": _listed(neighbours(lorsa.W_V), "head", "cosine"),
    }
    if parents is not None:
        columns["parents"] = _structs(**parents._asdict())
    if probe is not None:
        on_probe, often = probe.shares(), probe.n_fired >= LEAST_FIRED
        columns["probe_fired"] = probe.n_fired.long().numpy()
        for name, theirs in zip(PROBE_SCORES, STORE_SCORES, strict=True):
            columns[name] = _nullable(torch.where(often, on_probe[theirs], torch.nan))
    if effects is not None:
        columns["promoted"] = _listed(effects.promoted, "token", "logit")
        columns["suppressed"] = _listed(effects.suppressed, "token", "logit")
        columns["reads_embedding"] = _listed(effects.reads_embedding, "token", "value")
    if successor is not None:
        columns["successor"] = _nullable(successor)
    arrays = [
        pa.array(columns[field.name], _plain(field.type))
        if field.name in columns
        else pa.nulls(c.n_ov_heads, field.type)
        for field in HEADS
    ]
    return pa.table(arrays, HEADS.names).cast(HEADS)


def examples_table(
    chosen: Chosen,
    sources: tuple[Tensor, Tensor, Tensor],
    seqs: Array,
    tokens: Array,
    documents: Array,
    names: list[str],
) -> pa.Table:
    """Return a row per firing that is shown.

    Args:
        chosen: the firings.
        sources: what `sources_of` returns of them.
        seqs: the sequences that they lie in, ascending, [n_seqs].
        tokens, documents: of these, ids and numbers of documents, [n_seqs, n_ctx].
        names: of the documents by their number.
    """
    positions, parts, total = (each.numpy() for each in sources)
    n_ctx = tokens.shape[1]
    acts, places = chosen.acts.numpy(), chosen.places.numpy()
    seq, position = places // n_ctx, places % n_ctx
    row = np.searchsorted(seqs, seq)
    shown = np.abs(parts) >= np.maximum(LEAST_SHARE * np.abs(acts)[:, None], 1e-30)
    rest = total - np.where(shown, parts, 0).sum(axis=1)
    offsets = np.concatenate([[0], shown.sum(axis=1).cumsum()]).astype(np.int32)

    def ragged(values: Array, kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values[shown], kind))

    return pa.table(
        {
            "head": chosen.heads.numpy(),
            "kind": pa.array(np.where(chosen.is_top.numpy(), "top", "sample")),
            "rank": chosen.ranks.numpy(),
            "quantile": chosen.quantiles.numpy(),
            "act": acts,
            "seq": seq,
            "position": position,
            "token": tokens[row, position],
            "document": pa.array(names).take(pa.array(documents[row, position])),
            "sources": ragged(positions, pa.int32()),
            "source_acts": ragged(parts, pa.float32()),
            "rest": rest,
        }
    ).cast(EXAMPLES)


def sequences_table(seqs: Array, tokens: Array) -> pa.Table:
    """Return the token ids of sequences, [n], [n, n_ctx]."""
    offsets = np.arange(len(seqs) + 1, dtype=np.int32) * tokens.shape[1]
    lists = pa.ListArray.from_arrays(offsets, pa.array(tokens.reshape(-1), pa.int32()))
    return pa.table({"seq": seqs, "tokens": lists}).cast(SEQUENCES)


def tokens_table(tables: list[pa.Table], tokenizer: Any) -> pa.Table:
    """Return the text of every token id that the tables name; null without a tokenizer."""
    ids: set[int] = set()
    for table in tables:
        for name in ("promoted", "suppressed", "reads_embedding", "reads", "tokens"):
            if name in table.column_names:
                values = table[name].combine_chunks().flatten()
                if pa.types.is_struct(values.type):
                    values = values.field("token")
                ids |= set(values.unique().to_pylist())
    known = sorted(ids - {None})
    texts = [None if tokenizer is None else token_text(tokenizer, i) for i in known]
    return pa.table({"token": known, "text": texts}, TOKENS)


def source_tokens(
    chosen: Chosen, sources: tuple[Tensor, Tensor, Tensor], seqs: Array, tokens: Array, n_heads: int
) -> list[list[dict[str, Any]]]:
    """Return the tokens that each head's top examples read most, with their shares."""
    mine = chosen.is_top.numpy()
    n_ctx, n_vocab = tokens.shape[1], int(tokens.max(initial=0)) + 1
    row = np.searchsorted(seqs, chosen.places.numpy()[mine] // n_ctx)
    positions, parts, _total = (each.numpy()[mine] for each in sources)
    read = np.abs(parts).reshape(-1)
    heads = chosen.heads.numpy()[mine]
    keys = heads[:, None] * n_vocab + tokens[row[:, None], positions]
    unique, inverse = np.unique(keys.reshape(-1), return_inverse=True)
    amount = np.bincount(inverse.reshape(-1), weights=read, minlength=len(unique))
    head, token = unique // n_vocab, unique % n_vocab
    per_head = np.bincount(head, weights=amount, minlength=n_heads)
    lists: list[list[dict[str, Any]]] = [[] for _ in range(n_heads)]
    for each in np.lexsort((-amount, head)):
        listed = lists[head[each]]
        if len(listed) < N_READ and amount[each] > 0:
            share = float(amount[each] / per_head[head[each]])
            listed.append({"token": int(token[each]), "share": share})
    return lists


@torch.no_grad()
def neighbours(vectors: Tensor) -> Listed:
    """Return the nearest rows by cosine, the nearest first, each row itself left out."""
    unit = torch.nn.functional.normalize(vectors.detach().float(), dim=1)
    n = min(N_NEIGHBOURS, len(unit) - 1)
    ids, cosines = [], []
    for rows in in_chunks(len(unit), len(unit)):
        likeness = unit[rows] @ unit.T
        itself = torch.arange(rows.start, rows.stop, device=unit.device)
        likeness[torch.arange(len(itself), device=unit.device), itself] = -torch.inf
        found = likeness.topk(n, dim=1)
        ids.append(found.indices.cpu())
        cosines.append(found.values.cpu())
    return torch.cat(ids), torch.cat(cosines)


def quantiles_of(ascending: Tensor) -> Tensor:
    """Return |act| at QUANTILES of rows that are ascending and end in NaN, [n, quantiles]."""
    held = (~ascending.isnan()).sum(dim=1, keepdim=True)
    at = (torch.tensor(QUANTILES) * held).long().clamp(max=ascending.shape[1] - 1)
    return ascending.gather(1, at)


def _labels(shares: dict[str, Tensor], n_fired: Tensor) -> list[str]:
    columns = [shares[name].nan_to_num().tolist() for name in STORE_SCORES]
    return [
        label(dict(zip(STORE_SCORES, row, strict=True)), silent=n == 0)
        for *row, n in zip(*columns, n_fired.tolist(), strict=True)
    ]


def _nullable(values: Tensor) -> pa.Array:
    return pa.array(values.double().numpy(), from_pandas=True)


def _lists(rows: Array) -> list[list[float] | None]:
    return [None if np.isnan(row).any() else row.tolist() for row in rows]


def _listed(listed: Listed, name: str, value: str) -> pa.Array:
    return _structs(**{name: listed[0], value: listed[1]})


def _structs(**columns: Tensor) -> pa.Array:
    """Return a list of structs for each row of [n, width] columns; head and token are ids."""
    names = ["head" if name == "heads" else name for name in columns]
    n, width = next(iter(columns.values())).shape
    arrays = [
        pa.array(
            column.reshape(-1).numpy(), pa.int32() if name in ("head", "token") else pa.float32()
        )
        for name, column in zip(names, columns.values(), strict=True)
    ]
    offsets = np.arange(n + 1, dtype=np.int32) * width
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(arrays, names))


def _plain(kind: pa.DataType) -> pa.DataType | None:
    """Return the type to make an array of; dictionaries are made by a cast."""
    return pa.string() if pa.types.is_dictionary(kind) else kind
