"""An analysis on disk, written whole and read back.

analysis = Analysis.open("runs/layer-12")
analysis.heads                      # a row per OV head, pyarrow
analysis.examples(301)              # where head 301 fired, a list of dicts
analysis.text(analysis.tokens(seq)) # the tokens of a sequence as text
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ..dictionaries.choices import CONFIG
from ..errors import AnalyzeError, unreadable
from ..language.spelling import is_piece, whole_characters
from ..reading import read_json
from ..seal import SEAL, first_damage, write_seal
from ..store.parquet import Part, numbers, read_parquet
from ..whole import whole, write_json
from .config import ANALYSIS_FOLDER
from .explanations import EXPLANATIONS, read_explanations
from .schema import FACTS_FILE, PARTIAL_FILE, READABLE, TABLES, VERSION, require_whole

NEEDED = ("run", "layer", "model", "store_uuid", "with_model", "n_tokens", "n_ctx")
"""Facts that every analysis must have."""
EXAMPLES_PER_GROUP = 8192
"""Rows of examples.parquet that are read at once for a head."""


class Analysis:
    """Result of `lorsa analyze`, open for reading."""

    def __init__(self, root: Path, facts: dict[str, Any]) -> None:
        """Take a folder that was checked; use `open`."""
        self.root = root
        self.facts = facts
        """Content of analysis.json: version, run, layer, model, store, n_tokens, n_ctx, ..."""

    @classmethod
    def open(cls, where: str | Path) -> "Analysis":
        """Open the analysis of a run.

        Args:
            where: the run's folder, or the folder of the analysis itself.

        Raises:
            AnalyzeError: there is none, it is unfinished, damaged, or of another version; or it
                cannot be read.
        """
        try:
            return cls.compared(where)
        except OSError as error:
            raise AnalyzeError(unreadable(where, error)) from None

    @classmethod
    def compared(cls, where: str | Path) -> "Analysis":
        """Open the analysis of a run as `open` does, after comparing its files with their seal.

        Raises:
            AnalyzeError: as of `open`.
            OSError: a file is there and cannot be read, which says nothing of its content.
        """
        where = Path(where)
        itself = (where / FACTS_FILE).exists() or (where / PARTIAL_FILE).exists()
        root = where if itself else where / ANALYSIS_FOLDER
        if not (root / FACTS_FILE).exists():
            if (kind := _kind_of(where)) not in (None, "lorsa"):
                raise AnalyzeError(
                    f"{where} is of kind {kind}, and only Lorsas are analysed; lorsa eval and "
                    "lorsa ablate --features 17,301 take it"
                )
            state = "is unfinished; the same command goes on" if root.is_dir() else "is not there"
            raise AnalyzeError(f"{root} {state}: lorsa analyze {where}")
        if (problem := first_damage(root)) is not None:
            raise AnalyzeError(f"{problem}; restore it from a copy, or analyze again")
        try:
            facts = read_json(root / FACTS_FILE)
            version = facts["version"]
            _ = [facts[name] for name in NEEDED]
        except (ValueError, KeyError, TypeError):
            raise AnalyzeError(
                f"{root / FACTS_FILE} is damaged; restore it from a copy, or analyze again"
            ) from None
        if version not in READABLE:
            raise AnalyzeError(
                f"{root} is of version {version}; this lorsa reads {READABLE[0]} to {VERSION}: "
                "analyze again"
            )
        missing = [name for name in TABLES if not (root / f"{name}.parquet").exists()]
        if missing:
            raise AnalyzeError(f"{root} lacks {missing[0]}.parquet; analyze again")
        return cls(root, facts)

    @cached_property
    def heads(self) -> pa.Table:
        """Table of heads.parquet; row i is head i."""
        return self._read("heads")

    def head(self, head: int) -> dict[str, Any]:
        """Return a head's row.

        Raises:
            AnalyzeError: there is no such head.
        """
        if not 0 <= head < self.heads.num_rows:
            raise AnalyzeError(f"head {head} is not there; heads are 0..{self.heads.num_rows - 1}")
        row: dict[str, Any] = self.heads.slice(head, 1).to_pylist()[0]
        return row

    def examples(self, head: int) -> list[dict[str, Any]]:
        """Return a head's rows of examples.parquet: the top ones first, then samples."""
        rows: list[dict[str, Any]] = self.examples_of(range(head, head + 1)).to_pylist()
        return sorted(rows, key=lambda row: (row["kind"] != "top", row["rank"]))

    def examples_of(self, heads: range) -> pa.Table:
        """Return the rows of examples.parquet of consecutive heads, in the order of the file."""
        return self._read("examples", Part("head", heads))

    def tokens(self, seq: int) -> npt.NDArray[np.int32]:
        """Return the token ids of a sequence that some example lies in, [n_ctx]."""
        row, found = self._sequences
        ids: npt.NDArray[np.int32] = found[row[seq]]
        return ids

    def text(self, ids: Sequence[int] | npt.NDArray[np.int32]) -> list[str]:
        """Return the text of each token; "<123>" where no tokenizer was at hand."""
        return [self._texts.get(int(i)) or f"<{int(i)}>" for i in ids]

    def passage(self, seq: int) -> list[tuple[range, str]]:
        """Return the text of a sequence by places of tokens.

        A text is of one token, or of those that are pieces of the same characters.
        """
        return whole_characters(self.text(self.tokens(seq)))

    def joined(self, seq: int, part: range) -> list[tuple[range, str]]:
        """Return what of a part of a sequence, as of `passage`, is of several tokens."""
        ids = self.tokens(seq)
        if self._pieces.isdisjoint(ids[part.start : part.stop].tolist()):
            return []
        first, end = part.start, part.stop
        while first > 0 and int(ids[first - 1]) in self._pieces:
            first -= 1
        while end < len(ids) and int(ids[end]) in self._pieces:
            end += 1
        found = whole_characters(self.text(ids[first:end]))
        moved = [(range(first + at.start, first + at.stop), text) for at, text in found]
        return [(at, text) for at, text in moved if len(at) > 1 and set(at) & set(part)]

    @property
    def has_text(self) -> bool:
        """Whether a tokenizer was at hand."""
        return any(self._texts.values())

    def read_all(self) -> None:
        """Read every table.

        Raises:
            AnalyzeError: one cannot be read.
        """
        for name in TABLES:
            self._read(name)

    def explanations(self) -> dict[int, dict[str, Any]]:
        """Return the explanations of heads, by head; see `read_explanations`."""
        return read_explanations(self.root / EXPLANATIONS)

    @property
    def vocabulary(self) -> tuple[list[int], list[str | None]]:
        """Ids and texts of tokens.parquet; a text is None where no tokenizer was at hand."""
        return list(self._texts), list(self._texts.values())

    @cached_property
    def _sequences(self) -> tuple[dict[int, int], npt.NDArray[np.int32]]:
        table = self._read("sequences")
        row = {seq: i for i, seq in enumerate(table["seq"].to_pylist())}
        flat = numbers(pa.chunked_array([table["tokens"].combine_chunks().flatten()]))
        if len(row) != table.num_rows or len(flat) != len(row) * self.facts["n_ctx"]:
            raise self._unreadable("sequences", "it has a sequence twice, or not all tokens of one")
        return row, flat.reshape(len(row), -1) if row else flat.reshape(0, 0)

    @cached_property
    def _texts(self) -> dict[int, str | None]:
        table = self._read("tokens")
        return dict(zip(table["token"].to_pylist(), table["text"].to_pylist(), strict=True))

    @cached_property
    def _pieces(self) -> set[int]:
        """Tokens that are parts of characters."""
        return {token for token, text in self._texts.items() if text is not None and is_piece(text)}

    def _read(self, name: str, part: Part | None = None) -> pa.Table:
        path = self.root / f"{name}.parquet"
        try:
            table = read_parquet(path, TABLES[name], part=part)
            require_whole(table, name)
            return table
        except (OSError, MemoryError, ValueError, pa.ArrowException) as error:
            raise AnalyzeError(unreadable(path, error)) from None

    def _unreadable(self, name: str, reason: str) -> AnalyzeError:
        return AnalyzeError(f"{self.root / name}.parquet cannot be read ({reason})")


def write_analysis(root: Path, facts: dict[str, Any], tables: dict[str, pa.Table]) -> None:
    """Write an analysis: its tables, their seal, and analysis.json last.

    Args:
        root: its folder, created if it is not there.
        facts: for analysis.json; the version is added.
        tables: by the names of TABLES and in their schemas; examples sorted by head.

    Raises:
        AnalyzeError: the disk does not take it.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / FACTS_FILE).unlink(missing_ok=True)
        (root / SEAL).unlink(missing_ok=True)
        for name, table in tables.items():
            with whole(root / f"{name}.parquet") as partial:
                pq.write_table(
                    table.cast(TABLES[name]),
                    partial,
                    compression="zstd",
                    row_group_size=EXAMPLES_PER_GROUP,
                )
        content = {"version": VERSION, **facts}
        write_seal(root, [f"{name}.parquet" for name in tables], {FACTS_FILE: content})
        write_json(root / FACTS_FILE, content)
    except OSError as error:
        raise AnalyzeError(f"{root} cannot be written ({error}); make room") from None


def _kind_of(run: Path) -> str | None:
    """Return the kind of a run's dictionary where its config.json names one; Lorsas' has none."""
    try:
        found: str | None = read_json(run / CONFIG).get("kind")
    except (OSError, ValueError, AttributeError):
        return None
    return found
