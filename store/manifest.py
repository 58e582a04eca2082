"""The facts of a store: manifest.json, and journal/plan.json while it is being written.

Both hold the same fields. The plan is written when a harvest begins, the manifest last of all: a
folder without manifest.json is not a complete store. The store itself uses shapes, dtype, sites
and held-out shards. Model, tokenizer, corpus, request and geometry are there for its readers.

    "sites": {"12.attn_in": {"width": 576, "derived": null}, "12.attn_out": {"width": 576,
              "derived": {"from": ["12.attn_in"], "by": "12.attention"}}}
    "modules": {"12.attention": {"weights": ["W_K", ...], "geometry": {...}, "self_check": {...}}}

Both end with a crc32c of themselves and have those of the files that never change: documents,
weights, scales of int8's channels. Stores of version 0.1.0 have neither.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..errors import FormatVersionError, StoreError, reason_of
from ..seal import json_crc32c
from ..sites import Site
from .choices import ACTIVATION_DTYPES, COMPRESSIONS
from .layered import read_layers, write_layers
from .places import Place, read_json
from .site_facts import SiteFacts, channel_of, needed_modules, read_site, require_module, weights_at

FORMAT_VERSION = 2
READ_VERSIONS = (1, FORMAT_VERSION)
MANIFEST = "manifest.json"
SEAL = "crc32c"
"""Name of the checksum of all other fields."""
JOURNAL = "journal"
PLAN = "journal/plan.json"
HELD_OUT_FRACTION = 0.05
TEXT, COUNT = (str, type(None)), (int, type(None))
KINDS: dict[str, dict[str, Any]] = {
    "model": {
        "id": str,
        "revision": TEXT,
        "dtype": TEXT,
        "n_layers": int,
        "attention_layers": (list, type(None)),
    },
    "tokenizer": {
        "vocabulary_sha256": TEXT,
        "bos_token_id": COUNT,
        "eos_token_id": COUNT,
        "special_token_ids": (list, type(None)),
    },
    "corpus": {"data": TEXT, "n_documents": COUNT},
    "module": {"geometry": (dict, type(None)), "self_check": (dict, type(None)), "lacks": list},
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
    shard_seqs: int
    """Sequences in a shard; the last one may hold fewer."""
    dtype: str
    """Logical dtype of the activations."""
    compression: str
    """Codec of the activations: "none", "lz4" or "zstd"."""
    sites: dict[Site, SiteFacts]
    """Facts of every site: its width, and what it is derived from where it is not stored."""
    modules: dict[str, dict[str, Any]]
    """Facts of the modules of sites, as 12.attention: the names of its "weights", its "geometry"
    and its "self_check"."""
    held_out_shards: tuple[int, ...]
    """Validation shards, never trained on."""
    checksums: dict[str, str] = field(default_factory=dict)
    """The crc32c of each file that never changes, in hexadecimal digits; none in old stores."""

    def __post_init__(self) -> None:
        for name in ("n_seq", "n_ctx", "shard_seqs"):
            if type(value := getattr(self, name)) is not int or not 1 <= value < 1 << 31:
                raise ValueError(f"{name} is {value!r}; allowed: 1 or more")
        for name in ("model", "tokenizer", "corpus", "request", "checksums"):
            if not isinstance(value := getattr(self, name), dict):
                raise ValueError(f"{name} is {value!r}; it must be a table")
            _require_kinds(name, value)
        for name in ("uuid", "created", "lorsa_version"):
            if not isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name} is {value!r:.60}; it must be a text")
        for name, allowed in (("dtype", ACTIVATION_DTYPES), ("compression", COMPRESSIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                )
        for module, facts in self.modules.items():
            require_module(module, facts)
            _require_kinds("module", facts)
        for site, about in self.sites.items():
            about.require_whole(site, self.sites, self.modules)
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

    @property
    def layers(self) -> list[int]:
        """Layers with a site, ascending."""
        return sorted({site.layer for site in self.sites})

    @property
    def is_derived(self) -> bool:
        """Whether a site is derived from others when it is wanted."""
        return any(not facts.is_stored for facts in self.sites.values())

    def to_json(self) -> str:
        """Return the text of manifest.json: of format 1 where that can say the same."""
        content = {each.name: getattr(self, each.name) for each in fields(self)}
        old = write_layers(content)
        if old is None:
            content["sites"] = {str(site): facts.to_dict() for site, facts in self.sites.items()}
        version = FORMAT_VERSION if old is None else 1
        text = json.dumps({"format_version": version, **(old or content)})
        content = json.loads(text)  # as it is read: tuples are lists
        if not self.checksums:
            del content["checksums"]
        return json.dumps(content | {SEAL: json_crc32c(content)}, indent=1) + "\n"

    def only(self, sites: Collection[Site]) -> "Manifest":
        """Return the facts of a store that has no other sites than these."""
        kept = {site: facts for site, facts in self.sites.items() if site in sites}
        needed = needed_modules(kept, self.modules)
        modules = {name: facts for name, facts in self.modules.items() if name in needed}
        gone = tuple(
            [f"{channel_of(site.path)}/" for site in self.sites.keys() - kept.keys()]
            + [
                f"{weights_at(name)}/{weight}/"
                for name in self.modules.keys() - needed
                for weight in self.modules[name]["weights"]
            ]
        )
        checksums = {n: crc for n, crc in self.checksums.items() if not n.startswith(gone)}
        return replace(self, sites=kept, modules=modules, checksums=checksums)

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
    if version not in READ_VERSIONS:
        raise FormatVersionError(
            f"{path} has store format version {version}; this version of lorsa reads "
            f"{' and '.join(map(str, READ_VERSIONS))}: install the version that wrote it, or "
            "harvest again"
        )
    try:
        held_out = tuple(content["held_out_shards"])
        if version == 1:
            content = read_layers(content)
        else:
            content["sites"] = dict(read_site(*each) for each in content["sites"].items())
        return Manifest(**{**content, "held_out_shards": held_out})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} does not describe a store ({error}); {remedy}") from None
