"""Documents of files, a Hub dataset or Python's own library, in a seeded order.

Files are read in a random order and documents pass through a shuffle buffer. A corpus may be larger
than memory; one smaller than the buffer is shuffled whole.
"""

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ...errors import HarvestError
from .choices import STDLIB, config_of, is_hub_id
from .document import Column, Counts, Document
from .files import LocalFiles
from .hub_data import HubDataset

BUFFER_CHARACTERS = 64_000_000
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

    def documents(self) -> Iterator[Document]:
        """Yield the documents that are not empty, in the order of the seed.

        Raises:
            HarvestError: there is none, or the source fails.
        """
        rng = random.Random(self._seed)
        n_documents = 0
        for doc in _shuffled(self._whole(self._source.read(rng, self.counts)), rng):
            n_documents += 1
            yield doc
        if not n_documents:
            counts = f" ({self.counts})" if str(self.counts) else ""
            raise self._source.problem or HarvestError(
                f"data {self._data} holds no text{counts}; give another by --data"
            )

    def _whole(self, docs: Iterator[Document]) -> Iterator[Document]:
        """Skip empty documents and repair what is not UTF-8."""
        for doc in docs:
            if doc.text.isspace() or not _length(doc):
                self.counts.add("empty_documents", doc.name)
                continue
            if not doc.text.isascii():
                doc = self._repaired(doc)
            yield doc

    def _repaired(self, doc: Document) -> Document:
        try:
            doc.text.encode()
        except UnicodeEncodeError:  # surrogates, of invalid bytes or of JSON
            self.counts.add("repaired_documents", doc.name)
            text = doc.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return doc._replace(text=text)
        return doc


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
    root = Path(data).expanduser()
    if not root.is_file() and not root.is_dir():
        raise HarvestError(
            f"data {root}: no such file or folder; give one, the id of a Hub dataset (owner/name), "
            f"or {STDLIB} for Python's own texts"
        )
    return Corpus(data, LocalFiles(root, column), seed=seed)


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
