"""How many sequences a forward pass takes: as asked, or as many as the GPU's memory holds."""

import gc
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..language.capture import Capture

GPU_TOKENS = 32_768
"""In a forward pass on a GPU, to begin with: enough for its arithmetic to be the limit."""
CPU_TOKENS = 2_048
"""On a CPU, where more tokens only leave its caches."""

Result = TypeVar("Result")


class BatchSize:
    """Sequences of a forward pass; halved when the GPU's memory is full, unless it was asked for.

    The size changes how a matrix product adds up, so the last bit of what is stored may depend on
    it.
    """

    def __init__(self, asked: int | None, *, n_ctx: int, device: str, most: int) -> None:
        """Begin with what was asked for, or with a size that suits the device.

        Args:
            asked: sequences, None to find out.
            n_ctx: tokens in a sequence.
            device: where the model runs.
            most: sequences that the writer's buffer takes.
        """
        tokens = CPU_TOKENS if device == "cpu" else GPU_TOKENS
        found = 1 << (max(1, tokens // n_ctx).bit_length() - 1)  # shards are powers of two as well
        self.seqs = min(asked or found, most)
        self._asked = asked is not None

    def fitting(self, work: Callable[[int], Result], say: Callable[[str], None]) -> Result:
        """Return what work gives for the size, halving it as long as the GPU's memory is full.

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
            say(f"the GPU's memory is full; going on with {self.seqs} sequences in a forward pass")


def free_memory() -> None:
    """Give memory that nothing holds any more back to the GPUs."""
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
