"""Documents to sequences."""

from typing import Any

import pytest
import torch
from lorsa.harvest import HarvestError
from lorsa.harvest.corpus import Document
from lorsa.harvest.packing import pack, starts_with_bos
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


def _pack(tokenizer: Any, **changes: Any) -> Any:
    settings = {"n_ctx": 8, "max_tokens": 10**9, "bos": "auto", "seed": 0} | changes
    return pack(DOCS, tokenizer, **settings)


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
