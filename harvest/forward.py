"""Size of a forward pass: the sequences asked for, or as many as the GPU's memory holds."""

import gc
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..language.capture import Capture

GPU_TOKENS = 32_768
"""Tokens of a first forward pass on a GPU: enough for its arithmetic to be the limit."""
CPU_TOKENS = 2_048
"""Tokens of a forward pass on a CPU; more only leave its caches."""

Result = TypeVar("Result")


class BatchSize:
    """Sequences of a forward pass; halved when the GPU's memory is full, unless it was given.

    The size changes how a matrix product adds up, so the last bit of what is stored may depend on
    it.
    """

    def __init__(self, asked: int | None, *, n_ctx: int, device: str, most: int) -> None:
        """Begin with what was asked for, or with a size that suits the device.

        Args:
            asked: sequences that were asked for; None: chosen here.
            n_ctx: tokens in a sequence.
            device: where the model runs.
            most: sequences that the writer's buffer takes.
        """
        tokens = CPU_TOKENS if device == "cpu" else GPU_TOKENS
        found = 1 << (max(1, tokens // n_ctx).bit_length() - 1)  # shards are powers of two as well
        self.seqs = min(asked or found, most)
        self._asked = asked is not None

    def fitting(self, work: Callable[[int], Result], report: Callable[[str], None]) -> Result:
        """Return what work returns for the size, halved as long as the GPU's memory is full.

        Args:
            work: is called with the number of sequences, again for each smaller one.
            report: is called with a line for each halving.

        Raises:
            torch.OutOfMemoryError: not even one sequence fits, or not the size asked for.
        """
        while True:
            try:
                return work(self.seqs)
            except torch.OutOfMemoryError:
                if self._asked or self.seqs == 1:
                    raise
            self.seqs //= 2
            free_memory()  # of the failed pass
            report(
                f"the GPU's memory is full; going on with {self.seqs} sequences in a forward pass"
            )


def free_memory() -> None:
    """Return memory that nothing holds any more to the GPUs."""
    gc.collect()
    torch.cuda.empty_cache()


def timed(capture: Capture, tokens: Tensor) -> float:
    """Run the model once on tokens [n, n_ctx] and return tokens per second."""
    _wait_for_gpus()
    started = time.perf_counter()
    capture.run(tokens)
    _wait_for_gpus()
    return tokens.numel() / (time.perf_counter() - started)


def _wait_for_gpus() -> None:
    if torch.cuda.is_initialized():
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.synchronize(gpu)
