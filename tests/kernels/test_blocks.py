"""Blocks of rows on several threads: each once, with the same bits, and nothing left changed."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch
from lorsa.kernels import torch_sparse
from lorsa.kernels.dispatch import sparse_decode, sparse_dot, sparse_topk_linear
from lorsa.kernels.torch_blocks import each_block
from lorsa.kernels.torch_select import Scratch
from torch import Tensor


@pytest.fixture(params=[1, 2, 3, 5])
def n_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Numbers of threads that torch may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield int(request.param)
    torch.set_num_threads(before)


@pytest.mark.parametrize(("n_rows", "at_once"), [(0, 4), (1, 4), (4, 4), (23, 4), (200, 1)])
def test_each_row_is_worked_on_once(n_threads: int, n_rows: int, at_once: int) -> None:
    counts = torch.zeros(n_rows)

    def work(rows: slice, scratch: Scratch) -> None:
        buffer = scratch.take("ones", rows.stop - rows.start)
        counts[rows] += buffer.fill_(1)

    each_block(n_rows, at_once, work, counts)
    assert counts.tolist() == [1] * n_rows


def test_the_number_of_threads_stays(n_threads: int) -> None:
    """Also for threads to come, which start with what was set last by any thread."""
    each_block(100, 10, lambda _rows, _scratch: None, torch.zeros(1))
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *seen] == [n_threads, n_threads]


def test_an_error_reaches_the_caller(n_threads: int) -> None:
    def work(rows: slice, _scratch: Scratch) -> None:
        if rows.start == 30:
            raise RuntimeError("block 30")

    with pytest.raises(RuntimeError, match="block 30"):
        each_block(100, 10, work, torch.zeros(1))


def _step(inputs: list[Tensor]) -> list[Tensor]:
    """Encode, read and decode more than a block of tokens; acts, ids, h, y_hat and gradients."""
    x, W, b = (t.clone().requires_grad_() for t in inputs)
    acts, ids = sparse_topk_linear(x, W, b, torch.ones(len(W)), top_k=7)
    h, y_hat = sparse_dot(x, ids, W), sparse_decode(acts, ids, W)
    grads = torch.autograd.grad((h * acts).sum() + y_hat.square().sum(), [x, W, b])
    return [acts.detach(), ids, h.detach(), y_hat.detach(), *grads]


def _inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3 * torch_sparse.TOKENS_AT_ONCE // 2 + 5, 24), (150, 24), (150,)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            found.append(_step(_inputs()))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_in_inference_mode(n_threads: int) -> None:
    """Dots of inference tensors used to ask autograd for what it had not kept."""
    expected = _step(_inputs())[:4]
    with torch.inference_mode():
        x, W, b = _inputs()
        acts, ids = sparse_topk_linear(x, W, b, torch.ones(len(W)), top_k=7)
        found = [acts, ids, sparse_dot(x, ids, W), sparse_decode(acts, ids, W)]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_makes_threads_of_its_own() -> None:
    """A pool of the parent's has no threads in a child, which would wait for them forever."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    rows: list[int] = []

    def work(block: slice, _scratch: Scratch) -> None:
        rows.append(block.start)

    try:
        each_block(40, 10, work, torch.zeros(1))
        child = os.fork()
        if child == 0:
            each_block(40, 10, work, torch.zeros(1))
            os._exit(0 if sorted(rows) == [0, 0, 10, 10, 20, 20, 30, 30] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(before)
