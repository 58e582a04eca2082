"""Which tokens count: by their ids, their place and their norms."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lorsa.errors import StoreError, TrainError
from lorsa.sites import attention_ports
from lorsa.store.read.reader import ActivationStore
from lorsa.train.config import TrainConfig
from lorsa.train.mask import TokenMask
from lorsa.train.mask_rule import parse_rule
from small import N_CTX, N_SEQ, create, edit_manifest, fill, make_manifest, tokens, values
from torch import Tensor

ALL = np.arange(N_SEQ)
BOS, SPECIAL = 7, [7, 20, 130]


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small") / "acts"
    facts = {"bos_token_id": BOS, "special_token_ids": SPECIAL}
    with create(root, make_manifest(tokenizer=facts)) as writer:
        fill(writer)
        writer.finish()
    return root


@pytest.fixture
def small(small_folder: Path) -> ActivationStore:
    return ActivationStore.open(small_folder)


def _masked(store: ActivationStore, rule: str, layer: int = 0) -> Tensor:
    return ~TokenMask.of(rule, store, attention_ports(layer).sites)(ALL)


def test_none_counts_every_token(small: ActivationStore) -> None:
    assert not _masked(small, "none").any()
    assert not TokenMask.of("none", small, attention_ports(0).sites).rule.masks


def test_tokens_are_masked_by_id_and_by_place(small: ActivationStore) -> None:
    assert torch.equal(_masked(small, "bos"), tokens() == BOS)
    assert torch.equal(_masked(small, "special"), torch.isin(tokens(), torch.tensor(SPECIAL)))
    first = torch.arange(N_CTX).expand(N_SEQ, N_CTX) == 0
    assert torch.equal(_masked(small, "first"), first)
    assert torch.equal(_masked(small, " first, bos"), first | (tokens() == BOS))


@pytest.mark.parametrize("layer", [0, 3])
def test_norms_are_compared_with_the_median_of_training_tokens(
    small: ActivationStore, layer: int
) -> None:
    norms = torch.stack([values(layer, site).norm(dim=-1) for site in (0, 1)], dim=-1)
    train = norms[small.train_seqs].flatten(0, 1)
    expected = (norms > 1.25 * train.quantile(0.5, dim=0)).any(dim=-1)
    assert 0 < expected.sum() < expected.numel() / 2
    assert torch.equal(_masked(small, "norm>1.25x", layer), expected)


def test_any_sequences_in_any_order_get_the_same_mask(small: ActivationStore) -> None:
    """However it is asked, so on every process and after every stop."""
    whole = TokenMask.of("bos,norm>1.25x", small, attention_ports(0).sites)(ALL)
    for seqs in ([21, 3, 3, 0], [5], np.array([], dtype=np.int64)):
        found = TokenMask.of("bos,norm>1.25x", small, attention_ports(0).sites)(seqs)
        assert torch.equal(found, whole[torch.as_tensor(seqs, dtype=torch.int64)])
    mask = TokenMask.of("bos,norm>1.25x", small, attention_ports(0).sites)
    assert mask.n_counted([4, 9]) == int(whole[[4, 9]].sum())


def test_a_shard_is_read_once(small: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = TokenMask.of("bos,norm>1.25x", small, attention_ports(0).sites)
    before = mask(ALL)

    def fail(*_: object) -> Tensor:
        raise AssertionError("read again")

    monkeypatch.setattr(small, "tokens", fail)
    monkeypatch.setattr(small, "norms", fail)
    assert torch.equal(mask(ALL), before)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("frist", r"'frist'; did you mean first\? allowed: none, or bos, special, first, norm>10x"),
        ("norm>ax", r"'norm>ax'; did you mean norm>10x\?"),
        ("none,first", r"'none'; allowed"),
        ("", r"''; allowed"),
        ("norm>1x", r"norm above 1x"),
    ],
)
def test_a_rule_that_cannot_be_read_is_refused_by_the_config(rule: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"loss_mask has .*{words}"):
        TrainConfig(store=Path("a"), layer=0, out=Path("b"), loss_mask=rule)


def test_what_a_rule_says_is_kept() -> None:
    assert parse_rule("bos,norm>2.5x") == (frozenset({"bos"}), 2.5)
    assert parse_rule("none") == (frozenset(), None)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "does not say which tokens these are .*leave bos out, or harvest again"),
        ({"bos_token_id": None}, "has no such token; leave bos out; first takes position 0"),
    ],
)
def test_a_store_without_bos_says_so(
    small_folder: Path, tmp_path: Path, facts: dict[str, object], words: str
) -> None:
    shutil.copytree(small_folder, tmp_path / "acts")
    edit_manifest(tmp_path / "acts", tokenizer=facts)
    with pytest.raises(TrainError, match=words):
        TokenMask.of("bos", ActivationStore.open(tmp_path / "acts"), attention_ports(0).sites)


def test_a_layer_that_is_not_stored_is_named(small: ActivationStore) -> None:
    with pytest.raises(StoreError, match="is not in"):
        TokenMask.of("norm>2x", small, attention_ports(5).sites)
