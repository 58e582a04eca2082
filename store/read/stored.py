"""Activations of some sequences as the store holds them, and what they come to."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...sites import Ports, Site
from ..encoding import Encoded
from .derived import KnownNorms

Derive = Callable[[Mapping[Site, Tensor], Sequence[Site]], dict[Site, Tensor]]
"""Function from stored sites, decoded, float32, [n, n_ctx, width], and the sites that are wanted to
these; `lorsa.language.stored.deriver` makes one."""


class Activations(NamedTuple):
    """What ports read and write on some sequences."""

    x: Tensor
    """[n, n_ctx, width], or [sites, n, n_ctx, width] where the ports read several sites"""
    y: Tensor
    """Alike of the sites that they write; x itself where these are the same sites"""


class Stored(NamedTuple):
    """Activations of some sequences that ports take, encoded as in the store."""

    ports: Ports
    parts: Mapping[Site, Encoded]
    """Sites that are stored, also those that others are derived from"""
    known: Mapping[Site, KnownNorms]
    """Norms of the sites that are derived, as the language model gave them"""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Stored":
        """Return a copy on a device."""
        parts = {s: part.to(device, non_blocking=non_blocking) for s, part in self.parts.items()}
        known = {s: norms.to(device, non_blocking=non_blocking) for s, norms in self.known.items()}
        return Stored(self.ports, parts, known)

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors of which it is made."""
        for part in self.parts.values():
            yield from (each for each in part if each is not None)
        for norms in self.known.values():
            yield norms.values

    def on(self, device: torch.device | str, derive: Derive | None = None) -> Activations:
        """Return x and y on a device, float32; see `values`."""
        return stacked(self.ports, self.values(device, derive))

    def values(
        self, device: torch.device | str, derive: Derive | None = None
    ) -> dict[Site, Tensor]:
        """Return each site on a device, float32, [n, n_ctx, width]; what is not stored is derived.

        Args:
            device: device of the result.
            derive: computes what is not stored.

        Raises:
            StoreError: a derived site has other norms than the language model's.
        """
        stored = self.to(device)
        values = {site: part.decode().float() for site, part in stored.parts.items()}
        if stored.known and derive is None:
            sites = ", ".join(map(str, stored.known))
            raise ValueError(f"{sites} is not stored, and nothing was given to derive it")
        if stored.known and derive is not None:
            values |= derive(values, list(stored.known))
        for site, norms in stored.known.items():
            norms.require(values[site])
        return values


def stacked(ports: Ports, values: Mapping[Site, Tensor]) -> Activations:
    """Return x and y of ports, given the activations of each site, [n, n_ctx, width]."""
    x = _stack([values[site] for site in ports.reads])
    if ports.writes == ports.reads:
        return Activations(x, x)
    return Activations(x, _stack([values[site] for site in ports.writes]))


def _stack(sites: list[Tensor]) -> Tensor:
    return sites[0] if len(sites) == 1 else torch.stack(sites)
