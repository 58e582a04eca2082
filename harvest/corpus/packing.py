"""Sequences made of documents, which are tokenised, then packed or taken one by one.

    pack      [BOS] document 0 EOS [BOS] document 1 EOS ...   cut into runs of n_ctx tokens
    no-pack   [BOS] document 0 EOS                            its first n_ctx tokens, none if fewer

Packing is that of language-model training: a token may attend to the document before its own. BOS
begins a document when the model's own tokenizer puts it there, EOS ends it when there is one. The
sequences are then permuted, so that a store is mixed in any order of reading and its last shards
are a fair sample of the corpus.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import HarvestError
from ...language.tokenizer import starts_with_bos
from .document import Counts, Document, TokenIds
from .tokenise import ids_of_texts

N_FIRST = 20
"""Tokens that are shown before a harvest."""

Tokenised = tuple[str, TokenIds]
"""A document's name and its token ids."""


class Packed(NamedTuple):
    """Corpus as a language model reads it."""

    tokens: Tensor
    """Token ids, int32, [n_seq, n_ctx]"""
    documents: Tensor
    """Number of the document that each token comes from, int32, [n_seq, n_ctx]"""
    names: list[str]
    """Names of those documents"""
    bos: bool
    """Whether all documents begin with BOS"""
    counts: Counts
    """Counts of what was passed over or changed"""


def pack(
    docs: Iterable[Document],
    tokenizer: Any,
    *,
    n_ctx: int,
    max_tokens: int,
    bos: str = "auto",
    packing: str = "pack",
    seed: int = 0,
    n_vocab: int | None = None,
    counts: Counts | None = None,
) -> Packed:
    """Make sequences of documents until there are max_tokens, and permute them.

    The peak of memory is one and a half times that of the result, and a batch of text.

    Args:
        docs: documents in the order in which they are packed; hardly more are read than needed.
        tokenizer: tokenizer of the language model; None for documents that have token ids.
        n_ctx: tokens in a sequence.
        max_tokens: tokens at most, rounded down to whole sequences.
        bos: rule of `starts_with_bos`.
        packing: "pack" or "no-pack", see above.
        seed: seed of the order of sequences.
        n_vocab: token ids that the model has; None: not checked.
        counts: counts of what is passed over, added to.

    Raises:
        HarvestError: there is no text, or it makes fewer than two sequences.
    """
    counts = Counts() if counts is None else counts
    found = _tokenised(docs, tokenizer, bos, n_vocab, counts)
    if packing == "no-pack":
        found = _first_of_each(found, n_ctx, counts)
    stream, lengths, names = array("i"), array("q"), []
    begins = set()
    for name, ids in found:
        stream.frombytes(ids.astype(np.int32).tobytes())
        lengths.append(len(ids))
        begins.add(int(ids[0]))
        names.append(name)
        if len(stream) >= max_tokens:
            break
    n_seq = min(len(stream), max_tokens) // n_ctx
    _require_sequences(len(stream), n_seq, n_ctx, packing, counts)
    order = np.random.default_rng(seed).permutation(n_seq)
    tokens = _permuted(np.frombuffer(stream, dtype=np.int32), order, n_ctx)
    del stream
    numbers = np.repeat(np.arange(len(names), dtype=np.int32), np.frombuffer(lengths, np.int64))
    names = names[: int(numbers[n_seq * n_ctx - 1]) + 1]
    documents = _permuted(numbers, order, n_ctx)
    with_bos = tokenizer is not None and begins == {tokenizer.bos_token_id}
    return Packed(tokens, documents, names, with_bos, counts)


def _permuted(stream: TokenIds, order: np.ndarray[Any, Any], n_ctx: int) -> Tensor:
    """Return the sequences of a stream in an order, [n_seq, n_ctx]."""
    return torch.from_numpy(stream[: len(order) * n_ctx].reshape(-1, n_ctx)[order])


def _tokenised(
    docs: Iterable[Document], tokenizer: Any, bos: str, n_vocab: int | None, counts: Counts
) -> Iterator[Tokenised]:
    """Yield the token ids of documents with BOS and EOS, without those that the model lacks."""
    limit = np.iinfo(np.int32).max if n_vocab is None else n_vocab
    begins = starts_with_bos(tokenizer, bos)
    head = [tokenizer.bos_token_id] if begins else []
    docs = iter(docs)
    first = next(docs, None)
    if first is None:
        return
    docs = chain([first], docs)
    if first.ids is not None:
        yield from _given(docs, head if bos == "always" else [], limit, counts)
        return
    if tokenizer is None:
        raise HarvestError("the model has no tokenizer: give token ids by --tokens-column")
    eos = tokenizer.eos_token_id
    tail = [] if eos is None or eos >= limit else [eos]
    head = [token for token in head if token < limit]
    for name, ids in ids_of_texts(docs, tokenizer):
        fits = ids < limit
        if not fits.all():
            counts.add("foreign_tokens", f"{ids[~fits][0]} in {name}", int((~fits).sum()))
            ids = ids[fits]
        if len(ids):
            yield name, np.concatenate([head, ids, tail]).astype(np.int32)


def _given(
    docs: Iterable[Document], head: list[int], limit: int, counts: Counts
) -> Iterator[Tokenised]:
    """Yield token ids as given, after BOS where it is asked for and missing."""
    for doc in docs:
        ids = doc.ids
        if ids is None or not len(ids):
            continue
        if head and ids[0] != head[0]:
            ids = np.concatenate([head, ids])
        if ids.min() < 0 or ids.max() >= limit:
            worst = ids.max() if ids.max() >= limit else ids.min()
            counts.add("foreign_documents", f"{worst} in {doc.name}")
            continue
        yield doc.name, ids


def _first_of_each(found: Iterator[Tokenised], n_ctx: int, counts: Counts) -> Iterator[Tokenised]:
    """Yield the first n_ctx tokens of every document that has so many."""
    for name, ids in found:
        if len(ids) < n_ctx:
            counts.add("short_documents", name)
            continue
        if len(ids) > n_ctx:
            counts.add("cut_documents", name)
        yield name, ids[:n_ctx]


def _require_sequences(n_tokens: int, n_seq: int, n_ctx: int, packing: str, counts: Counts) -> None:
    if n_seq >= 2:
        return
    passed = f" ({counts})" if str(counts) else ""
    if packing == "no-pack" and (n_seq or counts["short_documents"]):
        raise HarvestError(
            f"fewer than two of the data's documents have {n_ctx} tokens{passed}: use a smaller "
            "--n-ctx, --packing pack, or give longer documents by --data"
        )
    if n_tokens == 0:
        raise HarvestError(f"the data holds no text for this model{passed}; give other --data")
    raise HarvestError(
        f"the data's {n_tokens:,} tokens do not make two sequences of {n_ctx} (one to train, "
        f"one to test){passed}: give more text by --data, or a smaller --n-ctx"
    )


def first_text(packed: Packed, tokenizer: Any) -> str:
    r"""Return the beginning of the first sequence on one line, special tokens and "\n" visible.

    Args:
        packed: result of `pack`.
        tokenizer: tokenizer of the language model; None: token ids are shown.
    """
    ids = packed.tokens[0, :N_FIRST].tolist()
    if tokenizer is None:
        return f"token ids {ids}"
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return repr(text)


def fingerprint(tokens: Tensor) -> str:
    """Return the sha256 of token ids, which identifies a store's text."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
