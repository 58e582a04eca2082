"""Documents to sequences: tokenised, one after the other, cut into runs of n_ctx tokens.

    [BOS] document 0 EOS [BOS] document 1 EOS ...

as language models are trained; a token may attend to the document before its own. BOS stands at
the start of a document when the model's own tokenizer puts it there. The sequences are then
permuted, so a store is mixed however it is read and its last shards are a fair sample of the
corpus.
"""

import hashlib
from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .corpus import Document
from .errors import HarvestError

DOCUMENTS_AT_ONCE = 64
BOS_RULES = ("auto", "always", "never")


class Packed(NamedTuple):
    """A corpus as a language model reads it."""

    tokens: Tensor
    """Token ids, int32, [n_seq, n_ctx]"""
    documents: Tensor
    """Number of the document that each token comes from, int32, [n_seq, n_ctx]"""
    names: list[str]
    """Names of those documents"""
    bos: bool
    """Whether they begin with BOS"""


def starts_with_bos(tokenizer: Any, rule: str) -> bool:
    """Tell whether a document begins with BOS.

    Args:
        tokenizer: of the language model.
        rule: "auto" as the tokenizer itself does, "always" or "never".

    Raises:
        HarvestError: "always" with a tokenizer that has no BOS.
    """
    if rule == "auto":
        ids = tokenizer("a")["input_ids"]
        return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    if rule == "always" and tokenizer.bos_token_id is None:
        raise HarvestError("bos is always, but the model's tokenizer has no BOS token; use auto")
    return rule == "always"


def pack(
    docs: Iterable[Document],
    tokenizer: Any,
    *,
    n_ctx: int,
    max_tokens: int,
    bos: str,
    seed: int,
) -> Packed:
    """Tokenise documents until there are max_tokens, cut them into sequences and permute these.

    Args:
        docs: in the order in which they are packed; no more are taken than are needed.
        tokenizer: of the language model.
        n_ctx: tokens in a sequence.
        max_tokens: stop there (rounded down to whole sequences).
        bos: rule of `starts_with_bos`.
        seed: of the order of sequences.

    Raises:
        HarvestError: no text at all, or fewer than two sequences of it.
    """
    head = [tokenizer.bos_token_id] if starts_with_bos(tokenizer, bos) else []
    tail = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    docs = iter(docs)
    ids: list[np.ndarray[Any, Any]] = []
    names: list[str] = []
    n_tokens = 0
    while n_tokens < max_tokens:
        some = list(islice(docs, DOCUMENTS_AT_ONCE))
        if not some:
            break
        texts = tokenizer([doc.text for doc in some], add_special_tokens=False, verbose=False)
        for doc, text_ids in zip(some, texts["input_ids"], strict=True):
            ids.append(np.array([*head, *text_ids, *tail], dtype=np.int32))
            names.append(doc.name)
            n_tokens += len(ids[-1])
    n_seq = min(n_tokens, max_tokens) // n_ctx
    _require_sequences(n_tokens, n_seq, n_ctx)
    stream = np.concatenate(ids)
    numbers = np.repeat(np.arange(len(ids), dtype=np.int32), [len(i) for i in ids])
    tokens = stream[: n_seq * n_ctx].reshape(n_seq, n_ctx)
    of_document = numbers[: n_seq * n_ctx].reshape(n_seq, n_ctx)
    names = names[: int(of_document[-1, -1]) + 1]
    order = np.random.default_rng(seed).permutation(n_seq)
    return Packed(
        torch.from_numpy(tokens[order]), torch.from_numpy(of_document[order]), names, bool(head)
    )


def _require_sequences(n_tokens: int, n_seq: int, n_ctx: int) -> None:
    if n_tokens == 0:
        raise HarvestError("the data holds no text; give another file or folder by --data")
    if n_seq < 2:
        raise HarvestError(
            f"the data's {n_tokens:,} tokens do not make two sequences of {n_ctx} (one to train, "
            "one to test): give more text by --data, or a smaller --n-ctx"
        )


def fingerprint(tokens: Tensor) -> str:
    """Return the sha256 of token ids, which fixes a store's text."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
