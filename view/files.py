"""The files of a page, and how the page finds them.

A page that is opened from the disk may load scripts, but read no files. So data are scripts too:

    lorsaData("heads-12", "<base64 of gzip of JSON>")

Nothing of a corpus can end such a string or begin an element, whatever it holds.

    OUT/index.html          names the folder of all the rest; replaced last
    OUT/page-1f2e3d4c/      scripts and style; data-index.js, data-tokens.js, data-search.js,
                            data-heads-0.js, ...; made.json (made.py)
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
from ..whole import whole, write_whole

STATIC = Path(__file__).parent / "static"
INDEX = "index.html"
_MARK = '<meta name="generator" content="lorsa view">'
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
    index = (STATIC / INDEX).read_text("utf-8").replace("@FOLDER@", folder.name)
    write_whole(out / INDEX, index)
    for path in earlier:
        _remove(path)


def _remove(folder: Path) -> None:
    """Remove the files of an earlier page, and their folder unless it holds others."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.suffix in (".js", ".css", ".json"):
            path.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
