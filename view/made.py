"""What a page was made of: by it, one that is up to date is not made again.

made.json, beside the page's data and sealed with them:

    {"of": {file of the analysis: CRC-32}, "by": CRC-32 of the program}
"""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

from ..analyze.explanations import EXPLANATIONS
from ..analyze.schema import FACTS_FILE, TABLES
from ..reading import read_json
from ..version import __version__
from ..whole import file_crc32, write_json
from .files import STATIC, data_folder, page_problems

MADE = "made.json"
HERE = Path(__file__).parent


class Origin(NamedTuple):
    """An analysis and a program, as a page is made of them."""

    of: dict[str, int]
    """CRC-32 of each file of the analysis"""
    by: int
    """CRC-32 of the program that makes pages"""


def origin_of(analysis: Path) -> Origin:
    """Return what a page of an analysis would be made of now.

    Args:
        analysis: its folder.

    Raises:
        OSError: a file cannot be read.
    """
    names = (FACTS_FILE, EXPLANATIONS, *(f"{name}.parquet" for name in TABLES))
    there = [analysis / name for name in names if (analysis / name).exists()]
    return Origin({path.name: file_crc32(path) for path in there}, _program())


def keep_origin(folder: Path, origin: Origin) -> None:
    """Write made.json into the folder of a page's data."""
    write_json(folder / MADE, origin._asdict())


def current_folder(out: Path, origin: Origin) -> Path | None:
    """Return the folder of a page's data, if it is whole and of this origin.

    Args:
        out: folder of the page.
        origin: what it has to be made of.
    """
    try:
        folder = data_folder(out)
        if folder is None or page_problems(out) != []:
            return None
        made: Any = read_json(folder / MADE)
        return folder if (made["of"], made["by"]) == origin else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # whatever it is, a new one takes its place


def _program() -> int:
    """Return a CRC-32 of the program by which an analysis becomes a page."""
    crc = zlib.crc32(__version__.encode())
    for folder in (HERE, STATIC, HERE.parent / "analyze"):
        for path in sorted(folder.iterdir()):
            if path.is_file():
                crc = zlib.crc32(path.read_bytes(), crc)
    return crc
