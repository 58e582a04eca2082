"""Small stores, written by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small import create, fill, make_manifest


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Path]:
    """Write a whole small store and return its folder."""

    def make(name: str = "acts", **changes: Any) -> Path:
        writer = create(tmp_path / name, make_manifest(**changes))
        fill(writer)
        writer.finish()
        return tmp_path / name

    return make
