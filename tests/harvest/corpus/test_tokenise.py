"""Long texts in pieces: the same tokens."""

from typing import Any

import pytest
from lorsa.harvest.corpus import tokenise
from lorsa.harvest.corpus.document import Document
from lorsa.harvest.corpus.tokenise import cut, ids_of_texts
from tiny import TEXT, make_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


def make_sentencepiece() -> Any:
    """Return a tokenizer that puts a space before any text, as that of Llama 2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Replace("\u2581", " ")
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    tokenizer.train_from_iterator(TEXT.split(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_qwen() -> Any:
    """Return a byte-level tokenizer that splits text as those of Qwen and Llama 3 do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _ids(text: str, tokenizer: Any) -> list[int]:
    ((name, ids),) = ids_of_texts([Document("a", text)], tokenizer)
    assert name == "a"
    return ids.tolist()


@pytest.mark.parametrize("make", [make_tokenizer, make_qwen, make_sentencepiece])
@pytest.mark.parametrize("size", [40, 61, 300])
def test_pieces_have_the_tokens_of_the_whole(
    make: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make()
    text = (TEXT + "1 2  3\n\n- item 'quoted' don't   stop. ") * 3
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(tokenise, "PIECE_CHARACTERS", size)
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 2 * size)
    assert len(list(cut(text))) > len(text) // size
    assert _ids(text, tokenizer) == whole


@pytest.mark.parametrize("text", ["x" * 1000, " " * 1000, "ab\n" * 333, "\u4e2d\u6587" * 500])
def test_text_without_words_is_cut_all_the_same(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "PIECE_CHARACTERS", 100)
    pieces = list(cut(text))
    assert "".join(piece for piece, _ in pieces) == text
    assert max(len(piece) for piece, _ in pieces) <= 100
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert make_tokenizer().decode(_ids(text, make_tokenizer())) == text


def test_documents_keep_their_order_and_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 120)
    docs = [Document(f"d{i}", "the dog sleeps. " * i) for i in range(1, 20)]
    tokenizer = make_tokenizer()
    found = list(ids_of_texts(docs, tokenizer))
    assert [name for name, _ in found] == [doc.name for doc in docs]
    for doc, (_, ids) in zip(docs, found, strict=True):
        assert ids.tolist() == tokenizer(doc.text)["input_ids"]
