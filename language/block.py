"""Residual stream through a block: its sites, each computed from others by norms and sums.

    attn_in  = norm(resid_in)                attn_out = attention(attn_in)
    resid_mid = resid_in + m norm(attn_out)
    mlp_in   = norm(resid_mid)               mlp_out  = MLP(mlp_in)
    resid_out = resid_mid + m norm(mlp_out)

A block has some of these norms; m is 1 but for some families (Granite). Where attention and MLP
are parallel there is no resid_mid: both read resid_in, and both are added to it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .norms import Norm

NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp")
"""Names of the norms of a block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NormGeometry:
    """Kind of a norm."""

    centred: bool
    """Whether it takes the mean off, as LayerNorm does; RMSNorm does not"""
    eps: float
    """Added to the mean square"""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockGeometry:
    """Sums and norms of a block, without weights."""

    d_model: int
    is_parallel: bool
    """Whether attention and MLP read the same residual stream"""
    multiplier: float
    """Multiplies what attention and MLP add to the residual stream"""
    before_attention: NormGeometry | None
    after_attention: NormGeometry | None
    """Norm of the attention's own output, before it is added"""
    before_mlp: NormGeometry | None
    after_mlp: NormGeometry | None
    """Norm of the MLP's own output, before it is added"""

    def to_dict(self) -> dict[str, Any]:
        """Return the geometry as JSON-able data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "BlockGeometry":
        """Read what `to_dict` wrote."""
        norms = {n: None if data[n] is None else NormGeometry(**data[n]) for n in NORMS}
        return cls(**{**data, **norms})


class BlockReading(NamedTuple):
    """Sums and norms of a block."""

    geometry: BlockGeometry
    norms: dict[str, Norm]
    """Norms that the block has, by name"""

    @classmethod
    def of(
        cls, d_model: int, *, is_parallel: bool, multiplier: float, norms: dict[str, Norm]
    ) -> "BlockReading":
        """Return a block with these norms."""
        kinds = {n: NormGeometry(centred=one.centred, eps=one.eps) for n, one in norms.items()}
        shape = dict.fromkeys(NORMS) | kinds
        geometry = BlockGeometry(
            d_model=d_model, is_parallel=is_parallel, multiplier=multiplier, **shape
        )
        return cls(geometry, norms)

    @classmethod
    def stored(cls, geometry: dict[str, Any], weights: Mapping[str, Tensor]) -> "BlockReading":
        """Return a block as a store keeps it, in float32 on the weights' device.

        Raises:
            KeyError, TypeError, ValueError: geometry or weights are of another form.
        """
        shape = BlockGeometry.from_dict(geometry)
        norms = {}
        for name in NORMS:
            if (kind := getattr(shape, name)) is not None:
                weight = weights[name].float()
                bias = weights.get(f"{name}_bias", torch.zeros_like(weight)).float()
                if {weight.shape, bias.shape} != {(shape.d_model,)}:
                    raise ValueError(
                        f"{name} has {list(weight.shape)} and {list(bias.shape)} weights"
                    )
                norms[name] = Norm(weight, bias, kind.centred, kind.eps)
        return cls(shape, norms)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of the norms as a store keeps them, float32; 1 + w as it is."""
        found = {}
        for name, norm in self.norms.items():
            found[name] = norm.weight.float()
            if norm.bias.any():
                found[f"{name}_bias"] = norm.bias.float()
        return found


Function = Callable[[Tensor], Tensor]
"""Function of activations, [n, n_ctx, d_model] to the same shape."""


class Derivation:
    """Sites of one layer, each computed once from those that are known."""

    def __init__(
        self,
        known: Mapping[str, Tensor],
        *,
        block: BlockReading | None = None,
        attention: Function | None = None,
        mlp: Function | None = None,
    ) -> None:
        """Begin with what is known.

        Args:
            known: activations by the site's name, [n, n_ctx, d_model].
            block: sums and norms, without which residual sites cannot be derived.
            attention, mlp: the layer's, from attn_in to attn_out and from mlp_in to mlp_out.
        """
        self._found = dict(known)
        self._block = block
        self._functions = {"attn_out": (attention, "attn_in"), "mlp_out": (mlp, "mlp_in")}

    def site(self, name: str) -> Tensor:
        """Return the activations of a site.

        Raises:
            KeyError: it does not follow from what is known.
        """
        if name not in self._found:
            self._found[name] = self._made(name)
        return self._found[name]

    def _made(self, name: str) -> Tensor:
        if name in self._functions:
            function, source = self._functions[name]
            if function is None:
                raise KeyError(name)
            return function(self.site(source))
        if self._block is None or name == "resid_in":
            raise KeyError(name)
        is_parallel = self._block.geometry.is_parallel
        middle = "resid_in" if is_parallel else "resid_mid"
        match name:
            case "attn_in":
                return self._normed("before_attention", "resid_in")
            case "mlp_in":
                return self._normed("before_mlp", middle)
            case "resid_mid" if not is_parallel:
                return self._sum("resid_in", {"attn_out": "after_attention"})
            case "resid_out" if is_parallel:
                both = {"attn_out": "after_attention", "mlp_out": "after_mlp"}
                return self._sum("resid_in", both)
            case "resid_out":
                return self._sum("resid_mid", {"mlp_out": "after_mlp"})
        raise KeyError(name)

    def _normed(self, norm: str, site: str) -> Tensor:
        norms = {} if self._block is None else self._block.norms
        return norms[norm].output(self.site(site)) if norm in norms else self.site(site)

    def _sum(self, stream: str, added: dict[str, str]) -> Tensor:
        factor = 1.0 if self._block is None else self._block.geometry.multiplier
        total = self.site(stream)
        for site, norm in added.items():
            total = total + factor * self._normed(norm, site)
        return total


def sources(names: Iterable[str], *, has_block: bool) -> dict[str, str]:
    """Return which site is stored for each of some sites of a layer, in the smallest store.

    Args:
        names: sites of the layer that are wanted.
        has_block: whether they may come from the residual stream.

    Returns:
        The stored site by each wanted one; itself where it is stored.
    """
    wanted = list(names)
    groups = {name.partition("_")[0] for name in wanted}
    if has_block and ("resid" in groups or len(groups) > 1):
        return dict.fromkeys(wanted, "resid_in")
    return {name: "attn_in" if name.startswith("attn") else "mlp_in" for name in wanted}
