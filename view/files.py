"""The files of a page, and how the page finds them.

A page that is opened from the disk may load scripts, but read no files. So data are scripts too:

    lorsaData("heads-12", "<base64 of gzip of JSON>")

Nothing of a corpus can end such a string or begin an element, whatever it holds.

    OUT/index.html          names the folder of all the rest; replaced last; ends in its checksum
    OUT/page-1f2e3d4c/      scripts and style; data-index.js, data-tokens.js, data-search.js,
                            data-heads-0.js, ...; made.json (made.py); seal.json (seal.py)
"""

import base64
import gzip
import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import AnalyzeError
from ..seal import SEAL, check_seal, crc32c, hexadecimal, is_sealed, write_seal
from ..whole import PARTIAL, whole, write_whole

STATIC = Path(__file__).parent / "static"
INDEX = "index.html"
_MARK = '<meta name="generator" content="lorsa view">'
_NAMED = re.compile(r'src="(page-[0-9a-f]{8})/data\.js"')
_SUM = b"<!-- crc32c "
_FOLDER = re.compile(r"page-[0-9a-f]{8}(\.partial)?")


def data_file(name: str, content: Any) -> bytes:
    """Return the script that hands the page some JSON by a name."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    packed = base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()
    return f'lorsaData("{name}","{packed}")\n'.encode()


def require_ours(out: Path) -> None:
    """Refuse a folder with an index.html of another program.

    Raises:
        AnalyzeError: it has one, or is a file.
    """
    if out.exists() and not out.is_dir():
        raise AnalyzeError(f"{out} is a file; --out takes a folder")
    index = out / INDEX
    if index.exists() and _MARK not in index.read_text("utf-8", errors="replace"):
        raise AnalyzeError(f"{index} is not a page of lorsa; choose another --out")


@contextmanager
def new_page(out: Path) -> Iterator[Path]:
    """Yield a folder for a page's data, which then takes an earlier page's place.

    A reader sees the old page or the new one. Other files in `out` stay as they are.
    """
    out.mkdir(parents=True, exist_ok=True)
    earlier = [path for path in out.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir()]
    folder = out / f"page-{secrets.token_hex(4)}"
    with whole(folder) as partial:
        partial.mkdir()
        for path in (*STATIC.glob("*.js"), *STATIC.glob("*.css")):
            (partial / path.name).write_bytes(path.read_bytes())
        yield partial
        write_seal(partial, sorted(path.name for path in partial.iterdir()))
    index = (STATIC / INDEX).read_text("utf-8").replace("@FOLDER@", folder.name).encode()
    write_whole(out / INDEX, index + _sum_of(index))
    for path in earlier:
        _remove(path)


def data_folder(out: Path) -> Path | None:
    """Return the folder of a page's data, as index.html names it; None if it names none.

    Raises:
        OSError: index.html cannot be read.
    """
    named = _NAMED.search((out / INDEX).read_text("utf-8", errors="replace"))
    return None if named is None else out / named[1]


def is_page(out: Path) -> bool:
    """Return whether a folder has a page of ours, damaged or not."""
    try:
        folder = data_folder(out)
    except OSError:
        return False
    return folder is not None and folder.is_dir()


def page_problems(out: Path) -> list[str] | None:
    """Return what is wrong with a page, a line for each file; None if an earlier version made it.

    Raises:
        OSError: index.html cannot be read.
    """
    text, _, end = (out / INDEX).read_bytes().rpartition(_SUM)
    folder = data_folder(out)
    if not text and (folder is None or not is_sealed(folder)):
        return None
    if folder is None or _SUM + end != _sum_of(text):
        return [f"{out / INDEX} is damaged (its checksum is wrong)"]
    return check_seal(folder) if is_sealed(folder) else [f"{folder / SEAL} is missing"]


def _sum_of(index: bytes) -> bytes:
    return _SUM + f"{hexadecimal(crc32c(index))} -->\n".encode()


def _remove(folder: Path) -> None:
    """Remove the files of an earlier page, and their folder unless it holds others."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.suffix in (".js", ".css", ".json", PARTIAL):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
