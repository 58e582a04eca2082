"""The size of a batch is found, and halved where a GPU's memory is full."""

import dataclasses
from typing import Any

import pytest
import torch
from lorsa.errors import HarvestError
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.forward import BatchSize
from lorsa.harvest.harvest import harvest, plan_harvest
from lorsa.language.capture import Capture
from lorsa.store.read.reader import ActivationStore


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
    see = Capture.see
    sizes: list[int] = []

    def small_memory(self: Capture, tokens: torch.Tensor) -> Any:
        sizes.append(len(tokens))
        if len(sizes) > 4 and len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return see(self, tokens)

    monkeypatch.setattr(Capture, "see", small_memory)
    said: list[Any] = []
    config = dataclasses.replace(harvest_config, store=tmp_path / "acts")
    result = harvest(config, report=said.append)
    assert result.n_tokens == 130 * config.n_ctx
    assert max(sizes) > 2
    assert sizes[-1] <= 2
    assert any("the GPU's memory is full" in str(event) for event in said)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of every forward pass so far."""
    see = Capture.see
    seen: list[int] = []

    def counted(self: Capture, tokens: torch.Tensor) -> Any:
        seen.append(len(tokens))
        return see(self, tokens)

    monkeypatch.setattr(Capture, "see", counted)
    return seen


def test_every_forward_pass_is_of_the_size_that_was_asked_for(
    harvest_config: HarvestConfig, tmp_path: Any, sizes: list[int]
) -> None:
    """The pass that the self-check reads took the whole sample at once, whatever was asked for."""
    config = dataclasses.replace(harvest_config, store=tmp_path / "acts", batch_size=3)
    plan_harvest(config)
    harvest(dataclasses.replace(config, layers="1"))
    harvest(config)  # adds layer 2
    assert sizes
    assert max(sizes) == 3


def test_the_first_look_in_batches_finds_what_one_pass_does(
    harvest_config: HarvestConfig, tmp_path: Any
) -> None:
    """The self-check and the scales of int8's channels, of the whole sample, beyond rounding."""
    stores = []
    for n_seqs in (3, 128):  # the sample has 128
        folder = tmp_path / str(n_seqs)
        config = dataclasses.replace(harvest_config, store=folder, batch_size=n_seqs, dtype="int8")
        harvest(config)
        stores.append(ActivationStore.open(folder))
    for store in stores:
        assert store.manifest.modules["1.attention"]["self_check"]["passed"]
    for site in stores[0].sites:
        small, large = (store.channel(site) for store in stores)
        assert small is not None
        torch.testing.assert_close(small, large)


def test_the_first_look_goes_on_with_smaller_batches(
    harvest_config: HarvestConfig, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's memory that the sample filled ended the harvest, though fewer sequences would fit."""
    see = Capture.see

    def small_memory(self: Capture, tokens: torch.Tensor) -> Any:
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return see(self, tokens)

    monkeypatch.setattr(Capture, "see", small_memory)
    said: list[Any] = []
    result = harvest(
        dataclasses.replace(harvest_config, store=tmp_path / "acts"), report=said.append
    )
    assert result.n_tokens == 130 * harvest_config.n_ctx
    assert any("the GPU's memory is full" in str(event) for event in said)


def test_a_batch_larger_than_the_buffer_is_refused_before_the_model_runs(
    harvest_config: HarvestConfig, tmp_path: Any
) -> None:
    small = dataclasses.replace(harvest_config, store=tmp_path / "acts", buffer_gb=5e-5)
    with pytest.raises(HarvestError, match=r"larger --buffer-gb, or --batch-size 5 or less"):
        harvest(dataclasses.replace(small, batch_size=9))
    assert not small.store.exists()
    harvest(small)
