"""Take pictures of every view of a page, for the documentation.

    PYTHONPATH=tests python docs/make_pictures.py runs/layer-12/page docs/pictures --head 301

Needs Chromium and playwright. A picture above 200 kB is brought down to 256 colours.
"""

import argparse
import io
from pathlib import Path
from typing import NamedTuple

from browser import chromium
from PIL import Image
from playwright.sync_api import Browser

WIDE = (1280, 860)
PHONE = (360, 740)
MAX_BYTES = 200_000


class Shot(NamedTuple):
    """A picture to take."""

    name: str
    address: str
    size: tuple[int, int]
    dark: bool = False
    whole: bool = False
    """Down to the end of the page."""


def shots(head: int, table: str) -> list[Shot]:
    """Return the pictures of a page: each view, light and dark, wide and narrow."""
    views = {"overview": "#/", "heads": f"#/heads{table}", "head": f"#/head/{head}"}
    return [
        *(Shot(name, address, WIDE) for name, address in views.items()),
        *(Shot(f"{name}-dark", address, WIDE, dark=True) for name, address in views.items()),
        *(Shot(f"{name}-phone", address, PHONE) for name, address in views.items()),
    ]


def take(browser: Browser, index: Path, shot: Shot, out: Path) -> Path:
    """Open a view and write its picture."""
    page = browser.new_page(
        viewport={"width": shot.size[0], "height": shot.size[1]},
        color_scheme="dark" if shot.dark else "light",
    )
    page.goto(f"{index.resolve().as_uri()}{shot.address}")
    page.wait_for_selector("html[data-ready=yes]")
    page.wait_for_timeout(300)  # arcs are drawn once the text has its place
    taken = Image.open(io.BytesIO(page.screenshot(full_page=shot.whole)))
    page.close()
    path = out / f"{shot.name}.png"
    taken.convert("RGB").save(path, optimize=True)
    if path.stat().st_size > MAX_BYTES:
        few = taken.convert("RGB").quantize(
            256,
            method=Image.Quantize.MAXCOVERAGE,  # small marks keep their colour
            dither=Image.Dither.NONE,
        )
        few.save(path, optimize=True)
    return path


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("page", type=Path, help="folder that lorsa view wrote")
    parser.add_argument("out", type=Path, help="folder of the pictures")
    parser.add_argument("--head", type=int, default=0, help="head whose page is shown")
    parser.add_argument(
        "--table", default="?sort=-frequency", help="what the table is asked: ?sort=-induction"
    )
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for shot in shots(asked.head, asked.table):
            path = take(browser, asked.page / "index.html", shot, asked.out)
            print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
