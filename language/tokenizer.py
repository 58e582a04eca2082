"""Facts of a tokenizer: its vocabulary, its special tokens, whether texts begin with BOS."""

import hashlib
from typing import Any

from ..errors import LanguageModelError


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """Return what the store's manifest says of a tokenizer; without one, every fact is None."""
    if tokenizer is None:
        return dict.fromkeys(("class", "vocabulary_sha256", "bos_token_id", "eos_token_id")) | {
            "pad_token_id": None,
            "special_token_ids": [],
        }
    vocabulary = "\n".join(f"{token}\t{i}" for token, i in sorted(tokenizer.get_vocab().items()))
    return {
        "class": type(tokenizer).__name__,
        "vocabulary_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "special_token_ids": sorted(tokenizer.all_special_ids),
    }


def starts_with_bos(tokenizer: Any, rule: str) -> bool:
    """Return whether a document begins with BOS.

    Args:
        tokenizer: tokenizer of the language model; None if it has none.
        rule: "auto" (as the tokenizer itself does), "always" or "never".

    Raises:
        LanguageModelError: "always" with a tokenizer that has no BOS.
    """
    bos = None if tokenizer is None else tokenizer.bos_token_id
    if rule == "auto" and bos is not None:
        return bool(tokenizer("a")["input_ids"][:1] == [bos])
    if rule == "always" and bos is None:
        raise LanguageModelError(
            "bos is always, but the model's tokenizer has no BOS token; use auto"
        )
    return rule == "always"
