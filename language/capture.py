"""Activations at sites of a language model, and calls of its modules, caught while it runs."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ..sites import Site
from .blocks import AttentionSite, Spot
from .edit import module_input, module_output

SHARED = ("position_bias",)
"""Arguments of attention modules that are the same for all sequences: biases by head (MPT)."""


class Enough(Exception):  # noqa: N818 - no error
    """Raised in a hook of the last module that is needed, to end a run of the model."""


class Call(NamedTuple):
    """One call of a module: an attention layer, or a block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def x(self) -> Tensor:
        """The module's input, [n, n_ctx, d_model]."""
        return module_input(self.args, self.kwargs)

    @property
    def y(self) -> Tensor:
        """The module's output, [n, n_ctx, d_model]."""
        return module_output(self.output)

    def of(self, rows: list[int]) -> "Call":
        """Return a copy of the call as it would have been of some of its sequences alone."""
        n = len(self.x)

        def some(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(some, value))
            is_by_row = isinstance(value, Tensor) and value.ndim > 1 and len(value) == n
            return value[rows] if is_by_row else value

        args = tuple(map(some, self.args))
        kwargs = {k: v if k in SHARED else some(v) for k, v in self.kwargs.items()}
        return Call(args, kwargs, self.y[rows])


class Seen(NamedTuple):
    """What was caught of one run."""

    sites: dict[Site, Tensor]
    """Activations by site, each [n, n_ctx, width]"""
    attention: dict[int, Call]
    """Calls of attention modules, by layer"""
    blocks: dict[int, Call]
    """Calls of whole blocks, by layer"""


class Capture:
    """Hooks on the modules of a model, for as long as the `with` block lasts.

    with Capture(model, attention_sites(model, [12])) as capture:
        batch = capture.run(tokens)      # {Site(12, "attn_in"): x, Site(12, "attn_out"): y}

    A run ends as soon as all that is to be caught has been seen.
    """

    def __init__(
        self,
        model: Any,
        attention: Sequence[AttentionSite] = (),
        *,
        spots: Mapping[Site, Spot] | None = None,
        blocks: Mapping[int, str] | None = None,
    ) -> None:
        """Choose what to catch.

        Args:
            model: a causal language model of transformers.
            attention: its attention layers whose calls are caught.
            spots: where the sites are whose activations are caught; None takes the inputs and the
                outputs of the attention layers.
            blocks: names of the blocks whose calls are caught, by layer.
        """
        self.model = model
        self.attention = list(attention)
        self.spots = ends_of(self.attention) if spots is None else dict(spots)
        self._modules: dict[tuple[str, int], str] = {
            **{("attention", site.layer): site.name for site in self.attention},
            **{("block", layer): name for layer, name in (blocks or {}).items()},
        }
        self._caught: dict[Any, Any] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for key, name in self._modules.items():
            module = self.model.get_submodule(name)
            self._handles.append(module.register_forward_hook(self._call(key), with_kwargs=True))
        for site, spot in self.spots.items():
            module = self.model.get_submodule(spot.module)
            if spot.side == "x":
                before = self._input(site, spot)
                handle = module.register_forward_pre_hook(before, with_kwargs=True)
            else:
                handle = module.register_forward_hook(self._output(site, spot))
            self._handles.append(handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _call(self, key: Any) -> Callable[..., None]:
        """Return a hook that catches calls of a module; a function, which copies do not copy."""

        def hook(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self._take(key, Call(args, kwargs, output))

        return hook

    def _input(self, site: Site, spot: Spot) -> Callable[..., None]:
        """Return a hook that catches what a module is given."""

        def hook(_module: Any, args: Any, kwargs: Any) -> None:
            self._take(site, _own(module_input(args, kwargs), spot))

        return hook

    def _output(self, site: Site, spot: Spot) -> Callable[..., None]:
        """Return a hook that catches what a module gives."""

        def hook(_module: Any, _args: Any, output: Any) -> None:
            self._take(site, _own(module_output(output), spot))

        return hook

    def _take(self, key: Any, value: Any) -> None:
        self._caught[key] = value
        if len(self._caught) == len(self._modules) + len(self.spots):
            raise Enough

    def run(self, tokens: Tensor) -> dict[Site, Tensor]:
        """Return the activations of every site, each [n, n_ctx, width], of tokens [n, n_ctx]."""
        return self.see(tokens).sites

    def calls(self, tokens: Tensor) -> dict[int, Call]:
        """Return the calls of the attention layers on tokens [n, n_ctx], by layer."""
        return self.see(tokens).attention

    @torch.inference_mode()
    def see(self, tokens: Tensor) -> Seen:
        """Run the model on tokens [n, n_ctx] and return all that was to be caught.

        Every token attends to all before it in its sequence; positions count from 0.
        """
        self._caught = {}
        with suppress(Enough):
            self.model(input_ids=tokens.long().to(self.model.device), use_cache=False)
        caught, self._caught = self._caught, {}
        calls = {key: caught[key] for key in self._modules}
        return Seen(
            sites={site: caught[site].view(*tokens.shape, -1) for site in self.spots},
            attention={layer: call for (kind, layer), call in calls.items() if kind != "block"},
            blocks={layer: call for (kind, layer), call in calls.items() if kind == "block"},
        )


def ends_of(attention: Sequence[AttentionSite]) -> dict[Site, Spot]:
    """Return where the inputs and outputs of attention layers are."""
    ends = (("attn_in", "x"), ("attn_out", "y"))
    return {Site(at.layer, name): Spot(at.name, side) for at in attention for name, side in ends}


def _own(tensor: Tensor, spot: Spot) -> Tensor:
    """Return a tensor as it is now, copied where the model changes it later."""
    return tensor.clone() if spot.changes else tensor
