"""Progress and results of looking after stores."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from ..printable import printable
from ..sites import Site
from ..store.care.info import format_bytes
from ..store.spelling import spell_sites
from .bars import Bar
from .words import fact_table, model_name

if TYPE_CHECKING:
    from ..store.care.verify import Checked


class CareDisplay(Bar):
    """Shows how far a store is read or written."""

    def __call__(self, event: "Checked") -> None:
        """Show an event."""
        if event.total_bytes:
            note = f"{format_bytes(event.n_bytes)} of {format_bytes(event.total_bytes)}"
            self.update(event.n_bytes, event.total_bytes, note)


def info_table(result: dict[str, Any]) -> Table:
    """Return what a store holds and lacks."""
    complete = "complete"
    if not result["complete"]:
        complete = f"{result['n_missing_shards']:,} of {result['n_shards']:,} shards are missing"
    rows = {
        "model": model_name(result["model"])
        + (f" @ {result['revision']}" if result["revision"] else ""),
        "corpus": f"{result['corpus']}, {result['n_documents']:,} documents",
        "tokens": f"{result['n_tokens']:,} in {result['n_seq']:,} sequences of {result['n_ctx']:,}",
        "held out": f"{result['n_held_out_tokens']:,} tokens",
        "stored as": f"{result['dtype']}, compression {result['compression']}",
        "size": f"{format_bytes(result['n_bytes'])} in {result['n_shards']:,} shards",
        "uuid": result["uuid"],
        "created": f"{result['created']}, {complete}",
    }
    if not result["has_checksums"]:
        rows["checksums"] = "of its shards alone: an earlier version wrote it"
    if result["adding"]:
        rows["being added"] = _spelled(result["adding_sites"])
    rows["sites"] = f"{_spelled(result['sites'])}: {_bytes_by_name(result['sites'])}"
    for layer, facts in result["layers"].items():
        norms = {name: result["sites"][f"{layer}.{name}"]["mean_norm"] for name in facts["sites"]}
        rows[f"layer {layer}"] = _layer_row(facts, norms)
    return fact_table(result["store"], rows)


_END = {"attn_in": "in", "attn_out": "out"}


def _spelled(sites: Iterable[str]) -> str:
    """Return what people read of sites such as 12.mlp_in: layers 0-3 (mlp)."""
    return spell_sites(map(Site.parse, sites))


def _bytes_by_name(sites: dict[str, dict[str, Any]]) -> str:
    """Return the bytes of all layers by name of the site; those derived keep their norms alone."""
    n_bytes: dict[str, int] = {}
    derived: set[str] = set()
    for site, facts in sites.items():
        name = Site.parse(site).name
        n_bytes[name] = n_bytes.get(name, 0) + facts["n_bytes"]
        derived |= {name} if facts["derived_by"] else set()
    return ", ".join(
        f"{name} {'derived' if name in derived else format_bytes(size)}"
        for name, size in n_bytes.items()
    )


def _layer_row(facts: dict[str, Any], norms: dict[str, float]) -> str:
    parts = [format_bytes(facts["n_bytes"])]
    if "heads" in facts:
        parts += [f"heads {facts['heads']}", f"kv heads {facts['kv_heads']}"]
    short = _END if set(norms) == set(_END) else {}
    means = ", ".join(f"{norm:.3g} {short.get(name, name)}" for name, norm in norms.items())
    parts.append(f"mean norms {means}")
    if facts["self_check"] is not None:
        parts.append(f"self-check {'passed' if facts['self_check'].get('passed') else 'failed'}")
    if facts["n_nonfinite"]:
        parts.append(f"{facts['n_nonfinite']:,} tokens with NaN or Inf")
    for name, scales in facts["int8_scales"].items():
        parts.append(f"{name} scales {scales['mean']:.3g}, largest {scales['largest']:.3g}")
    return ", ".join(parts)


_FIXES = {
    "harvest": "its shard can be written again",
    "rewrite": "can be written anew",
    "none": "cannot be made again: restore a copy, or delete the store and harvest again",
}


def verify_lines(result: dict[str, Any]) -> str:
    """Return a line for each thing that is wrong, and what to type."""
    lines = [f"{d['path']} {d['problem']}; {_FIXES[d['fix']]}" for d in result["damages"]]
    how = "every checksum" if result["full"] else "presence, sizes, metadata"
    size = f"{result['n_files']:,} files, {format_bytes(result['n_bytes'])}; {how}"
    if result["dropped_shards"]:
        lines.append(f"dropped shards {', '.join(map(str, result['dropped_shards']))}")
    for folder in result["leftovers"]:
        layer = folder.split("/")[1]
        lines.append(
            f"{folder} is no longer in the store: lorsa store rm --layers {layer} frees it"
            if folder.count("/") == 1
            else f"{folder} is no longer in the store: the next lorsa store rm of a site of layer "
            f"{layer} frees it"
        )
    if not result["has_checksums"]:
        lines.append(
            "an earlier version wrote it: manifest, weights and documents have no checksums"
        )
    if result["complete"] and (not result["damages"] or result["repaired"]):
        lines.append(f"{result['store']} is whole ({size})")
    elif result["complete"]:
        lines.append(f"{result['store']} is damaged ({size})")
    else:
        missing = f"{result['n_missing_shards']:,} of {result['n_shards']:,} shards are missing"
        lines.append(f"{result['store']} is unfinished: {missing} ({size})")
    return escape("\n".join(map(printable, lines)))


def rm_table(result: dict[str, Any]) -> Table:
    """Return which sites were removed."""
    rows = {
        "sites": _spelled(result["removed_sites"]),
        "freed": format_bytes(result["n_bytes"]),
        "remaining": _spelled(result["sites"]),
    }
    return fact_table(f"removed from {result['store']}", rows)


def merge_table(result: dict[str, Any]) -> Table:
    """Return what a merged store holds."""
    rows = {
        "stores": ", ".join(result["merged"]),
        "sites": _spelled(result["sites"]),
        "tokens": f"{result['n_tokens']:,} in {result['n_seq']:,} sequences",
        "held out": f"{result['n_held_out_tokens']:,} tokens",
        "size": format_bytes(result["n_bytes"]),
        "store": result["store"],
    }
    return fact_table("merged", rows)
