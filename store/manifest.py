"""The facts of a store: manifest.json, and journal/plan.json while it is being written.

Both hold the same fields. The plan is written when a harvest begins, the manifest last of all: a
folder without manifest.json is not a complete store. The store itself uses shapes, dtype, layers
and held-out shards. Model, tokenizer, corpus, request and geometry are there for its readers.

Both end with a crc32c of themselves and have those of the files that never change: documents,
weights, scales of int8's channels. Stores of version 0.1.0 have neither.
"""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import FormatVersionError, StoreError, reason_of
from ..seal import json_crc32c
from .choices import ACTIVATION_DTYPES, COMPRESSIONS, OUTPUTS
from .places import Place, read_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SEAL = "crc32c"
"""Name of the checksum of all other fields."""
JOURNAL = "journal"
PLAN = "journal/plan.json"
HELD_OUT_FRACTION = 0.05
TEXT, COUNT = (str, type(None)), (int, type(None))
KINDS: dict[str, dict[str, Any]] = {
    "model": {"id": str, "revision": TEXT, "dtype": TEXT},
    "tokenizer": {
        "vocabulary_sha256": TEXT,
        "bos_token_id": COUNT,
        "eos_token_id": COUNT,
        "special_token_ids": (list, type(None)),
    },
    "corpus": {"data": TEXT, "n_documents": COUNT},
    "layer": {"geometry": (dict, type(None)), "self_check": (dict, type(None))},
}
"""Kinds of what is read of the tables in a manifest, where it is there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The facts of one store."""

    uuid: str
    """Random identifier of this store."""
    created: str
    """Time at which its harvest began, UTC."""
    lorsa_version: str
    """Version of lorsa that wrote it."""
    model: dict[str, Any]
    """The language model: id, revision, architecture, dtype, attention implementation, sizes."""
    tokenizer: dict[str, Any]
    """Fingerprint and special tokens."""
    corpus: dict[str, Any]
    """Source of the text and how it was packed."""
    request: dict[str, Any]
    """The settings as given; a harvest goes on only with the same."""
    n_seq: int
    """Sequences."""
    n_ctx: int
    """Tokens in a sequence."""
    d_model: int
    """Width of an activation."""
    shard_seqs: int
    """Sequences in a shard; the last one may hold fewer."""
    dtype: str
    """Logical dtype of the activations."""
    compression: str
    """Codec of the activations: "none", "lz4" or "zstd"."""
    outputs: str = "store"
    """Source of y: "store", an array, or "derive", recomputed from x by the layer's weights."""
    layers: dict[int, dict[str, Any]]
    """Facts of every layer: the names of its "weights", its "geometry" and its "self_check"."""
    held_out_shards: tuple[int, ...]
    """Validation shards, never trained on."""
    checksums: dict[str, str] = field(default_factory=dict)
    """The crc32c of each file that never changes, in hexadecimal digits; none in old stores."""

    def __post_init__(self) -> None:
        for name in ("n_seq", "n_ctx", "d_model", "shard_seqs"):
            if type(value := getattr(self, name)) is not int or not 1 <= value < 1 << 31:
                raise ValueError(f"{name} is {value!r}; allowed: 1 or more")
        for name in ("model", "tokenizer", "corpus", "request", "checksums"):
            if not isinstance(value := getattr(self, name), dict):
                raise ValueError(f"{name} is {value!r}; it must be a table")
            _require_kinds(name, value)
        for name in ("uuid", "created", "lorsa_version"):
            if not isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name} is {value!r:.60}; it must be a text")
        for name, allowed in (
            ("dtype", ACTIVATION_DTYPES),
            ("compression", COMPRESSIONS),
            ("outputs", OUTPUTS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                )
        for layer, facts in self.layers.items():
            _require_kinds("layer", facts)
            names = facts["weights"]
            if not isinstance(names, list) or not all(str(n).isidentifier() for n in names):
                raise ValueError(f"layer {layer} has weights {names}")
        if not all(0 <= shard < self.n_shards for shard in self.held_out_shards):
            raise ValueError(f"held_out_shards are {self.held_out_shards}; shards: {self.n_shards}")

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return -(-self.n_seq // self.shard_seqs)

    def shard_rows(self, shard: int) -> range:
        """Return the sequences of a shard."""
        first = shard * self.shard_seqs
        return range(first, min(first + self.shard_seqs, self.n_seq))

    def to_json(self) -> str:
        """Return the text of manifest.json."""
        text = json.dumps({"format_version": FORMAT_VERSION, **asdict(self)})
        content = json.loads(text)  # as it is read: names of layers are text, tuples are lists
        if not self.checksums:
            del content["checksums"]
        return json.dumps(content | {SEAL: json_crc32c(content)}, indent=1) + "\n"

    def only(self, layers: Collection[int]) -> "Manifest":
        """Return the facts of a store that has no other layers than these."""
        kept = {layer: facts for layer, facts in self.layers.items() if layer in layers}
        gone = tuple(
            f"{kind}/{layer}/"
            for layer in self.layers.keys() - kept.keys()
            for kind in ("layers", "weights")
        )
        checksums = {n: crc for n, crc in self.checksums.items() if not n.startswith(gone)}
        return replace(self, layers=kept, checksums=checksums)

    @property
    def is_sealed(self) -> bool:
        """Whether the files of the store that never change have checksums."""
        return bool(self.checksums)


def _require_kinds(table: str, facts: dict[str, Any]) -> None:
    """Raise ValueError where a fact is not of its kind in KINDS."""
    for name, kind in KINDS.get(table, {}).items():
        value = facts.get(name)
        if name in facts and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{name} of the {table} is {value!r:.60}")


def held_out_shards(n_seq: int, shard_seqs: int) -> tuple[int, ...]:
    """Return the last shards, at least one, whose share of the sequences is closest to 5 %."""
    n_shards = -(-n_seq // shard_seqs)

    def miss(first: int) -> float:
        return abs((n_seq - first * shard_seqs) / n_seq - HELD_OUT_FRACTION)

    first = min(range(max(n_shards // 2, 1), n_shards), key=miss, default=0)
    return tuple(range(first, n_shards))


def read_manifest(path: Place) -> Manifest:
    """Read manifest.json or plan.json.

    Raises:
        UnreachableError: this machine failed.
        StoreError: not JSON, damaged, another format version, or fields missing.
    """
    root = path.parent if path.name == MANIFEST else path.parent.parent
    other = PLAN if path.name == MANIFEST else MANIFEST
    remedy = f"lorsa store verify {root} --repair writes it anew from {other}, or restore a copy"
    try:
        content = read_json(path, constant=float)  # a self-check may have found a NaN
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read ({reason_of(error)}); {remedy}") from None
    if not isinstance(content, dict):
        raise StoreError(f"{path} is damaged (it is no object); {remedy}")
    seal = content.pop(SEAL, None)
    if seal is not None and seal != json_crc32c(content):
        raise StoreError(f"{path} is damaged (its checksum is wrong); {remedy}")
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"{path} has store format version {version}; this version of lorsa reads "
            f"{FORMAT_VERSION}: install the version that wrote it, or harvest again"
        )
    try:
        layers = {_layer_number(layer): facts for layer, facts in content["layers"].items()}
        held_out = tuple(content["held_out_shards"])
        return Manifest(**{**content, "layers": layers, "held_out_shards": held_out})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} does not describe a store ({error}); {remedy}") from None


def _layer_number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and str(int(text)) == text):
        raise ValueError(f"{text!r} is no number of a layer")
    return int(text)
