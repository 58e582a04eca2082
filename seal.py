"""Seals: sizes and checksums of a folder's files, written last, and sums within files.

    seal.json  {"format": "lorsa-seal", "schema_version": 1, "crc32c": of `files`,
                "files": {"config.json": {"size": bytes, "crc32c": "0a1b2c3d"}, ...}}

Files that are written alone, or line by line, have a member "crc32c" of their own: the sum of all
the others. A folder or file of before has neither: no damage, but nothing to compare.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from .reading import parse_json, read_json
from .whole import finite, json_text, write_json

SEAL = "seal.json"
SEAL_VERSION = 1
FORMAT = "lorsa-seal"
SUM = "crc32c"
"""Name of the sum within a file or line of JSON."""
BLOCK_BYTES = 1 << 22


def crc32c(data: Any, start: int = 0) -> int:
    """Return the crc32c of a buffer's bytes, after those that gave `start`."""
    crc: int = google_crc32c.extend(start, np.frombuffer(data, np.uint8))
    return crc


def hexadecimal(crc: int) -> str:
    """Return a crc32c as seals have it: 8 hexadecimal digits."""
    return f"{crc:08x}"


def json_crc32c(content: Any) -> str:
    """Return the crc32c of JSON-able data, whatever its order of names and its spaces."""
    return hexadecimal(crc32c(json.dumps(content, sort_keys=True).encode()))


def seal_of(files: Mapping[str, Path | bytes]) -> dict[str, Any]:
    """Return the content of seal.json.

    Args:
        files: each file, or its content, by its name in the folder: a relative path with slashes.

    Raises:
        OSError: a file cannot be read.
    """
    facts = {name: _facts(files[name]) for name in sorted(files)}
    return {
        "format": FORMAT,
        "schema_version": SEAL_VERSION,
        "crc32c": json_crc32c(facts),
        "files": facts,
    }


def write_seal(folder: Path, names: Iterable[str], last: Mapping[str, Any] | None = None) -> None:
    """Write the seal of some files of a folder, after all of them.

    Args:
        folder: of the files and the seal.
        names: of the files, relative paths with slashes.
        last: what `write_json` writes by name after the seal, of a folder that is not whole
            without it.

    Raises:
        OSError: a file cannot be read, or the seal not be written.
    """
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    files |= {name: json_text(content).encode() for name, content in (last or {}).items()}
    write_json(folder / SEAL, seal_of(files))


def is_sealed(folder: Path) -> bool:
    """Return whether a folder has a seal."""
    return (folder / SEAL).exists()


def check_seal(folder: Path, only: Collection[str] | None = None) -> list[str]:
    """Return what is wrong with a sealed folder, a line for each file; nothing if it is not sealed.

    Files that the seal does not name are not looked at.

    Args:
        folder: with a seal or without.
        only: names of files; None compares all that the seal names.
    """
    try:
        checks = list(_checks(folder, only))
    except OSError as error:
        return [f"{folder / SEAL} cannot be read ({error.strerror})"]
    return [line for check in checks if (line := _tried(check)) is not None]


def first_damage(folder: Path, only: Collection[str] | None = None) -> str | None:
    """Return the first thing that is wrong, as `check_seal` has it; None if there is none.

    Raises:
        OSError: a file is there and cannot be read, which says nothing of its content.
    """
    for check in _checks(folder, only):
        if (problem := check.problem()) is not None:
            return problem
    return None


def summed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON-able data with the checksum of all of it, as `read_summed` compares it."""
    plain = json.loads(json.dumps(finite(content)))
    return {**plain, SUM: json_crc32c(plain)}


def write_summed(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with its own checksum, whole or not at all."""
    write_json(path, summed(content))


def read_summed(path: Path, *, constant: Callable[[str], Any] | None = None) -> Any:
    """Return JSON from a file without its own checksum, which is compared if it has one.

    Args:
        path: of the file.
        constant: as of `parse_json`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, or not what was written.
    """
    return _compared(read_json(path, constant=constant))


def unsummed(text: bytes | str, *, constant: Callable[[str], Any] | None = None) -> Any:
    """Return what a text of JSON holds, as `read_summed` does.

    Raises:
        ValueError: it is no JSON, or not what was written.
    """
    return _compared(parse_json(text, constant=constant))


def _compared(content: Any) -> Any:
    if isinstance(content, dict) and SUM in content:
        expected = content.pop(SUM)
        if expected != json_crc32c(content):
            raise ValueError("its checksum is wrong")
    return content


class _Check(NamedTuple):
    """A file of a sealed folder, or what is wrong with its seal."""

    folder: Path
    name: str
    facts: Any
    wrong: str | None = None

    def problem(self) -> str | None:
        """Return what is wrong in a line; OSError if the file is there and cannot be read."""
        return self.wrong or _problem(self.folder, self.name, self.facts)


def _tried(check: _Check) -> str | None:
    try:
        return check.problem()
    except OSError as error:
        return f"{check.folder / check.name} cannot be read ({error.strerror})"


def _checks(folder: Path, only: Collection[str] | None) -> Iterator[_Check]:
    """Yield the files that a seal names; OSError if it is there and cannot be read."""
    path = folder / SEAL
    try:
        content = read_json(path)
    except FileNotFoundError:
        return
    except ValueError:
        yield _Check(folder, SEAL, None, f"{path} is damaged (it is no JSON)")
        return
    wrong = _wrong_with(content)
    if wrong is not None:
        yield _Check(folder, SEAL, None, f"{path} {wrong}")
        return
    for name, facts in content["files"].items():
        if only is None or name in only:
            yield _Check(folder, name, facts)


def _wrong_with(content: Any) -> str | None:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return "is damaged (it is no seal)"
    if content.get("schema_version") != SEAL_VERSION:
        return "is of another version of lorsa; check with the one that wrote it"
    files = content.get("files")
    if not isinstance(files, dict) or json_crc32c(files) != content.get("crc32c"):
        return "is damaged (its own checksum is wrong)"
    return None


def _facts(content: Path | bytes) -> dict[str, Any]:
    if isinstance(content, bytes):
        return {"size": len(content), "crc32c": hexadecimal(crc32c(content))}
    size, crc = 0, 0
    with content.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            size, crc = size + len(block), crc32c(block, crc)
    return {"size": size, "crc32c": hexadecimal(crc)}


def _problem(folder: Path, name: str, facts: Any) -> str | None:
    """Return what is wrong with a file that a seal names; OSError if it cannot be read."""
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts or not name.isprintable():
        return f"{folder / SEAL} names {name!r}, which is no file of the folder"
    path = folder / name
    try:
        size = path.stat().st_size
        expected = facts.get("size") if isinstance(facts, dict) else None
        if size != expected:
            return f"{path} has {size} bytes; {expected} were written"
        if _facts(path) != facts:
            return f"{path} is damaged (its checksum is wrong)"
    except (FileNotFoundError, NotADirectoryError):
        return f"{path} is missing"
    return None
