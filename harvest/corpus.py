"""Text in: documents of a file, a folder, or Python's own library, in a seeded order.

Files are visited in a random order and documents pass through a shuffle buffer. Many files, or the
rows of .jsonl and .parquet files, may be larger than memory; what is smaller than the buffer is
shuffled whole.
"""

import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import HarvestError

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".py")
TABLE_SUFFIXES = (".jsonl", ".parquet")
KNOWN_SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES
BUFFER_CHARACTERS = 64_000_000
STDLIB = "stdlib"
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class Document(NamedTuple):
    """One text."""

    name: str
    """File, or file and row."""
    text: str


def documents(data: str, *, text_column: str, seed: int) -> Iterator[Document]:
    """Yield a corpus's documents that hold text, in an order fixed by the seed.

    Args:
        data: "stdlib", a file, or a folder of files (.txt .md .rst .py, .jsonl, .parquet).
        text_column: field of a .jsonl or .parquet row that holds the text.
        seed: of the order.

    Raises:
        HarvestError: no such path, no file of a known kind, or no such column.
    """
    rng = random.Random(seed)
    if data == STDLIB:
        yield from _shuffled(_stdlib(), rng)
        return
    if not data.strip():
        raise HarvestError("data is empty; give a file, a folder, or stdlib")
    root = Path(data).expanduser()
    files = _files(root)
    rng.shuffle(files)
    everything = (doc for file in files for doc in _read(file, root, text_column))
    yield from _shuffled(everything, rng)


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise HarvestError(
            f"data {root}: no such file or folder; give one, or {STDLIB} for Python's own texts"
        )
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in KNOWN_SUFFIXES and p.is_file())
    if not files:
        raise HarvestError(f"data {root}: the folder has no {', '.join(KNOWN_SUFFIXES)} file")
    return files


def _read(file: Path, root: Path, text_column: str) -> Iterator[Document]:
    name = file.name if file == root else str(file.relative_to(root))
    try:
        if file.suffix.lower() == ".jsonl":
            yield from _read_jsonl(file, name, text_column)
        elif file.suffix.lower() == ".parquet":
            yield from _read_parquet(file, name, text_column)
        else:
            text = file.read_text("utf-8", errors="replace")
            if "\0" in text:
                raise HarvestError(f"data {file}: is no text; give {', '.join(KNOWN_SUFFIXES)}")
            yield Document(name, text)
    except (OSError, pa.ArrowException) as error:
        raise HarvestError(f"data {file}: cannot be read ({error})") from None


def _read_jsonl(file: Path, name: str, text_column: str) -> Iterator[Document]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise HarvestError(f"data {file}: line {number + 1} is no JSON ({error})") from None
            if not isinstance(row, dict) or text_column not in row:
                columns = ", ".join(row) if isinstance(row, dict) else "no fields"
                raise _no_column(file, text_column, columns)
            yield Document(f"{name}:{number}", _as_text(row[text_column], file, text_column))


def _read_parquet(file: Path, name: str, text_column: str) -> Iterator[Document]:
    with pq.ParquetFile(file) as table:
        if text_column not in table.schema_arrow.names:
            raise _no_column(file, text_column, ", ".join(table.schema_arrow.names))
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=[text_column]):
            for text in batch.column(0).to_pylist():
                yield Document(f"{name}:{number}", _as_text(text, file, text_column))
                number += 1


def _as_text(value: object, file: Path, text_column: str) -> str:
    if not isinstance(value, str | None):
        raise HarvestError(f"data {file}: column {text_column!r} holds no text; choose another")
    return value or ""


def _no_column(file: Path, text_column: str, columns: str) -> HarvestError:
    return HarvestError(
        f"data {file}: no column {text_column!r}; there is {columns}; choose one by --text-column"
    )


def _stdlib() -> Iterator[Document]:
    """Yield the topics of Python's help and the sources of its standard library."""
    from pydoc_data.topics import topics

    for topic, text in sorted(topics.items()):
        yield Document(f"topics/{topic}", text)
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if not _NOT_STDLIB & set(file.relative_to(root).parts):
            name = f"Lib/{file.relative_to(root)}"
            yield Document(name, file.read_text("utf-8", errors="replace"))


def _shuffled(docs: Iterator[Document], rng: random.Random) -> Iterator[Document]:
    """Yield documents with text from a buffer of BUFFER_CHARACTERS, at random."""
    buffer: list[Document] = []
    held = 0

    def draw() -> Document:
        chosen = rng.randrange(len(buffer))
        buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
        return buffer.pop()

    for doc in docs:
        if not doc.text.strip():
            continue
        buffer.append(doc)
        held += len(doc.text)
        while held > BUFFER_CHARACTERS:
            drawn = draw()
            held -= len(drawn.text)
            yield drawn
    while buffer:
        yield draw()
