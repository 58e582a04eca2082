"""Exact top_k of rows on the torch path, and the buffers that are used again for it."""

import math

import torch
from torch import Tensor

from . import reference


class Scratch:
    """Buffers that are used again and again: new memory costs more than what is done with it."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a contiguous tensor; what was taken under this name before is overwritten."""
        n_elements = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < n_elements:
            buffer = self._buffers[name] = self._like.new_empty(n_elements)
        return buffer[:n_elements].view(shape)


def select_top_k(
    z_pre: Tensor, w_o_norm: Tensor, *, top_k: int, select: str, scratch: Scratch | None = None
) -> tuple[Tensor, Tensor]:
    """Do what `reference.select_top_k` does, for z_pre [rows, n_ov_heads].

    A row is cut into columns of a few entries each. Its top_k lie in the top_k columns by maximum,
    so only the entries of these are ranked. torch.topk breaks ties as it likes; a row where that
    could matter, or with NaN among what is kept, is ranked again by the definition.
    """
    n_rows, n_entries = z_pre.shape
    scratch = Scratch(z_pre) if scratch is None else scratch
    depth = max(1, round(math.sqrt(n_entries / top_k)))  # leaves the fewest to rank
    n_columns = -(-n_entries // depth)
    padded = scratch.take("score", n_rows, depth * n_columns)
    score = padded[:, :n_entries]
    torch.mul(z_pre, w_o_norm, out=score)
    score = score.relu_() if select == "relu" else score.abs_()
    padded[:, n_entries:] = -1  # below every score
    ids, tied = _largest(padded.view(n_rows, depth, n_columns), top_k)
    if tied.any():
        ranked = reference.select_top_k(z_pre[tied], w_o_norm, top_k=top_k, select=select)
        ids[tied] = ranked[1].long()
    ids = ids.sort(dim=1).values
    acts = z_pre.gather(1, ids)
    return (acts.relu_() if select == "relu" else acts), ids.int()


def _largest(score: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Find the largest scores of rows [rows, depth, n_columns].

    Returns:
        Their places, [rows, top_k], and whether another equals the smallest of them, [rows].
    """
    n_rows, depth, n_columns = score.shape
    tops = score.amax(dim=1)  # [rows, n_columns]
    columns = tops.topk(top_k, dim=1, sorted=False)
    place = torch.arange(depth, device=score.device)[:, None] * n_columns
    candidates = (columns.indices[:, None] + place).view(n_rows, -1)  # [rows, depth * top_k]
    values = score.view(n_rows, -1).gather(1, candidates)
    kept = values.topk(top_k, dim=1, sorted=False)
    least = kept.values.amin(dim=1, keepdim=True)
    within = (values >= least).sum(dim=1) > top_k
    beyond = (tops >= least).sum(dim=1) > (columns.values >= least).sum(dim=1)
    return candidates.gather(1, kept.indices), within | beyond | least[:, 0].isnan()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what is computed in: float64 of float64, float32 of all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
