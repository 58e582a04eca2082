"""Documents to sequences."""

from typing import Any

import numpy as np
import pytest
import torch
from lorsa.errors import HarvestError
from lorsa.harvest.corpus.counts import Counts
from lorsa.harvest.corpus.document import Document
from lorsa.harvest.corpus.packing import first_text, pack
from lorsa.language.tokenizer import starts_with_bos
from tiny import make_tokenizer

DOCS = [Document(f"d{i}", f"the dog {i} sleeps on and on. " * (i + 1)) for i in range(6)]


class WithBos:
    """A tokenizer that puts BOS before a text, as Llama's does."""

    def __init__(self) -> None:
        self._inner = make_tokenizer()
        self.bos_token_id = 399
        self.eos_token_id = self._inner.eos_token_id

    def __call__(self, text: Any, add_special_tokens: bool = True, **settings: Any) -> Any:
        ids = self._inner(text, **settings)["input_ids"]
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}

    def decode(self, ids: Any, **settings: Any) -> Any:
        return self._inner.decode(ids, **settings)


IDS = [Document(f"d{i}", ids=np.arange(i, i + 10)) for i in range(4)]


def _pack(tokenizer: Any, docs: Any = DOCS, **changes: Any) -> Any:
    settings = {"n_ctx": 8, "max_tokens": 10**9, "bos": "auto", "seed": 0} | changes
    return pack(docs, tokenizer, **settings)


def test_sequences_are_the_stream_cut_and_permuted() -> None:
    tokenizer = make_tokenizer()
    packed = _pack(tokenizer)
    stream: list[int] = []
    for doc in DOCS:
        stream += [*tokenizer(doc.text)["input_ids"], tokenizer.eos_token_id]
    n_seq = len(stream) // 8
    cut = [stream[i * 8 : i * 8 + 8] for i in range(n_seq)]
    assert packed.tokens.shape == packed.documents.shape == (n_seq, 8)
    assert sorted(packed.tokens.tolist()) == sorted(cut)
    assert packed.tokens.tolist() != cut
    assert packed.tokens.dtype == packed.documents.dtype == torch.int32


def test_documents_tell_where_a_token_comes_from() -> None:
    tokenizer = make_tokenizer()
    packed = _pack(tokenizer)
    for number, doc in enumerate(DOCS[:-1]):
        n_tokens = len(tokenizer(doc.text)["input_ids"]) + 1
        assert int((packed.documents == number).sum()) == n_tokens
    assert packed.names == [doc.name for doc in DOCS]


def test_max_tokens_stops_early_and_drops_unused_names() -> None:
    packed = _pack(make_tokenizer(), max_tokens=39)
    assert packed.tokens.numel() == 32
    assert len(packed.names) == int(packed.documents.max()) + 1 < len(DOCS)


@pytest.mark.parametrize(("rule", "expected"), [("auto", True), ("always", True), ("never", False)])
def test_bos_stands_before_every_document(rule: str, expected: bool) -> None:
    packed = _pack(WithBos(), bos=rule, n_ctx=4)
    assert starts_with_bos(WithBos(), rule) is expected
    assert (399 in packed.tokens) is expected


def test_bos_is_not_made_up() -> None:
    assert not starts_with_bos(make_tokenizer(), "auto")
    with pytest.raises(HarvestError, match="has no BOS token"):
        starts_with_bos(make_tokenizer(), "always")


def test_too_little_text_is_named() -> None:
    with pytest.raises(HarvestError, match=r"tokens do not make two sequences of 5000"):
        _pack(make_tokenizer(), n_ctx=5000)
    with pytest.raises(HarvestError, match="do not make two sequences of 8"):
        _pack(make_tokenizer(), max_tokens=10)
    with pytest.raises(HarvestError, match="holds no text"):
        pack([], make_tokenizer(), n_ctx=4, max_tokens=99, bos="auto", seed=0)


def test_no_pack_takes_the_beginning_of_long_documents() -> None:
    tokenizer = make_tokenizer()
    packed = _pack(tokenizer, n_ctx=30, packing="no-pack")
    texts = {doc.name: [*tokenizer(doc.text)["input_ids"], 0] for doc in DOCS}
    assert tokenizer.eos_token_id == 0
    long = {name: ids for name, ids in texts.items() if len(ids) >= 30}
    assert 2 <= len(long) < len(DOCS)
    assert packed.names == list(long)
    for tokens, documents in zip(packed.tokens.tolist(), packed.documents.tolist(), strict=True):
        assert len(set(documents)) == 1
        assert tokens == long[packed.names[documents[0]]][:30]
    assert packed.counts.to_dict() == {
        "cut_documents": sum(len(ids) > 30 for ids in long.values()),
        "short_documents": len(DOCS) - len(long),
    }


def test_no_pack_begins_with_bos_and_stops_at_max_tokens() -> None:
    packed = _pack(WithBos(), n_ctx=12, packing="no-pack", max_tokens=30)
    assert packed.tokens.shape == (2, 12)
    assert packed.tokens[:, 0].tolist() == [399, 399]
    assert packed.bos
    assert len(packed.names) == 2


def test_no_pack_of_short_documents_is_refused() -> None:
    with pytest.raises(
        HarvestError, match=r"fewer than two of .* have 5000 tokens \(passed over: 6 "
    ):
        _pack(make_tokenizer(), n_ctx=5000, packing="no-pack")


def test_tokens_that_the_model_lacks_are_left_out() -> None:
    """An embedding of too few rows failed in the middle of a harvest, and a GPU told nothing."""
    tokenizer = make_tokenizer()
    whole = _pack(tokenizer)
    limit = int(whole.tokens.max())
    packed = _pack(tokenizer, n_vocab=limit)
    assert int(packed.tokens.max()) < limit
    assert packed.counts["foreign_tokens"] >= 1
    assert f"the model does not have (such as {limit} in d" in str(packed.counts)
    with pytest.raises(
        HarvestError, match=r"no text for this model \(.*tokens that the model does"
    ):
        _pack(tokenizer, n_vocab=1)


def test_ends_that_the_model_lacks_are_not_put() -> None:
    packed = _pack(WithBos(), n_vocab=399)
    assert 399 not in packed.tokens
    assert not packed.bos


@pytest.mark.parametrize("tokenizer", [None, WithBos()])
def test_token_ids_are_taken_as_they_are(tokenizer: Any) -> None:
    packed = _pack(tokenizer, IDS, n_ctx=20)
    assert sorted(packed.tokens.tolist()) == [
        [*range(10), *range(1, 11)],
        [*range(2, 12), *range(3, 13)],
    ]
    assert not packed.bos
    assert packed.names == ["d0", "d1", "d2", "d3"]


def test_token_ids_get_bos_only_where_it_is_asked_for_and_missing() -> None:
    docs = [Document("a", ids=np.array([399, 1, 2])), Document("b", ids=np.array([3, 4, 5]))]
    packed = _pack(WithBos(), docs, n_ctx=3, bos="always")
    assert sorted(packed.tokens.tolist()) == [[399, 1, 2], [399, 3, 4]]
    assert packed.bos
    with pytest.raises(HarvestError, match="has no BOS token"):
        _pack(None, docs, n_ctx=3, bos="always")


def test_documents_of_foreign_token_ids_are_passed_over() -> None:
    docs = [*IDS, Document("big", ids=np.array([50_300])), Document("low", ids=np.array([-1, 2]))]
    packed = _pack(None, docs, n_ctx=20, n_vocab=400)
    assert packed.counts.to_dict() == {"foreign_documents": 2}
    assert "such as 50300 in big" in str(packed.counts)
    with pytest.raises(HarvestError, match=r"no text for this model .*such as 10 in d1"):
        _pack(None, IDS[1:], n_vocab=10)


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(HarvestError, match="has no tokenizer: give token ids by --tokens-column"):
        _pack(None)


def test_first_text_shows_special_tokens_on_one_line() -> None:
    tokenizer = make_tokenizer()
    docs = [Document("a", "one\ntwo \x1b[31m<|endoftext|>" * 9)]
    packed = _pack(tokenizer, docs, n_ctx=16)
    shown = first_text(packed, tokenizer)
    assert shown.isprintable()
    assert "<|endoftext|>" in shown
    assert "\\n" in shown
    assert first_text(packed, None) == f"token ids {packed.tokens[0, :20].tolist()}"


def test_counts_of_the_corpus_are_added_to() -> None:
    counts = Counts()
    counts.add("empty_documents", "x")
    assert _pack(make_tokenizer(), counts=counts).counts is counts
