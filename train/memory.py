"""What a run needs of a device's memory, and what there is."""

import math
import os

import psutil
import torch

from ..dictionaries.lorsa.config import LorsaConfig, parameter_shapes
from ..errors import TrainError
from .extent import Extent

SPARE = 0.92
"""Share of the free memory that runs may take: allocators keep some."""
SHARED_BYTES = 300_000_000
"""What a process takes besides its runs: batches read ahead, kernels' scratch."""


def n_params(shape: LorsaConfig) -> int:
    """Return the parameters of a Lorsa."""
    return sum(math.prod(sizes) for sizes in parameter_shapes(shape).values())


def run_bytes(shape: LorsaConfig, span: Extent, world: int) -> int:
    """Return about how many bytes a run needs on a device: its state and a forward and backward.

    Args:
        shape: of the Lorsa.
        span: of the run.
        world: processes that share each step.
    """
    n_seqs = -(-span.batch_seqs // (world * span.n_micro))
    tokens = n_seqs * (span.step_tokens // span.batch_seqs)
    queries_keys = 2 * shape.n_qk_heads * shape.d_qk_head
    # made, rotated, and their gradients; v and its gradient; x, y, y_hat and theirs
    width = 5 * queries_keys + 3 * shape.n_ov_heads + 6 * shape.d_model + 8 * shape.n_slots
    return int(span.state_bytes * n_params(shape)) + 4 * tokens * width


def free_bytes(device: torch.device) -> int:
    """Return the memory of a device that nobody uses; of a CPU's, this process's share."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # they share it
    return int(psutil.virtual_memory().available) // n_here


def require_room(shape: LorsaConfig, span: Extent, *, world: int, free: int) -> None:
    """Raise TrainError if a run does not fit, saying what does.

    Args:
        shape, span, world: as in `run_bytes`.
        free: bytes.
    """
    needed = run_bytes(shape, span, world) + SHARED_BYTES
    if needed <= free * SPARE:
        return
    raise TrainError(
        f"a run with {shape.n_ov_heads:,} OV heads and {shape.n_qk_heads} QK heads needs about "
        f"{needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; "
        f"{_what_fits(shape, span, world, free)}"
    )


def _what_fits(shape: LorsaConfig, span: Extent, world: int, free: int) -> str:
    n_ctx = span.step_tokens // span.batch_seqs
    room = free * SPARE - SHARED_BYTES
    least = span._replace(n_micro=-(-span.batch_seqs // world))
    if run_bytes(shape, least, world) <= room:
        n_seqs = 1
        while run_bytes(shape, _in_parts_of(span, 2 * n_seqs, world), world) <= room:
            n_seqs *= 2
        return f"what fits: --micro-batch-tokens {n_seqs * n_ctx}"
    n_ov_heads = shape.n_ov_heads
    while n_ov_heads > shape.n_qk_heads:
        n_ov_heads = n_ov_heads // 2 // shape.n_qk_heads * shape.n_qk_heads
        smaller = _with_heads(shape, n_ov_heads)
        if smaller is not None and run_bytes(smaller, least, world) <= room:
            return f"what fits: --n-ov-heads {n_ov_heads} --micro-batch-tokens {n_ctx}"
    return "nothing smaller fits either; free some memory"


def _in_parts_of(span: Extent, n_seqs: int, world: int) -> Extent:
    return span._replace(n_micro=max(1, -(-span.batch_seqs // world) // n_seqs))


def _with_heads(shape: LorsaConfig, n_ov_heads: int) -> LorsaConfig | None:
    try:
        return LorsaConfig.from_dict(shape.to_dict() | {"n_ov_heads": n_ov_heads})
    except ValueError:
        return None
