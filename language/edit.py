"""Changes of the activations at a site of a language model that runs."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import AttachError
from ..sites import SITE_GROUPS, Site
from .blocks import AttentionSite, attention_sites, find_blocks, text_config


class Place(NamedTuple):
    """Where a site is in a loaded model, to be watched or changed."""

    site: Site
    module: nn.Module
    """Module in whose input or output the activations are"""
    side: str
    """"x" for its input, "y" for its output"""
    stream: nn.Module | None = None
    """Block around a module that reads the residual stream: what changes there goes on beside it"""


Change = Callable[[Tensor], Tensor]
"""Function from a site's activations to what stands in for them, both [batch, seq, width]."""

Replacement = Callable[[Tensor], Tensor]
"""Function from an attention layer's input to what stands in for its output, both
[batch, seq, d_model]."""

Edit = Callable[[Tensor, Tensor], Tensor]
"""Function from an attention layer's input and output to what stands in for the output."""


def places_of(model: Any, sites: Iterable[Site]) -> dict[Site, Place]:
    """Return where sites are in a loaded model; hooks that it has meanwhile are left out of it.

    The model is run once or twice on a few tokens to find them.

    Args:
        model: causal language model of transformers.
        sites: of any layers.

    Raises:
        AttachError: a layer is outside the model or has no such site.
    """
    wanted = list(sites)
    n_layers = text_config(model).num_hidden_layers
    if outside := [site.layer for site in wanted if not 0 <= site.layer < n_layers]:
        raise AttachError(f"layer {outside[0]} is outside the model; it has 0-{n_layers - 1}")
    with _unhooked(model):
        return {**_attention_places(model, wanted), **_block_places(model, wanted)}


def _attention_places(model: Any, sites: Iterable[Site]) -> dict[Site, Place]:
    mine = [site for site in sites if site.name in SITE_GROUPS["attn"]]
    if not mine:
        return {}
    layers = sorted({site.layer for site in mine})
    found = {at.layer: at.module for at in attention_sites(model, layers)}
    side = {"attn_in": "x", "attn_out": "y"}
    return {site: Place(site, found[site.layer], side[site.name]) for site in mine}


def _block_places(model: Any, sites: Iterable[Site]) -> dict[Site, Place]:
    mine = [site for site in sites if site.name not in SITE_GROUPS["attn"]]
    blocks = find_blocks(model) if mine else {}
    places = {}
    for site in mine:
        block = blocks[site.layer]
        if site.name not in block.spots:
            raise AttachError(
                f"layer {site.layer} {block.lacks[site.name]}, so there is no site {site}"
            )
        spot = block.spots[site.name]
        stream = model.get_submodule(block.name) if site.name == "resid_mid" else None
        places[site] = Place(site, model.get_submodule(spot.module), spot.side, stream)
    return places


@contextmanager
def _unhooked(model: nn.Module) -> Iterator[None]:
    """Run a model as it is, without the hooks by which its activations are watched or changed."""
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


@contextmanager
def watched(place: Place, see: Callable[[Tensor], None], *, whole: bool = False) -> Iterator[None]:
    """Show a site's activations to a function while the block lasts.

    Args:
        place: where the site is.
        see: is called with them, [batch, seq, width].
        whole: whether a call that goes on from cached tokens is refused.

    Raises:
        AttachError: in the model's call, if it goes on from a cache.
    """

    def before(module: Any, args: Any, kwargs: Any) -> None:
        x = module_input(args, kwargs)
        if whole:
            _require_whole(x, kwargs, place.site.layer)
        see(x)

    def after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        y = module_output(output)
        if whole:
            _require_whole(y, kwargs, place.site.layer)
        see(y)

    if place.side == "x":
        handle = place.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = place.module.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def changed(place: Place, change: Change) -> Iterator[None]:
    """Put something in place of a site's activations while the block lasts.

    Of several changes of a site, the one that was begun first is done first.

    Args:
        place: where the site is.
        change: makes the new activations of those that are there.
    """
    moved: list[Tensor] = []  # by how much the stream changes that goes on beside a module

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        x = module_input(args, kwargs)
        new = change(x).to(x.dtype)
        if place.stream is not None:
            moved.append(new - x)
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    def after(module: Any, args: Any, output: Any) -> Any:
        y = module_output(output)
        return _with_first(output, change(y).to(y.dtype))

    def beside(module: Any, args: Any, output: Any) -> Any:
        return _with_first(output, module_output(output) + moved.pop())

    with ExitStack() as handles:
        if place.side == "x":
            hook = place.module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            hook = place.module.register_forward_hook(after)
        handles.callback(hook.remove)
        if place.stream is not None:  # before whatever else waits for the block's output
            handles.callback(place.stream.register_forward_hook(beside, prepend=True).remove)
        yield


def _with_first(output: Any, y: Tensor) -> Any:
    """Return a module's output with another y."""
    return (y, *output[1:]) if isinstance(output, tuple | list) else y


def replaced(site: AttentionSite, replacement: Replacement) -> AbstractContextManager[None]:
    """Let something stand in for an attention layer's output while the block lasts.

    Args:
        site: the layer.
        replacement: what to compute from its input.

    Raises:
        AttachError: see `edited`.
    """
    return edited(site, lambda x, y: replacement(x))


@contextmanager
def edited(site: AttentionSite, edit: Edit) -> Iterator[None]:
    """Change an attention layer's output while the block lasts.

    Every call must be of whole sequences without padding, as a Lorsa sees no cached tokens.

    Args:
        site: the layer.
        edit: makes the new output of its input and output.

    Raises:
        AttachError: in the model's call, if it goes on from a cache.
    """

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        x, y = module_input(args, kwargs), module_output(output)
        _require_whole(x, kwargs, site.layer)
        new = edit(x, y).to(y.dtype)
        return _with_first(output, new)

    handle = site.module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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
