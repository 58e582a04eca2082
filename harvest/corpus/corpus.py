"""Documents of files, a Hub dataset or Python's own library, in a seeded order.

Files are read in a random order and documents pass through a shuffle buffer. A corpus may be larger
than memory; one smaller than the buffer is shuffled whole.
"""

import os
import random
import stat
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from ...errors import HarvestError
from .choices import STDLIB, config_of, is_hub_id
from .counts import Counts
from .document import PROVING_ROWS, Column, Document
from .encodings import guess_encoding
from .files import LocalFiles
from .hub_data import HubDataset

BUFFER_CHARACTERS = 64_000_000
GARBLED_SHARE = 0.1
"""Share of U+FFFD in a text above which it is refused."""
GARBLED_CHARACTERS = 2
"""U+FFFD that are taken in a text of any length."""
ID_CHARACTERS = 8
"""Share of the buffer that a token id, an int64, takes."""
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class Source(Protocol):
    """Origin of documents: files, a dataset, a library."""

    facts: dict[str, Any]
    """Facts for the store's manifest, besides the settings."""
    problem: HarvestError | None
    """Error that says better than counts why there are no documents."""

    def read(self, rng: random.Random, counts: Counts) -> Iterator[Document]:
        """Yield the documents in an order drawn from rng, and count what is passed over."""


class Corpus:
    """The documents of one request."""

    def __init__(self, data: str, source: Source, *, seed: int) -> None:
        """Take the data as given, its source, and the seed of the order."""
        self.facts = source.facts
        self.counts = Counts()
        """Counts of what was passed over or changed so far."""
        self._data, self._source, self._seed = data, source, seed
        self._garbled: HarvestError | None = None
        """Error of the first text that is not UTF-8."""

    def documents(self) -> Iterator[Document]:
        """Yield the documents that are not empty, in the order of the seed.

        Raises:
            HarvestError: there is none, the first ones are all not UTF-8, or the source fails.
        """
        rng = random.Random(self._seed)
        n_documents = 0
        for doc in _shuffled(self._whole(self._source.read(rng, self.counts)), rng):
            n_documents += 1
            yield doc
        if not n_documents:
            counts = f" ({self.counts})" if str(self.counts) else ""
            raise (
                self._source.problem
                or self._garbled
                or HarvestError(f"data {self._data} holds no text{counts}; give another by --data")
            )

    def _whole(self, docs: Iterator[Document]) -> Iterator[Document]:
        """Skip empty documents and repair or skip what is not UTF-8."""
        last: int | None = PROVING_ROWS  # text that may be garbled, if all before it were
        for doc in docs:
            if doc.text.isspace() or not _length(doc):
                self.counts.add("empty_documents", doc.name)
                continue
            found = doc if doc.text.isascii() else self._repaired(doc)
            if found is not None:
                last = None
                self.counts.keep("texts")
                yield found._replace(name=_printed(doc.name))
            elif self._garbled is not None and self.counts["garbled_documents"] == last:
                raise self._garbled

    def _repaired(self, doc: Document) -> Document | None:
        """Return a document with U+FFFD for what is not UTF-8; None if that is much of it."""
        text = doc.text
        try:
            text.encode()
        except UnicodeEncodeError:  # surrogates, of invalid bytes or of JSON
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if text.count("\ufffd") > GARBLED_CHARACTERS + GARBLED_SHARE * len(text):
            self._refuse(doc)
            return None
        if text is not doc.text:
            self.counts.add("repaired_documents", doc.name)
        return doc._replace(text=text)

    def _refuse(self, doc: Document) -> None:
        """Count a text as not UTF-8; keep the first one's error, with its encoding guessed."""
        if self._garbled is not None:
            self.counts.add("garbled_documents", doc.name)
            return
        raw = doc.text.encode("utf-8", "backslashreplace")
        with suppress(UnicodeEncodeError):  # surrogates of JSON stand for no bytes
            raw = doc.text.encode("utf-8", "surrogateescape")
        guess = guess_encoding(raw)
        looks, then = "", "convert it, or give another by --data"
        if guess is not None:
            looks, then = f", looks like {guess}", f"iconv -f {guess} -t UTF-8 FILE > NEW"
        self.counts.add("garbled_documents", f"{doc.name}{looks}")
        self._garbled = HarvestError(
            f"data {self._data}: {doc.name} is no text in UTF-8{looks}: {then}"
        )


def open_corpus(
    data: str,
    *,
    text_column: str = "text",
    tokens_column: str | None = None,
    data_config: str | None = None,
    data_split: str = "train",
    seed: int = 0,
) -> Corpus:
    """Find a corpus; errors of the request are raised here, before any text is read.

    Args:
        data: "stdlib", a file, a folder, or the id of a Hub dataset, owner/name.
        text_column: column of a table, or field of a line, that holds the text.
        tokens_column: column of token ids, which are then used unchanged; None: text is read.
        data_config: config of a Hub dataset; None: its default.
        data_split: split of a Hub dataset.
        seed: seed of the order.

    Raises:
        HarvestError: there is no such path or dataset, it holds no file of a known kind, or a
            setting does not apply to it.
    """
    if not data.strip():
        raise HarvestError("data is empty; give a file, a folder, a Hub dataset, or stdlib")
    column = Column(text_column) if tokens_column is None else Column(tokens_column, is_ids=True)
    if is_hub_id(data):
        hub = HubDataset(data, config=config_of(data, data_config), split=data_split, column=column)
        return Corpus(data, hub, seed=seed)
    if data_config is not None or data_split != "train":
        option = "--data-config" if data_config is not None else "--data-split"
        raise HarvestError(f"data {data} is no Hub dataset (owner/name): leave out {option}")
    if data == STDLIB:
        if column.is_ids:
            raise HarvestError("data stdlib is text: leave out --tokens-column")
        return Corpus(data, _Stdlib(), seed=seed)
    root = Path(os.path.expanduser(data))
    _require_path(root)
    return Corpus(data, LocalFiles(root, column), seed=seed)


def _require_path(root: Path) -> None:
    """Raise HarvestError unless a path is a file or a folder."""
    try:
        mode = root.stat().st_mode
    except FileNotFoundError:
        what = "a link to nothing" if os.path.islink(root) else "no such file or folder"
        raise HarvestError(
            f"data {root}: {what}; give one, the id of a Hub dataset (owner/name), or {STDLIB} for "
            "Python's own texts"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise HarvestError(f"data {root}: cannot be found ({reason})") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise HarvestError(
            f"data {root}: a pipe, socket or device cannot be read twice: write it to a file"
        )


class _Stdlib:
    """The topics of Python's help and the sources of its standard library."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.problem: HarvestError | None = None

    def read(self, rng: random.Random, counts: Counts) -> Iterator[Document]:
        from pydoc_data.topics import topics

        for topic, text in sorted(topics.items()):
            yield Document(f"topics/{topic}", text)
        root = Path(sysconfig.get_path("stdlib"))
        for file in sorted(root.rglob("*.py")):
            if not _NOT_STDLIB & set(file.relative_to(root).parts):
                name = f"Lib/{file.relative_to(root)}"
                yield Document(name, file.read_text("utf-8", errors="replace"))


def _printed(name: str) -> str:
    """Return a name as text: bytes of a file's name that are not UTF-8 are spelt out."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def _length(doc: Document) -> int:
    """Return the share of the buffer that a document takes, in characters."""
    return len(doc.text) if doc.ids is None else ID_CHARACTERS * len(doc.ids)


def _shuffled(docs: Iterator[Document], rng: random.Random) -> Iterator[Document]:
    """Yield documents at random from a buffer of BUFFER_CHARACTERS."""
    buffer: list[Document] = []
    held = 0

    def draw() -> Document:
        chosen = rng.randrange(len(buffer))
        buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
        return buffer.pop()

    for doc in docs:
        buffer.append(doc)
        held += _length(doc)
        while held > BUFFER_CHARACTERS:
            drawn = draw()
            held -= _length(drawn)
            yield drawn
    while buffer:
        yield draw()
