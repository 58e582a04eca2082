"""Folders as earlier versions wrote them, for tests that change what is in them."""

import json
from pathlib import Path
from typing import Any


def unseal(folder: Path) -> None:
    """Take away a folder's seal and the sums within its files."""
    (folder / "seal.json").unlink(missing_ok=True)
    for path in folder.glob("*.json"):
        change_json(path)


def change_json(path: Path, **changes: Any) -> None:
    """Change members of a file of JSON, which then has no sum of its own."""
    content = json.loads(path.read_text("utf-8"))
    content.pop("crc32c", None)
    path.write_text(json.dumps(content | changes), "utf-8")
