"""Blocks of tokens or features, shared out over threads that each work alone.

An operator of torch on two threads ends when the slower one does, so beside other programs a step
of fifty small operators waits fifty times. Here a thread takes a block through all its operators,
then the next block that nobody has: there is one end to wait for. Blocks are cut the same for any
number of threads, and where each multiplies alone the bits are the same too.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier

import torch
from torch import Tensor

from .torch_select import Scratch

N_WORKERS = 4
"""Threads that take blocks, at most: each has buffers of its own. Further cores help these."""
Work = Callable[[slice, Scratch], None]
"""Computes a block, with buffers that the thread's last block had."""


def each_block(
    n_rows: int, at_once: int, work: Work, like: Tensor, *, buffers: dict[str, int] | None = None
) -> None:
    """Run work on rows 0 to n_rows in blocks, with scratches like a tensor, and wait for the end.

    On a GPU, and with one thread or one block, it runs where it is called. What is allocated here
    others can use later; what a thread allocates only itself can: so large buffers are named, by
    their elements.
    """
    n_threads = torch.get_num_threads()
    n_workers = max(1, min(N_WORKERS, n_threads, -(-n_rows // at_once)))
    n_workers = n_workers if like.device.type == "cpu" else 1
    blocks = iter([slice(row, min(row + at_once, n_rows)) for row in range(0, n_rows, at_once)])
    scratches = [Scratch(like) for _ in range(n_workers)]
    for scratch in scratches:
        for name, n_elements in (buffers or {}).items():
            scratch.take(name, n_elements)
    mode = torch.is_inference_mode_enabled()
    if n_workers == 1:
        _take(blocks, work, scratches[0], mode)
        return
    pool = _pool(n_workers, n_threads)
    for taken in [pool.submit(_take, blocks, work, scratch, mode) for scratch in scratches]:
        taken.result()


def _take(blocks: Iterator[slice], work: Work, scratch: Scratch, inference: bool) -> None:
    """Work on blocks as long as there are any, in the caller's mode without gradients."""
    with torch.inference_mode(inference), torch.no_grad():
        for block in blocks:
            work(block, scratch)


@lru_cache(maxsize=1)
def _pool(n_workers: int, n_threads: int) -> ThreadPoolExecutor:
    """Return threads that share the number of threads that torch may use."""
    ready = Barrier(n_workers + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread's first use of torch sets its number: not after ours
        torch.set_num_threads(n_threads // n_workers)
        ready.wait()

    pool = ThreadPoolExecutor(n_workers, "lorsa-block", initializer=start)
    for _ in range(n_workers):
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(n_threads)  # the threads' setting is also that of threads to come
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has no threads
