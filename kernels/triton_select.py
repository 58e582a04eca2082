"""Exact top_k of rows in Triton: one kernel, run once or twice."""

from typing import Any

import torch
import triton
from torch import Tensor

from . import torch_select, triton_kernels

SELECT_TILE = 8192
"""Entries of a row that one program ranks."""
ROWS_TILE = 2048
"""Entries that one program ranks at most where rows are shorter: several rows of them."""
SELECT_MERGED = 16384
"""Candidates of a row that the second round ranks at most."""


def select_top_k(
    z_pre: Tensor, w_o_norm: Tensor, *, top_k: int, select: str
) -> tuple[Tensor, Tensor]:
    """Do what `reference.select_top_k` does, for z_pre [rows, n_ov_heads] in fp32, read once.

    Long rows are ranked in tiles, then the tiles' candidates among each other. Where those are too
    many, which takes an unusually large top_k, torch ranks.
    """
    n_entries = z_pre.shape[1]
    tile = min(SELECT_TILE, triton.next_power_of_2(n_entries))
    n_tiles = triton.cdiv(n_entries, tile)
    kept = min(top_k, tile)
    if n_tiles > 1 and n_tiles * kept > SELECT_MERGED:
        return torch_select.select_top_k(z_pre, w_o_norm, top_k=top_k, select=select)
    acts, ids = _select(z_pre, None, w_o_norm, top_k=kept, select=select, tile=tile)
    if n_tiles > 1:
        width = triton.next_power_of_2(acts.shape[1])
        acts, ids = _select(acts, ids, w_o_norm, top_k=top_k, select=select, tile=width)
    return acts, ids


def selection_constants(tile: int, select: str) -> dict[str, Any]:
    """Return the constants of the kernel for tiles of so many entries."""
    return {
        "SELECT": select,
        "ROWS": max(1, ROWS_TILE // tile),
        "BLOCK": tile,
        "num_warps": 8 if tile >= 4096 else 4,
    }


def _select(
    z: Tensor, ids: Tensor | None, norm: Tensor, *, top_k: int, select: str, tile: int
) -> tuple[Tensor, Tensor]:
    """Keep the top_k of every tile of every row, [rows, n_tiles * top_k] each."""
    n_rows, n_entries = z.shape
    n_tiles = triton.cdiv(n_entries, tile)
    kept_acts = z.new_zeros(n_rows, n_tiles * top_k)
    kept_ids = torch.full_like(kept_acts, -1, dtype=torch.int32)
    constants = selection_constants(tile, select)
    triton_kernels.select_kernel[triton.cdiv(n_rows, constants["ROWS"]), n_tiles](
        z,
        ids,
        norm,
        kept_acts,
        kept_ids,
        n_rows,
        n_entries,
        n_tiles,
        top_k,
        **constants,
    )
    return kept_acts, kept_ids
