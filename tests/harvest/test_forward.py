"""The size of a batch is found, and halved where a GPU's memory is full."""

import dataclasses
from typing import Any

import pytest
import torch
from lorsa.errors import HarvestError
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.forward import BatchSize
from lorsa.harvest.harvest import harvest
from lorsa.language.capture import Capture


@pytest.mark.parametrize(
    ("asked", "n_ctx", "device", "most", "expected"),
    [
        (None, 256, "cpu", 100, 8),
        (None, 1024, "cpu", 100, 2),
        (None, 100_000, "cpu", 100, 1),
        (None, 1024, "cuda:0", 100, 32),
        (None, 1000, "cuda:0", 100, 32),  # a power of two, as shards are
        (None, 1024, "cuda:0", 5, 5),
        (7, 1024, "cuda:0", 100, 7),
    ],
)
def test_it_begins_with_what_suits_the_device(
    asked: int | None, n_ctx: int, device: str, most: int, expected: int
) -> None:
    assert BatchSize(asked, n_ctx=n_ctx, device=device, most=most).seqs == expected


def test_it_is_halved_until_it_fits() -> None:
    said: list[str] = []

    def work(n_seqs: int) -> str:
        if n_seqs > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return f"{n_seqs} fit"

    batch = BatchSize(None, n_ctx=1024, device="cuda:0", most=100)
    assert batch.fitting(work, said.append) == "2 fit"
    assert batch.seqs == 2
    assert len(said) == 4
    assert said[-1].endswith("going on with 2 sequences in a forward pass")
    asked = BatchSize(8, n_ctx=1024, device="cuda:0", most=100)
    with pytest.raises(torch.OutOfMemoryError):
        asked.fitting(work, said.append)
    one = BatchSize(None, n_ctx=10**6, device="cuda:0", most=100)
    with pytest.raises(torch.OutOfMemoryError):
        one.fitting(lambda n: work(n + 3), said.append)


def test_a_harvest_goes_on_with_smaller_batches(
    harvest_config: HarvestConfig, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is full in the middle of a shard: it is written anew, whole."""
    run = Capture.run
    sizes: list[int] = []

    def small_memory(self: Capture, tokens: torch.Tensor) -> Any:
        sizes.append(len(tokens))
        if len(sizes) > 4 and len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, tokens)

    monkeypatch.setattr(Capture, "run", small_memory)
    said: list[Any] = []
    config = dataclasses.replace(harvest_config, store=tmp_path / "acts")
    result = harvest(config, report=said.append)
    assert result.n_tokens == 130 * config.n_ctx
    assert max(sizes) > 2
    assert sizes[-1] <= 2
    assert any("the GPU's memory is full" in str(event) for event in said)


def test_a_batch_larger_than_the_buffer_is_refused_before_the_model_runs(
    harvest_config: HarvestConfig, tmp_path: Any
) -> None:
    small = dataclasses.replace(harvest_config, store=tmp_path / "acts", buffer_gb=5e-5)
    with pytest.raises(HarvestError, match=r"larger --buffer-gb, or --batch-size 5 or less"):
        harvest(dataclasses.replace(small, batch_size=9))
    assert not small.store.exists()
    harvest(small)
