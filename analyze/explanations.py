"""Explanations of heads in RUN/analysis/explanations.jsonl, a line for each answer.

    {"head": 17, "text": "...", "model": "..."}                            an explanation
    {"head": 17, "score": 0.85, "n_scored": 20, "scorer": "..."}           its score
    {"head": 17, "score": null, "n_scored": 0, "scorer": null}             too little was held out
    {"head": 17, "error": "..."}                                           request failed

The last line of a kind counts. Lines are flushed to the disk one by one and never changed; each has
a checksum of its own. A line that a crash tore, or that is none of these, is skipped.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from ..errors import AnalyzeError
from ..seal import SUM, summed, unsummed

EXPLANATIONS = "explanations.jsonl"


def read_explanations(path: Path) -> dict[int, dict[str, Any]]:
    """Return the explanations, by head.

    Returns:
        "text", one line; "model" that wrote it; "score", balanced accuracy in 0..1, or None;
        "n_scored", contexts of the score, 0 if too few were held out, None if it is not scored
        yet; "scorer", the model that was tried, or None.

    Raises:
        AnalyzeError: the file is there and cannot be read, or a line is damaged.
    """
    found: dict[int, dict[str, Any]] = {}
    for head, entry in _entries(path):
        if isinstance(entry.get("text"), str):
            found[head] = {
                "text": entry["text"],
                "model": entry.get("model"),
                "score": None,
                "n_scored": None,
                "scorer": None,
            }
        elif head in found and isinstance(entry.get("n_scored"), int):
            found[head] |= {name: entry.get(name) for name in ("score", "n_scored", "scorer")}
    return found


def read_failed(path: Path) -> set[int]:
    """Return the heads whose last line is an error.

    Raises:
        AnalyzeError: the file is there and cannot be read, or a line is damaged.
    """
    last = dict(_entries(path))
    return {head for head, entry in last.items() if "error" in entry}


def _entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the heads and the lines of a file, if it is there."""
    try:
        *lines, torn = path.read_text("utf-8", "replace").split("\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise AnalyzeError(f"{path} cannot be read ({error.strerror}); repair or move it") from None
    for number, line in enumerate([*lines, torn], 1):
        try:
            entry = unsummed(line, constant=lambda name: None)  # no NaN
        except ValueError as error:
            if number > len(lines) or _was_torn(line):
                continue
            raise AnalyzeError(
                f"{path}: line {number} is damaged ({error}); restore the file from a copy, or "
                "delete that line"
            ) from None
        if isinstance(entry, dict) and isinstance(head := entry.get("head"), int):
            yield head, entry


def _was_torn(line: str) -> bool:
    """Return whether a line is one of before, which a crash tore and the next call ended."""
    return f'"{SUM}' not in line and not line.endswith("}")


class Record:
    """File of explanations, open for more lines by one process at a time."""

    def __init__(self, path: Path) -> None:
        """Open and lock the file; a last line that a crash tore is dropped.

        Raises:
            AnalyzeError: it cannot be written, or another process writes it.
        """
        self._path = path
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise self._failed(error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise AnalyzeError(f"{path} is being written by another process; wait for it") from None
        self._file.seek(0)
        torn = self._file.read().rpartition(b"\n")[2]
        if not torn:
            return
        try:
            unsummed(torn)
        except ValueError:
            self._file.truncate(self._file.tell() - len(torn))
        else:
            self._write(b"\n")  # which is all that it lacks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, line: dict[str, Any]) -> None:
        """Append a line; on return it is on the disk.

        Raises:
            AnalyzeError: the disk does not take it.
        """
        self._write(json.dumps(summed(line)).encode() + b"\n")

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> AnalyzeError:
        return AnalyzeError(f"{self._path} cannot be written ({error.strerror}); make room for it")
