"""Small stores, written by hand, and places in a bucket."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lorsa.store.bucket import BucketPath
from lorsa.store.places import place
from s3 import serve_bucket
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


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of a server on loopback."""
    with serve_bucket() as url:
        yield url


@pytest.fixture
def root(bucket: str, request: pytest.FixtureRequest) -> BucketPath:
    """A place in it where nothing is."""
    found = place(f"{bucket}/{re.sub(r'[^a-z0-9_]', '-', request.node.name)}/acts")
    assert isinstance(found, BucketPath)
    return found
