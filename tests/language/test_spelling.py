"""Tokens of every kind of vocabulary as text."""

import pytest
from lorsa.language.spelling import MOST_NUMBERS, numbers, token_text
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


def test_numbers_may_be_of_any_length() -> None:
    """They ended at six digits, so a head of a large Lorsa could not be named."""
    assert numbers("heads", "1234567, 2000000-2000002") == [1234567, 2000000, 2000001, 2000002]
    assert numbers("heads", f"0-{MOST_NUMBERS - 1}")[-1] == MOST_NUMBERS - 1


@pytest.mark.parametrize("text", ["0-999999999999", "0-600000,0-600000", "5-999999999999999999"])
def test_more_numbers_than_can_be_meant_are_refused(text: str) -> None:
    """Longer numbers would have made a range that fills the memory."""
    with pytest.raises(ValueError, match=r"^heads is '.*', [\d,]+ numbers; allowed: at most"):
        numbers("heads", text)
