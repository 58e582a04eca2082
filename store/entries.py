"""The committed files of a store, with the facts of each.

A large store has a million of them. They are held in one array of records, a row for every shard
and a column for every array. An `Entry` is made when it is asked for.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .parquet import numbers

MOST_EMPTY = 64
"""Times as many cells as rows that shards and arrays of a table may make."""


class Entry(NamedTuple):
    """One committed file: one shard of one array."""

    shard: int
    array: str
    """Path of the array in the store, such as layers/12/attn_in."""
    n_seq: int
    n_bytes: int
    crc32c: int
    """Checksum of the file, see `shard`."""
    norm_sum: float
    """Sum over the finite tokens of an array of norms, or of int8's scales; 0 for other arrays. In
    format 1 the sum of a site's norms is that of its activations, or where these are derived of
    `norms`."""
    square_sum: float
    """Sum of the squares of these norms or scales."""
    n_nonfinite: int = 0
    """Tokens with NaN or Inf."""
    max_scale: float = 0.0
    """Largest scale of int8; 0 for all other arrays."""


Key = tuple[int, str]
"""Shard and array of an entry."""
_ARRAY = re.compile(r"(layers/(0|[1-9][0-9]{0,8})/)?[a-z][a-z0-9_]*")
"""Allowed names of arrays: none of them leads out of the store."""
_KINDS: dict[str, tuple[Any, pa.DataType]] = {
    "shard": (np.int32, pa.int32()),
    "array": (None, pa.string()),
    "n_seq": (np.int32, pa.int32()),
    "n_bytes": (np.int64, pa.int64()),
    "crc32c": (np.uint32, pa.uint32()),
    "norm_sum": (np.float64, pa.float64()),
    "square_sum": (np.float64, pa.float64()),
    "n_nonfinite": (np.int64, pa.int64()),
    "max_scale": (np.float64, pa.float64()),
}
_INTEGERS = ("shard", "n_seq", "n_bytes", "crc32c", "n_nonfinite")
SCHEMA = pa.schema([(name, kind) for name, (_, kind) in _KINDS.items()])
_LARGEST = {n: int(np.iinfo(kind).max) for n, (kind, _) in _KINDS.items() if n in _INTEGERS}
_FACTS = [name for name in _KINDS if name not in ("shard", "array")]
_CELL = np.dtype([("state", "u1"), ("rank", "i4"), *((name, _KINDS[name][0]) for name in _FACTS)])
_DROPPED, _COMMITTED = 1, 2
"""States of a cell; 0 where the file was never mentioned."""
Cells = npt.NDArray[np.void]


def entry_of(fields: dict[str, Any]) -> Entry:
    """Return an entry read from a disk; ValueError or TypeError if it cannot be one."""
    entry = Entry(**fields)
    _require_array(entry.array)
    for name in _LARGEST:
        _require_integer(name, getattr(entry, name))
    for name in ("norm_sum", "square_sum", "max_scale"):
        _require_float(name, getattr(entry, name))
    return entry


def key_of(shard: Any, array: Any) -> Key:
    """Return a key read from a disk; ValueError or TypeError if it cannot be one."""
    _require_integer("shard", shard)
    _require_array(array)
    return shard, array


def _require_integer(name: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value <= _LARGEST[name]:
        raise ValueError(f"{name} is {value!r}")


def _require_array(name: str) -> None:
    if not _ARRAY.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an array")


def _require_float(name: str, value: float) -> None:
    least = 0.0 if name == "max_scale" else -math.inf
    if not math.isfinite(value) or value < least:
        raise ValueError(f"{name} is {value!r}")


class Entries(Mapping[Key, Entry]):
    """Committed files by shard and array, in the order of both.

    Files that were dropped are remembered too. Each file has a rank: the number of the journal file
    that mentioned it last. A mention of lower rank does not change what one of higher rank says.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        """Begin with some entries."""
        self._rows: dict[int, int] = {}
        self._columns: dict[str, int] = {}
        self._cells: Cells = np.zeros((0, 0), _CELL)
        self._n_committed = 0
        self.put(entries)

    def put(self, entries: Iterable[Entry], rank: int | None = None) -> None:
        """Add or replace committed files; without a rank, whatever the rank of earlier mentions."""
        each = list(entries)
        self._grow((e.shard for e in each), (e.array for e in each))
        for shard, array, *facts in each:
            at = self._rows[shard], self._columns[array]
            state, known, *_ = self._cells[at].item()
            if rank is None or rank >= known:
                self._cells[at] = (_COMMITTED, known if rank is None else rank, *facts)
                self._n_committed += state != _COMMITTED

    def drop(self, keys: Iterable[Key], rank: int) -> None:
        """Mark files as no longer committed."""
        each = list(keys)
        self._grow((shard for shard, _ in each), (array for _, array in each))
        for shard, array in each:
            at = self._rows[shard], self._columns[array]
            state, known, *_ = self._cells[at].item()
            if rank >= known:
                self._cells[at] = (_DROPPED, rank, *[0] * len(_FACTS))
                self._n_committed -= state == _COMMITTED

    def __getitem__(self, key: Key) -> Entry:
        if key not in self:
            raise KeyError(key)
        _, _, *facts = self._cells[self._rows[key[0]], self._columns[key[1]]].item()
        return Entry(*key, *facts)

    def __contains__(self, key: object) -> bool:
        shard, array = key if isinstance(key, tuple) else (None, None)
        row, column = self._rows.get(shard), self._columns.get(array)
        if row is None or column is None:
            return False
        return bool(self._cells["state"][row, column] == _COMMITTED)

    def __iter__(self) -> Iterator[Key]:
        return ((entry.shard, entry.array) for entry in self.in_order())

    def __len__(self) -> int:
        return self._n_committed

    def in_order(self) -> Iterator[Entry]:
        """Yield the entries by shard, then array; faster than looking up one by one."""
        names = sorted(self._columns)
        columns = [self._columns[name] for name in names]
        for shard in sorted(self._rows):
            cells = self._cells[self._rows[shard], columns].tolist()
            for name, (state, _, *facts) in zip(names, cells, strict=True):
                if state == _COMMITTED:
                    yield Entry(shard, name, *facts)

    @property
    def shards(self) -> set[int]:
        """The shards with a file that was committed or dropped."""
        return set(self._rows)

    @property
    def n_bytes(self) -> int:
        """Bytes of all committed files."""
        return int(self._cells["n_bytes"].sum())  # 0 where nothing is committed

    def of(self, array: str) -> tuple[npt.NDArray[np.int64], Cells]:
        """Return the shards of which an array is committed, ascending, and the facts of each.

        Returns:
            Shards [n] and records [n] with the fields of `Entry`.
        """
        shards = np.array(sorted(self._rows), dtype=np.int64)
        if array not in self._columns:
            return shards[:0], np.zeros(0, _CELL)
        rows = [self._rows[shard] for shard in shards.tolist()]
        cells = self._cells[rows, self._columns[array]]
        there = cells["state"] == _COMMITTED
        return shards[there], cells[there]

    def whole(self, n_shards: int, arrays: Iterable[str]) -> npt.NDArray[np.bool_]:
        """Return whether these arrays of each shard are all committed, [n_shards]."""
        names = list(arrays)
        found = np.full(n_shards, not names)
        if names and all(name in self._columns for name in names):
            columns = [self._columns[name] for name in names]
            state = self._cells["state"][: len(self._rows)]
            rows = (state[:, columns] == _COMMITTED).all(axis=1)
            for shard, row in self._rows.items():
                if shard < n_shards:
                    found[shard] = rows[row]
        return found

    def last_rank(self, keys: Iterable[Key]) -> int | None:
        """Return the highest rank of some files; None if none of them was ever mentioned."""
        found = []
        for shard, array in keys:
            row, column = self._rows.get(shard), self._columns.get(array)
            if row is not None and column is not None:
                state, rank, *_ = self._cells[row, column].item()
                found += [rank] if state else []
        return max(found, default=None)

    def only(self, keep: Callable[[str], bool]) -> "Entries":
        """Return the entries of some arrays; this object itself if that is all of them."""
        names = [name for name in self._columns if keep(name)]
        if len(names) == len(self._columns):
            return self
        found = Entries()
        found._rows = dict(self._rows)
        found._columns = {name: column for column, name in enumerate(names)}
        found._cells = self._cells[:, [self._columns[name] for name in names]]
        found._n_committed = int((found._cells["state"] == _COMMITTED).sum())
        return found

    def _grow(self, shards: Iterable[int], arrays: Iterable[str]) -> None:
        """Give shards a row and arrays a column; a full dimension doubles."""
        for shard in shards:
            self._rows.setdefault(shard, len(self._rows))
        for array in arrays:
            self._columns.setdefault(array, len(self._columns))
        size = self._cells.shape
        needed = len(self._rows), len(self._columns)
        if needed[0] > size[0] or needed[1] > size[1]:
            larger = [
                max(new, 2 * old) if new > old else old
                for new, old in zip(needed, size, strict=True)
            ]
            cells = np.zeros(larger, _CELL)
            cells[: size[0], : size[1]] = self._cells
            self._cells = cells

    def to_arrow(self) -> pa.Table:
        """Return the table of shards.parquet."""
        shards, names = sorted(self._rows), sorted(self._columns)
        rows = np.array([self._rows[shard] for shard in shards], dtype=np.int64)
        columns = np.array([self._columns[name] for name in names], dtype=np.int64)
        state = self._cells["state"][np.ix_(rows, columns)]
        row, column = np.nonzero(state == _COMMITTED)
        facts = {
            name: pa.array(self._cells[name][rows[row], columns[column]], SCHEMA.field(name).type)
            for name in _FACTS
        }
        facts["shard"] = pa.array(np.array(shards, dtype=np.int32)[row])
        facts["array"] = pa.array(names, pa.string()).take(pa.array(column))
        return pa.table([facts[name] for name in SCHEMA.names], schema=SCHEMA)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "Entries":
        """Read the table of shards.parquet; ValueError if a row cannot be an entry."""
        values = {name: _column(table, name) for name in _KINDS if name != "array"}
        if table.column("array").null_count:
            raise ValueError("array is missing")
        arrays, column = array_names(table)
        for name in arrays:
            _require_array(name)
        shards, row = np.unique(values.pop("shard"), return_inverse=True)
        if len(shards) * len(arrays) > MOST_EMPTY * (len(row) + MOST_EMPTY):
            raise ValueError(f"{len(row)} rows are of {len(shards)} shards, {len(arrays)} arrays")
        found = cls()
        found._grow(shards.tolist(), arrays)
        for name, facts in values.items():
            found._cells[name][row, column] = facts
        found._cells["state"][row, column] = _COMMITTED
        found._n_committed = int((found._cells["state"] == _COMMITTED).sum())
        return found


def _column(table: pa.Table, name: str) -> npt.NDArray[Any]:
    """Return a column of numbers; where an older version wrote none, the field's default."""
    column = table.column(name)
    if column.null_count:
        if name not in Entry._field_defaults:
            raise ValueError(f"{name} is missing")
        column = column.fill_null(Entry._field_defaults[name])
    values = numbers(column)
    for extreme in (values.min(), values.max()) if len(values) else ():
        if values.dtype == np.float64:
            _require_float(name, float(extreme))
        elif extreme < 0:
            raise ValueError(f"{name} is {extreme}")
    return values


def array_names(table: pa.Table) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Return the names of arrays in order, and the number of each row's name among them."""
    column = table.column("array")
    if not pa.types.is_dictionary(column.type):
        column = pc.dictionary_encode(column)
    names = column.combine_chunks()
    texts = names.dictionary.to_pylist()
    order = sorted(range(len(texts)), key=texts.__getitem__)
    place = np.zeros(len(texts), np.int32)
    place[order] = np.arange(len(texts), dtype=np.int32)
    return [texts[i] for i in order], place[np.from_dlpack(names.indices)]
