"""Changes of an attention layer's output in a language model that runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

from ..errors import AttachError
from .blocks import AttentionSite

Replacement = Callable[[Tensor], Tensor]
"""Function from an attention layer's input to what stands in for its output, both
[batch, seq, d_model]."""

Edit = Callable[[Tensor, Tensor], Tensor]
"""Function from an attention layer's input and output to what stands in for the output."""


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
        _require_whole(x, kwargs, site)
        new = edit(x, y).to(y.dtype)
        return (new, *output[1:]) if isinstance(output, tuple | list) else new

    handle = site.module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def module_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return an attention module's input x, however the model passes it."""
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return x


def module_output(output: Any) -> Tensor:
    """Return an attention module's output y, which may be the first of a tuple or list."""
    y: Tensor = output[0] if isinstance(output, tuple | list) else output
    return y


def _require_whole(x: Tensor, kwargs: Mapping[str, Any], site: AttentionSite) -> None:
    """Raise AttachError if a call goes on from cached tokens."""
    for value in kwargs.values():
        if hasattr(value, "get_seq_length") and value.get_seq_length(site.layer) > x.shape[1]:
            raise AttachError(
                "a Lorsa needs whole sequences, but this call goes on from a cache; "
                "generate with use_cache=False"
            )
