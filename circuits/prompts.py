"""Prompts of a request: their token ids, and the texts of these."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import AnalyzeError
from ..language.spelling import parse_ids, whole_characters
from ..language.tokenizer import starts_with_bos


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """Return the token ids of a text, after BOS where the model's tokenizer puts one."""
    bos = [tokenizer.bos_token_id] if starts_with_bos(tokenizer, "auto") else []
    return [*bos, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]


def ids_of_file(path: Path) -> list[int]:
    """Return the token ids in a file: numbers apart by commas, spaces or lines, as JSON too.

    Raises:
        AnalyzeError: it cannot be read, or has anything else.
    """
    try:
        text = path.read_text("utf-8")
        return parse_ids(str(path), ",".join(text.strip().strip("[]").replace(",", " ").split()))
    except OSError as error:
        raise AnalyzeError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError:
        raise AnalyzeError(f"{path} holds no token ids; write them as 5, 17, 301") from None


def require_readable(ids: list[int], n_vocab: int, longest: int | None) -> None:
    """Raise AnalyzeError unless a model can read these token ids.

    Args:
        ids: of the prompt.
        n_vocab: ids that the model knows.
        longest: tokens that it reads at most; None where nothing limits them.
    """
    outside = [i for i in ids if i >= n_vocab]
    if outside:
        raise AnalyzeError(f"token {outside[0]} is outside the vocabulary; it has 0-{n_vocab - 1}")
    if longest is not None and len(ids) > longest:
        raise AnalyzeError(f"the prompt has {len(ids):,} tokens; the model takes {longest:,}")
    if not ids:
        raise AnalyzeError("the prompt has no tokens; give some text")


def token_texts(ids: list[int], spell: Callable[[int], str | None]) -> list[str | None]:
    """Return the texts of a prompt's tokens; characters in pieces are whole at the first piece.

    Args:
        ids: of the tokens.
        spell: from a token's id to its text, None without a tokenizer.
    """
    texts = [spell(i) for i in ids]
    for places, text in whole_characters([text or "" for text in texts]):
        if len(places) > 1:
            texts[places.start] = text
    return texts
