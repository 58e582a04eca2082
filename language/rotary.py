"""The rotary positions of a layer, read off the module that makes its cos and sin."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .blocks import AttentionSite
from .geometry import Rope


class Rotary(NamedTuple):
    """The module that makes the cos and sin of a layer."""

    module: Any
    layer_type: str | None
    """Argument of the module, where layers of different types turn at different frequencies; None
    where all turn alike"""

    def rope(self) -> Rope:
        """Return the frequencies of the module, as they are after its last forward."""
        prefix = "" if self.layer_type is None else f"{self.layer_type}_"
        inv_freq = getattr(self.module, f"{prefix}inv_freq")
        scaling = getattr(self.module, f"{prefix}attention_scaling", 1.0)
        return Rope(inv_freq=tuple(inv_freq.float().tolist()), attention_scaling=float(scaling))

    def embeddings(self, x: Tensor) -> Any:
        """Return cos and sin for x [n, seq, d_model], in its dtype."""
        position = torch.arange(x.shape[1], device=x.device)[None]
        kind = () if self.layer_type is None else (self.layer_type,)
        return self.module(x, position, *kind)


def rotary_of(model: Any, site: AttentionSite) -> Rotary | None:
    """Return what gives a layer its cos and sin; None if nothing does."""
    decoder, blocks = _decoder_of(model, site)
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    kind = types[site.layer] if types else None
    found = {}
    for name, part in [("", site.module), *decoder.named_children()]:
        for path, module in () if part is blocks else part.named_modules(prefix=name):
            if hasattr(module, f"{kind}_inv_freq"):
                return Rotary(module, kind)
            if isinstance(getattr(module, "inv_freq", None), Tensor):
                found[path] = module
    if not found:
        return None
    sliding = kind == "sliding_attention"
    named = [m for path, m in found.items() if kind and kind in path]
    local = [m for path, m in found.items() if ("local" in path) == sliding]
    return Rotary([*named, *local, *found.values()][0], None)


def ropes_of(model: Any, site: AttentionSite) -> list[Rope | None]:
    """Return the rotations that a layer may have."""
    module = site.module
    table = getattr(module, "embed_positions", None)
    if isinstance(table, Tensor):  # sin and cos of every position (GPT-J)
        sin, cos = table[1].float().chunk(2)
        return [Rope(inv_freq=tuple(torch.atan2(sin, cos).tolist()), interleaved=True), None]
    rotary = rotary_of(model, site)
    if rotary is None or not getattr(module, "use_rope", True):
        return [None]
    rope = rotary.rope()
    back = replace(rope, inv_freq=tuple(-f for f in rope.inv_freq))  # NanoChat
    return [rope, replace(rope, interleaved=True), None, back]


def _decoder_of(model: Any, site: AttentionSite) -> tuple[Any, Any]:
    """Return the module that holds the list of layers in which a site lies, and that list."""
    path = site.name.partition(f".{site.layer}.")[0]
    return model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
