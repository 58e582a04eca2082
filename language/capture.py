"""Inputs and outputs of attention layers, caught while the language model runs."""

from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .blocks import AttentionSite
from .edit import module_input, module_output

SHARED = ("position_bias",)
"""Arguments of attention modules that are the same for all sequences: biases by head (MPT)."""


class Enough(Exception):  # noqa: N818 - no error
    """Raised in a hook of the last module that is needed, to end a run of the model."""


class Call(NamedTuple):
    """One call of an attention module."""

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


class Capture:
    """Hooks on the attention layers of a model, for as long as the `with` block lasts.

    with Capture(model, sites) as capture:
        batch = capture.run(tokens)      # {layer: (x, y)}
    """

    def __init__(self, model: Any, sites: list[AttentionSite]) -> None:
        """Choose what to catch.

        Args:
            model: a causal language model of transformers.
            sites: its attention layers; nothing after the last of them is computed.
        """
        self.model = model
        self.sites = sites
        self._calls: dict[int, Call] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        last = max(site.layer for site in self.sites)

        def hook(layer: int, module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self._calls[layer] = Call(args, kwargs, output)
            if layer == last:
                raise Enough

        for site in self.sites:
            of_layer = partial(hook, site.layer)
            self._handles.append(site.module.register_forward_hook(of_layer, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def run(self, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Return x and y of every layer, each [n, n_ctx, d_model], of tokens [n, n_ctx]."""
        return {layer: (call.x, call.y) for layer, call in self.calls(tokens).items()}

    @torch.inference_mode()
    def calls(self, tokens: Tensor) -> dict[int, Call]:
        """Run the model on tokens [n, n_ctx] and return the calls of its attention layers.

        Every token attends to all before it in its sequence; positions count from 0.
        """
        self._calls = {}
        with suppress(Enough):
            self.model(input_ids=tokens.long().to(self.model.device), use_cache=False)
        calls, self._calls = self._calls, {}
        return calls
