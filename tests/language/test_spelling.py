"""Tokens of every kind of vocabulary as text."""

import pytest
from lorsa.language.spelling import MOST_NUMBERS, parse_ids, token_text, whole_characters
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


WORDS = {"<unk>": 0, "cat": 1, "sat": 2, ".": 3}
PARTS = {"<unk>": 0, "cat": 1, "##nip": 2, ".": 3}
ENDS = {"<unk>": 0, "cat</w>": 1, "nip": 2, "</w>": 3}


@pytest.mark.parametrize(
    ("model", "decoder", "expected"),
    [
        (models.WordLevel(WORDS, unk_token="<unk>"), None, [" cat", " sat", " ."]),
        (
            models.WordPiece(PARTS, unk_token="<unk>"),
            decoders.WordPiece(cleanup=False),
            [" cat", "nip", " ."],
        ),
        (
            models.WordPiece(PARTS, unk_token="<unk>"),
            decoders.WordPiece(cleanup=True),
            [" cat", "nip", "."],
        ),
        (
            models.BPE(ENDS, [], unk_token="<unk>", end_of_word_suffix="</w>"),
            decoders.BPEDecoder(),
            ["cat ", "nip", " "],
        ),
        (
            models.BPE(PIECES, [], unk_token="<unk>"),
            decoders.Metaspace(),
            ["cat", " cat", "<0xE2>"],
        ),
    ],
)
def test_words_have_their_spaces(
    model: models.Model, decoder: decoders.Decoder | None, expected: list[str]
) -> None:
    """Words of a vocabulary of words ran into each other, as decoders put the spaces there.

    So did those of WordPiece, with its marks, and those that a mark ends.
    """
    made = Tokenizer(model)
    if decoder is not None:
        made.decoder = decoder
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    assert [token_text(fast, i) for i in range(1, 4)] == expected
    assert token_text(fast, 0) == "<unk>"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a", "<0xE4>", "<0xBB>", "<0x8A>", " b"], ["a", "\u4eca", " b"]),
        (["<0x20><0xE4>", "<0xBB><0x8A>"], [" \u4eca"]),
        (["<0xE4><0xBB>", "<0x8A><0xE5><0xA4>", "<0xA9>"], ["\u4eca\u5929"]),  # they share one
        (["<0xF0><0x9F>", "<0x99><0x82>", "<0xF0>"], ["\U0001f642", "<0xF0>"]),
        (["<0x8A>", "<0xE4>", "<0xBB>", "<0x8A>"], ["<0x8A>", "\u4eca"]),  # its first is elsewhere
        (["<0xE4>", "<0xBB>", "b"], ["<0xE4>", "<0xBB>", "b"]),
        (["<0xE4>", "<0xE4>", "<0xBB><0x8A>"], ["<0xE4>", "\u4eca"]),
        (["<0x0A>", "<0xe4>", "<0xZZ>", ""], ["\n", "<0xe4>", "<0xZZ>", ""]),
        ([], []),
    ],
)
def test_pieces_of_characters_are_put_together(texts: list[str], expected: list[str]) -> None:
    """Text of other scripts was shown to people and judges as bytes."""
    found = whole_characters(texts)
    assert [text for _, text in found] == expected
    assert [place for places, _ in found for place in places] == list(range(len(texts)))


def test_a_text_is_whole_again() -> None:
    """Every byte a token of its own, as where a vocabulary knows nothing of a script."""
    text = "\u4eca\u5929 river \U0001f642 \u0928\u092e\u0938\u094d\u0924\u0947"
    texts = [f"<0x{byte:02X}>" for byte in text.encode()]
    assert "".join(text for _, text in whole_characters(texts)) == text


def test_numbers_may_be_of_any_length() -> None:
    """They ended at six digits, so a head of a large Lorsa could not be named."""
    assert parse_ids("heads", "1234567, 2000000-2000002") == [1234567, 2000000, 2000001, 2000002]
    assert parse_ids("heads", f"0-{MOST_NUMBERS - 1}")[-1] == MOST_NUMBERS - 1


@pytest.mark.parametrize("text", ["0-999999999999", "0-600000,0-600000", "5-999999999999999999"])
def test_more_numbers_than_can_be_meant_are_refused(text: str) -> None:
    """Longer numbers would have made a range that fills the memory."""
    with pytest.raises(ValueError, match=r"^heads is '.*', [\d,]+ numbers; allowed: at most"):
        parse_ids("heads", text)
