"""Seals of folders: sizes and checksums of files, written last.

    seal.json  {"format": "lorsa-seal", "schema_version": 1, "crc32c": of `files`,
                "files": {"config.json": {"size": bytes, "crc32c": "0a1b2c3d"}, ...}}

A folder without a seal, as those of before, is not sealed: no damage, but nothing to compare.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import google_crc32c
import numpy as np

from .reading import read_json
from .whole import write_json

SEAL = "seal.json"
SEAL_VERSION = 1
FORMAT = "lorsa-seal"
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


def write_seal(folder: Path, names: Iterable[str]) -> None:
    """Write the seal of some files of a folder, after all of them.

    Args:
        folder: of the files and the seal.
        names: of the files, relative paths with slashes.

    Raises:
        OSError: a file cannot be read, or the seal not be written.
    """
    write_json(folder / SEAL, seal_of({name: folder / name for name in names}))


def is_sealed(folder: Path) -> bool:
    """Return whether a folder has a seal."""
    return (folder / SEAL).exists()


def check_seal(folder: Path) -> list[str]:
    """Return what is wrong with a sealed folder, a line for each file; nothing if it is not sealed.

    Files that the seal does not name are not looked at.
    """
    try:
        content = read_json(folder / SEAL)
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"{folder / SEAL} cannot be read ({error.strerror})"]
    except ValueError:
        return [f"{folder / SEAL} is damaged (it is no JSON)"]
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return [f"{folder / SEAL} is damaged (it is no seal)"]
    if content.get("schema_version") != SEAL_VERSION:
        return [f"{folder / SEAL} is of another version of lorsa; check with the one that wrote it"]
    files = content.get("files")
    if not isinstance(files, dict) or json_crc32c(files) != content.get("crc32c"):
        return [f"{folder / SEAL} is damaged (its own checksum is wrong)"]
    found = [_problem(folder, name, facts) for name, facts in files.items()]
    return [problem for problem in found if problem is not None]


def _facts(content: Path | bytes) -> dict[str, Any]:
    if isinstance(content, bytes):
        return {"size": len(content), "crc32c": hexadecimal(crc32c(content))}
    size, crc = 0, 0
    with content.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            size, crc = size + len(block), crc32c(block, crc)
    return {"size": size, "crc32c": hexadecimal(crc)}


def _problem(folder: Path, name: str, facts: Any) -> str | None:
    """Return what is wrong with a file that a seal names, in a line."""
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
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None
