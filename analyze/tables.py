"""Tables of analyze/schema.py, made of tensors."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..dictionaries.lorsa.module import Lorsa
from ..language.norms import in_chunks
from ..language.spelling import token_text
from .chance import likeness_by_chance, unit
from .collect import Chosen, Firings
from .effects import Effects, Listed
from .schema import EXAMPLES, HEADS, QUANTILES, SEQUENCES, TOKENS

N_NEIGHBOURS = 8
"""Nearest features that are listed of each."""


class Shown(NamedTuple):
    """Sequences that examples lie in."""

    seqs: NDArray[np.int64]
    """Numbers of the sequences in the store, ascending, [n_seqs]"""
    tokens: NDArray[Any]
    """Token ids, [n_seqs, n_ctx]"""
    documents: NDArray[Any]
    """Numbers of the tokens' documents, [n_seqs, n_ctx]"""

    def find(self, places: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return rows and positions of tokens by their numbers, [n] each."""
        n_ctx = self.tokens.shape[1]
        return np.searchsorted(self.seqs, places // n_ctx), places % n_ctx


def heads_table(columns: dict[str, Any]) -> pa.Table:
    """Return a row per feature; columns that are not given are null.

    Args:
        columns: arrays by the names of HEADS; "head" is among them.
    """
    n = len(columns["head"])
    arrays = [
        pa.array(columns[field.name], _plain(field.type))
        if field.name in columns
        else pa.nulls(n, field.type)
        for field in HEADS
    ]
    return pa.table(arrays, HEADS.names).cast(HEADS)


def firing_columns(found: Firings, quantile_acts: Tensor, n_tokens: int) -> dict[str, Any]:
    """Return the columns of heads.parquet that are of firings.

    Args:
        found: what was collected.
        quantile_acts: |act| at QUANTILES, NaN where it never fired, [n_features, quantiles].
        n_tokens: tokens of the pass.
    """
    n = found.n_fired
    return {
        "head": np.arange(len(n)),
        "n_fired": n.long().numpy(),
        "frequency": (n / n_tokens).numpy(),
        "mean_act": nullable(found.mean_acts),
        "max_act": nullable(torch.where(n > 0, found.top.acts[:, 0], torch.nan)),
        "act_quantiles": lists(quantile_acts.numpy()),
    }


def direction_columns(lorsa: Lorsa) -> dict[str, Any]:
    """Return the columns of heads.parquet that are of the directions read and written."""
    return {
        "norm_o": lorsa.W_O.detach().float().norm(dim=1).cpu().numpy(),
        "norm_v": lorsa.W_V.detach().float().norm(dim=1).cpu().numpy(),
        **_listed("similar_o", neighbours(lorsa.W_O), "head", "cosine"),
        **_listed("similar_v", neighbours(lorsa.W_V), "head", "cosine"),
    }


def effect_columns(effects: Effects) -> dict[str, Any]:
    """Return the columns of heads.parquet that are of the language model's own maps."""
    return {
        **_listed("promoted", effects.promoted, "token", "logit"),
        **_listed("suppressed", effects.suppressed, "token", "logit"),
        **_listed("reads_embedding", effects.reads_embedding, "token", "value"),
    }


def examples_table(
    chosen: Chosen, shown: Shown, names: list[str], by_kind: dict[str, Any]
) -> pa.Table:
    """Return a row per firing that is shown.

    Args:
        chosen: the firings.
        shown: the sequences that they lie in.
        names: of the documents by their number.
        by_kind: further columns, by their names in EXAMPLES.
    """
    places = chosen.places.numpy()
    row, position = shown.find(places)
    columns = {
        "head": chosen.features.numpy(),
        "kind": pa.array(np.where(chosen.is_top.numpy(), "top", "sample")),
        "rank": chosen.ranks.numpy(),
        "quantile": chosen.quantiles.numpy(),
        "act": chosen.acts.numpy(),
        "seq": places // shown.tokens.shape[1],
        "position": position,
        "token": shown.tokens[row, position],
        "document": pa.array(names).take(pa.array(shown.documents[row, position])),
        **by_kind,
    }
    return pa.table({name: columns[name] for name in EXAMPLES.names}).cast(EXAMPLES)


def sequences_table(shown: Shown) -> pa.Table:
    """Return a row per sequence, with its token ids."""
    n_seqs, n_ctx = shown.tokens.shape
    offsets = np.arange(n_seqs + 1, dtype=np.int32) * n_ctx
    ids = pa.array(shown.tokens.reshape(-1), pa.int32())
    tokens = pa.ListArray.from_arrays(offsets, ids)
    return pa.table({"seq": shown.seqs, "tokens": tokens}).cast(SEQUENCES)


def tokens_table(tables: list[pa.Table], tokenizer: Any) -> pa.Table:
    """Return a row per token id that the tables name, with its text; null without a tokenizer."""
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


@torch.no_grad()
def neighbours(vectors: Tensor) -> Listed:
    """Return the nearest rows by cosine, the nearest first, each row itself left out.

    The z of a pair is that of the head whose directions are the more often met.
    """
    directions = unit(vectors)
    n = min(N_NEIGHBOURS, len(directions) - 1)
    step = next(in_chunks(len(directions), len(directions))).stop
    chance = likeness_by_chance(directions, step)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows in in_chunks(len(directions), len(directions)):
        likeness = directions[rows] @ directions.T
        likeness[:, rows].fill_diagonal_(-torch.inf)
        cosines, ids = likeness.topk(n, dim=1)
        z = cosines / torch.maximum(chance[ids], chance[rows, None])
        found.append((ids.cpu(), cosines.cpu(), z.cpu()))
    return Listed(*map(torch.cat, zip(*found, strict=True)))


def quantiles_of(ascending: Tensor) -> Tensor:
    """Return |act| at QUANTILES of rows that are ascending and end in NaN, [n, quantiles]."""
    held = (~ascending.isnan()).sum(dim=1, keepdim=True)
    at = (torch.tensor(QUANTILES) * held).long().clamp(max=ascending.shape[1] - 1)
    return ascending.gather(1, at)


def nullable(values: Tensor) -> pa.Array:
    """Return [n] values as a column, NaN as null."""
    return pa.array(values.double().numpy(), from_pandas=True)


def lists(rows: NDArray[Any]) -> list[list[float] | None]:
    """Return [n, width] values as a column of lists; null where any is NaN."""
    return [None if np.isnan(row).any() else row.tolist() for row in rows]


def _listed(column: str, listed: Listed, name: str, value: str) -> dict[str, Any]:
    """Return the column of what is listed of each feature, and those of z."""
    found = {
        column: structs(**{name: listed.ids, value: listed.values}),
        f"{column}_z": lists(listed.z.numpy()),
    }
    return found | ({} if listed.list_z is None else {f"{column}_list_z": listed.list_z.numpy()})


def structs(**columns: Tensor) -> pa.Array:
    """Return [n, width] tensors as a column of lists of structs; "head" and "token" are ids."""
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
