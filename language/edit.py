"""Changes of a language model while it runs: something stands in at its sites.

A stand-in reads the activations of one site and writes those of another, or of the same. The model
computes what it always does, and goes on with what was written.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import AttachError
from ..sites import SITE_GROUPS, Ports, Site
from .blocks import AttentionSite, Block, attention_sites, find_blocks, text_config

ORDER = ("resid_in", "attn_in", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_out")
"""Names of a layer's sites in the order in which a model computes them."""
SHARED = "resid_mid"
"""Site whose tensor two modules read: a norm, and the sum after the MLP."""

Replacement = Callable[[Tensor], Tensor]
"""Function from what a stand-in reads to what it writes, both [batch, seq, d_model]."""

Edit = Callable[[Tensor, Tensor], Tensor]
"""Function from what a stand-in reads, and what the model has where it writes, to what it
writes."""


class Port(NamedTuple):
    """Site of a loaded model."""

    site: Site
    module: nn.Module
    side: str
    """"x" for what the module is given, "y" for what it gives"""
    changes: bool = False
    """Whether the model writes to that tensor later, so that it has to be copied at once"""


class Gap(NamedTuple):
    """Place in a loaded model for something that stands in."""

    reads: Port
    writes: Port

    @property
    def depth(self) -> tuple[int, int]:
        """Key to sort by: which of two places a model comes to first."""
        return self.writes.site.layer, ORDER.index(self.writes.site.name)


def gaps(model: Any, ports: Iterable[Ports]) -> list[Gap]:
    """Return where dictionaries of these ports stand in a loaded model, in their order.

    The model is run once or twice on a few tokens to find the sites, without the hooks that it has.

    Args:
        model: causal language model of transformers.
        ports: sites that are read and written, one of each.

    Raises:
        AttachError: the model has no such layer, or the layer no such site.
    """
    wanted = list(ports)
    with _unhooked(model):
        found = _ports(model, {site for each in wanted for site in each.sites})
    return [Gap(found[each.reads[0]], found[each.writes[0]]) for each in wanted]


def attention_gap(site: AttentionSite) -> Gap:
    """Return the place of what stands in for an attention layer."""
    reads = Port(Site(site.layer, "attn_in"), site.module, "x")
    return Gap(reads, Port(Site(site.layer, "attn_out"), site.module, "y"))


def _ports(model: Any, sites: set[Site]) -> dict[Site, Port]:
    n_layers = text_config(model).num_hidden_layers
    if outside := [site for site in sorted(sites) if not 0 <= site.layer < n_layers]:
        raise AttachError(f"layer {outside[0].layer} is outside the model; it has 0-{n_layers - 1}")
    attention = sorted({site.layer for site in sites if site.name in SITE_GROUPS["attn"]})
    others = sorted(site for site in sites if site.name not in SITE_GROUPS["attn"])
    with _unhooked(model):
        ends = [attention_gap(at) for at in attention_sites(model, attention)] if attention else []
        blocks = find_blocks(model) if others else {}
    found = {port.site: port for gap in ends for port in gap}
    return found | {site: _port(model, site, blocks[site.layer]) for site in others}


def _port(model: Any, site: Site, block: Block) -> Port:
    if (spot := block.spots.get(site.name)) is None:
        why = block.lacks[site.name]
        raise AttachError(f"layer {site.layer} {why}, so there is no site {site}")
    return Port(site, model.get_submodule(spot.module), spot.side, spot.changes)


@contextmanager
def _unhooked(model: nn.Module) -> Iterator[None]:
    """Run a model as it is, without the hooks by which its activations are caught or changed."""
    kept = []
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            kept.append((module, module._forward_hooks, module._forward_pre_hooks))
            module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, after, before in kept:
            module._forward_hooks, module._forward_pre_hooks = after, before


def replaced(where: Gap | AttentionSite, replacement: Replacement) -> AbstractContextManager[None]:
    """Let something stand in while the block lasts.

    Args:
        where: its place.
        replacement: what to compute from what it reads.

    Raises:
        AttachError: see `edited`.
    """
    return edited(where, lambda x, y: replacement(x))


@contextmanager
def edited(where: Gap | AttentionSite, edit: Edit) -> Iterator[None]:
    """Change what a language model has at a site while the block lasts.

    Calls of a model in which an attention layer is replaced must be of whole sequences without
    padding, as a Lorsa sees no cached tokens.

    Args:
        where: sites that the change reads and writes; or an attention layer, its input and output.
        edit: makes the new activations of what it reads and what is there.

    Raises:
        AttachError: in the model's call, if attention is replaced and goes on from a cache.
    """
    gap = where if isinstance(where, Gap) else attention_gap(where)
    read: list[Tensor] = []
    handles = []
    if gap.reads.site != gap.writes.site:
        handles.append(_hook(gap.reads, lambda x, kwargs: read.append(_own(x, gap.reads))))
    needs_all = gap.reads.site.name == "attn_in" and gap.writes.site.name == "attn_out"

    def change(y: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        x = read.pop() if read else y
        if needs_all:
            _require_whole(x, kwargs, gap.reads.site.layer)
        return edit(_rows(x), _rows(y)).to(y.dtype).view(y.shape)

    handles.append(_hook(gap.writes, change))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(port: Port, see: Callable[[Tensor, dict[str, Any]], Tensor | None]) -> Any:
    """Call a function with a site's activations whenever the model has them.

    It is given the keywords of the module's call too; a tensor that it returns takes their place.
    """

    def before(_module: Any, args: Any, kwargs: Any) -> Any:
        x = module_input(args, kwargs)
        if port.site.name == SHARED:
            if (new := see(x.clone(), kwargs)) is not None:
                x.copy_(new)
            return None
        new = see(x, kwargs)
        return None if new is None else _with_input(args, kwargs, new)

    def after(_module: Any, _args: Any, kwargs: Any, output: Any) -> Any:
        new = see(module_output(output), kwargs)
        return (new, *output[1:]) if isinstance(output, tuple | list) and new is not None else new

    if port.side == "x":
        return port.module.register_forward_pre_hook(before, with_kwargs=True)
    return port.module.register_forward_hook(after, with_kwargs=True)


def _own(x: Tensor, port: Port) -> Tensor:
    """Return a tensor as it is now, copied where the model changes it later."""
    return x.clone() if port.changes else x


def _rows(x: Tensor) -> Tensor:
    """Return activations as [batch, seq, d_model]; some MLPs are given all tokens in one row."""
    return x if x.ndim == 3 else x[None]


def _with_input(args: Any, kwargs: Any, x: Tensor) -> tuple[Any, Any]:
    """Return the arguments of a module with another input; see `module_input`."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})


def module_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return a module's input x, however the model passes it."""
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return x


def module_output(output: Any) -> Tensor:
    """Return a module's output y, which may be the first of a tuple or list."""
    y: Tensor = output[0] if isinstance(output, tuple | list) else output
    return y


def _require_whole(x: Tensor, kwargs: Mapping[str, Any], layer: int) -> None:
    """Raise AttachError if a call goes on from cached tokens."""
    for value in kwargs.values():
        if hasattr(value, "get_seq_length") and value.get_seq_length(layer) > x.shape[1]:
            raise AttachError(
                "a Lorsa needs whole sequences, but this call goes on from a cache; "
                "generate with use_cache=False"
            )
