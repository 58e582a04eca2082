"""Sites of a language model at which activations are read, and the ports of a dictionary.

    resid_in ──norm──▶ attn_in ─attention─▶ attn_out ──▶ + ──▶ resid_mid
    resid_mid ─norm──▶ mlp_in ────MLP────▶ mlp_out ───▶ + ──▶ resid_out

A site is written with its layer: 12.mlp_in. The attention and the MLP read after the norm and its
weight, and write before any norm that a family puts after them.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import NamedTuple

SITE_NAMES = ("attn_in", "attn_out", "mlp_in", "mlp_out", "resid_in", "resid_mid", "resid_out")
"""Names of a layer's sites, in the order in which they are stored and listed."""
SITE_GROUPS = {
    "attn": ("attn_in", "attn_out"),
    "mlp": ("mlp_in", "mlp_out"),
    "resid": ("resid_in", "resid_mid", "resid_out"),
}
"""Short names of several sites at once."""


class Site(NamedTuple):
    """Place of a language model at which activations are read; written 12.mlp_in."""

    layer: int
    """Layer, counted from 0"""
    name: str
    """One of SITE_NAMES"""

    def __str__(self) -> str:
        return f"{self.layer}.{self.name}"

    @property
    def path(self) -> str:
        """Path of the site's array in a store: layers/12/mlp_in."""
        return f"layers/{self.layer}/{self.name}"

    @property
    def place(self) -> tuple[int, int]:
        """Key to sort by: layer, then the order of SITE_NAMES."""
        return self.layer, SITE_NAMES.index(self.name)

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Read what `str` wrote.

        Raises:
            ValueError: no site is written like this.
        """
        layer, dot, name = text.partition(".")
        if not (dot and layer.isascii() and layer.isdecimal() and str(int(layer)) == layer):
            raise ValueError(
                f"{text!r} is no site; a site is a layer and a name, such as 12.mlp_in"
            )
        return cls(int(layer), *parse_site_names(name))


class Ports(NamedTuple):
    """Sites between which a dictionary lies. An SAE writes what it reads."""

    reads: tuple[Site, ...]
    writes: tuple[Site, ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites, each once, in order."""
        return tuple(sorted({*self.reads, *self.writes}, key=lambda site: site.place))


def ports_between(layer: int, read: str, write: str) -> Ports:
    """Return the ports of a dictionary that reads one site of a layer and writes one."""
    return Ports((Site(layer, read),), (Site(layer, write),))


def attention_ports(layer: int) -> Ports:
    """Return the ports of a layer's attention: what a Lorsa reads and writes."""
    return ports_between(layer, *SITE_GROUPS["attn"])


def joined(several: Iterable[Ports]) -> Ports:
    """Return ports that read and write all sites of several, each once, in order."""
    sites = {site for ports in several for site in ports.sites}
    every = tuple(sorted(sites, key=lambda site: site.place))
    return Ports(every, every)


def parse_site_names(text: str) -> tuple[str, ...]:
    """Return the names that a text such as attn,mlp_in,resid means, each once, in order.

    Raises:
        ValueError: a part is neither a site nor a group; the message names near ones.
    """
    chosen: set[str] = set()
    for part in (each.strip() for each in text.split(",")):
        names = SITE_GROUPS.get(part, (part,))
        if unknown := set(names) - set(SITE_NAMES):
            raise ValueError(_unknown(unknown.pop()))
        chosen.update(names)
    return tuple(name for name in SITE_NAMES if name in chosen)


def spell_site_names(names: Iterable[str]) -> str:
    """Return the shortest text that `parse_site_names` reads as these names."""
    left, words = set(names), []
    for group, members in SITE_GROUPS.items():
        if left >= set(members):
            words.append(group)
        else:
            words += [name for name in members if name in left]
    return ",".join(words)


def _unknown(name: str) -> str:
    near = get_close_matches(name, [*SITE_NAMES, *SITE_GROUPS], n=2, cutoff=0.5)
    hint = f"; near: {', '.join(near)}" if near else ""
    groups = ", ".join(SITE_GROUPS)
    return f"{name!r} is no site{hint}; allowed: {groups} or {', '.join(SITE_NAMES)}"
