"""Check of sites that are derived: their norms are those that the harvest kept.

A store without a site's activations y keeps ||y|| of every token, of the y that the language model
itself gave. Whoever derives y has these beside it, so that weights or a geometry that are wrong,
for a few tokens even, are found where they matter:

    error = max over sequences of  rms over tokens (||derived y|| - ||y||) / rms over tokens ||y||

What may differ is what x was rounded to, and what the model's own precision costs.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import StoreError
from ...sites import Site
from ..manifest import Manifest

LEAST_LIMIT = 1e-3
ROUNDING = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 1 / 127}
"""Distance of neighbouring values of a dtype, relative to them; int8's, to a token's largest."""
ROUNDINGS = 8
"""Roundings of x that may show in a norm of y; on SmolLM2-135M it is half of one."""
NOISES = 4
"""Times that a norm may be off by what the model's precision cost in the first sequences."""
QUIET = 0.1
"""Part of a batch's size at which a sequence that is smaller is measured."""


class KnownNorms(NamedTuple):
    """Norms of a site on some sequences, and how well derived activations have to agree."""

    values: Tensor
    """||y|| of every token, float32, [n, n_ctx]"""
    limit: float
    """Largest error"""
    where: str
    """Store and site, for messages"""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "KnownNorms":
        """Return a copy on a device."""
        return self._replace(values=self.values.to(device, non_blocking=non_blocking))

    def require(self, y: Tensor) -> None:
        """Raise StoreError unless derived activations [n, n_ctx, width] have these norms."""
        known, found = self.values.double(), torch.linalg.vector_norm(y.float(), dim=-1).double()
        sizes = known.square().mean(dim=1).sqrt()
        sizes = sizes.clamp_min(QUIET * float(sizes.mean()) + torch.finfo(torch.float32).tiny)
        error = float(((found - known).square().mean(dim=1).sqrt() / sizes).max())
        if not error <= self.limit:
            raise StoreError(
                f"{self.where}: what is derived differs from the language model's by "
                f"{error:.2g} in its norm (allowed {self.limit:.2g}): weights, geometry or what it "
                "is derived from are wrong in the store; harvest the layer again, with --outputs "
                "store if it stays so"
            )


def norm_limit(manifest: Manifest, site: Site) -> float:
    """Return by how much norms of a derived site may differ from those kept."""
    derived = manifest.sites[site].derived
    facts = {} if derived is None else manifest.modules[derived.by]
    noise = (facts.get("self_check") or {}).get("noise") or 0.0
    if not isinstance(noise, float) or not math.isfinite(noise):
        noise = 0.0
    return LEAST_LIMIT + ROUNDINGS * ROUNDING[manifest.dtype] + NOISES * noise
