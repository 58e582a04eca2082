"""SHA-256 of what a frozen job made, apart from what differs between two runs of one version.

Left out are identities (uuids of stores), clocks (dates, seconds, tokens per second, share of time
spent waiting), version numbers, the folder itself, checksums over these, pictures, and the journal
of a store, which is how its writers took turns.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

Parts = dict[str, str]
"""SHA-256 of each part of what a job made."""

LEFT_OUT = {"uuid", "store_uuid", "created", "lorsa_version", "versions", "crc32"}
LEFT_OUT |= {"weights_crc32", "weights_sha256", "config_crc32c", "tensors_crc32c"}
LEFT_OUT |= {"tokens_per_second", "data_wait_fraction", "seconds", "spent_s", "free_bytes"}


def sha256(data: bytes) -> str:
    """Return a SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def of_tensor(values: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's bits."""
    bits = values.detach().contiguous().reshape(-1).view(torch.uint8)
    return sha256(f"{values.dtype} {tuple(values.shape)}".encode() + bits.numpy().tobytes())


def of_data(data: Any) -> str:
    """Return the SHA-256 of JSON-able data, without what LEFT_OUT names."""
    text = json.dumps(cleaned(data), sort_keys=True, default=str)
    return sha256(text.replace(str(Path.cwd()), ".").encode())


def cleaned(data: Any) -> Any:
    """Return data without what LEFT_OUT names."""
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        data = dataclasses.asdict(data)
    if isinstance(data, dict):
        return {name: cleaned(value) for name, value in data.items() if name not in LEFT_OUT}
    return [cleaned(value) for value in data] if isinstance(data, list | tuple) else data


def of_safetensors(path: Path) -> str:
    """Return the SHA-256 of a file's tensors and metadata, without what LEFT_OUT names.

    Version 0.1.0 wrote no checksums into the header; the tensors' bits are compared all the same.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {name: of_tensor(file.get_tensor(name)) for name in sorted(file.keys())}
        return of_data([file.metadata(), tensors])


def of_files(root: Path) -> Parts:
    """Return a SHA-256 for all files of a kind in a folder: their names, and what is in them."""
    kinds: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if not path.is_file() or path.suffix == ".png" or "journal" in name.parts:
            continue
        if path.suffix == ".json":
            digest = of_data(json.loads(path.read_text("utf-8")))
        elif path.suffix == ".jsonl":
            digest = of_data([json.loads(line) for line in path.read_text("utf-8").splitlines()])
        elif path.suffix == ".safetensors":
            digest = of_safetensors(path)
        else:
            digest = sha256(path.read_bytes())
        kinds.setdefault(path.suffix.strip(".") or "data", []).append(f"{name} {digest}")
    return {kind: sha256("\n".join(lines).encode()) for kind, lines in kinds.items()}
