"""Facts of a store for people."""

import pytest
from lorsa.store import format_bytes


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (2304, "2.3 kB"),
        (999_700, "1 MB"),
        (469e6, "469 MB"),
        (5.2e12, "5.2 TB"),
    ],
)
def test_bytes_for_people(n_bytes: float, text: str) -> None:
    assert format_bytes(n_bytes) == text
