"""Settings of a corpus: texts by their names; imports nothing heavy."""

import os
from pathlib import Path

from ...hub import HUB_ID

STDLIB = "stdlib"
DEFAULT_DATA = "HuggingFaceFW/fineweb"
DEFAULT_CONFIGS = {DEFAULT_DATA: "sample-10BT"}
"""Configs of Hub datasets that are meant unless one is given."""
PACKINGS = ("pack", "no-pack")

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".py")
LINE_SUFFIXES = (".jsonl", ".ndjson", ".json")
CSV_SUFFIXES = (".csv", ".tsv")
ARROW_SUFFIXES = (".arrow", ".feather", ".ipc")
TABLE_SUFFIXES = (".parquet", *ARROW_SUFFIXES)
KNOWN_SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, *CSV_SUFFIXES, *TABLE_SUFFIXES)
PACKED_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz", ".lz4": "lz4"}
"""Compression of a file by its last suffix."""


def is_hub_id(data: str) -> bool:
    """Tell whether data means a dataset of the Hub: owner/name, and no path that is there."""
    path = Path(os.path.expanduser(data))
    is_file = suffix_of(path) in KNOWN_SUFFIXES
    return bool(HUB_ID.fullmatch(data)) and not is_file and not path.exists()


def config_of(data: str, data_config: str | None) -> str | None:
    """Return the config of a Hub dataset that is meant."""
    return DEFAULT_CONFIGS.get(data) if data_config is None else data_config


def suffix_of(file: Path) -> str:
    """Return what kind of file it is, without what it is compressed by."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in PACKED_SUFFIXES else suffix
