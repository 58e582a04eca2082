"""Tokens of every kind of vocabulary as text."""

import pytest
from lorsa.language.spelling import token_text
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

BYTES = {"<unk>": 0, "cat": 1, "\u0120cat": 2, "\u00e2": 3, "\u00e2\u0122": 4}
PIECES = {"<unk>": 0, "cat": 1, "\u2581cat": 2, "<0xE2>": 3, "<0x0A>": 4, "\u2581": 5}


def tokenizer(vocab: dict[str, int], *steps: decoders.Decoder) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.decoder = decoders.Sequence(list(steps))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def test_tokens_of_a_byte_level_vocabulary() -> None:
    """As GPT-2's and Qwen's: parts of characters are their bytes."""
    made = tokenizer(BYTES, decoders.ByteLevel())
    texts = [token_text(made, i) for i in range(1, 5)]
    assert texts == ["cat", " cat", "<0xE2>", "<0xE2><0x80>"]


@pytest.mark.parametrize("strips", [False, True])
def test_tokens_of_a_sentencepiece_vocabulary(strips: bool) -> None:
    """As Gemma's and, stripping, Llama 2's: a first space was lost, a byte spelt as six."""
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made = tokenizer(PIECES, *steps, *([decoders.Strip(" ", 1, 0)] if strips else []))
    texts = [token_text(made, i) for i in range(1, 6)]
    assert texts == ["cat", " cat", "<0xE2>", "\n", " "]
