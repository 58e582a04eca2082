"""Run a language model and catch what goes into and comes out of its attention layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .sites import AttentionSite


class _Enough(Exception):  # noqa: N818 - it tells of no error
    """Raised in the last hooked layer: nothing after it is needed."""


def module_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return an attention module's input x, however the model passes it."""
    x: Tensor = args[0] if args else kwargs["hidden_states"]
    return x


def module_output(output: Any) -> Tensor:
    """Return an attention module's output y, of a tensor or a tuple."""
    y: Tensor = output[0] if isinstance(output, tuple) else output
    return y


class Capture:
    """Hooks on the attention layers of a model, for as long as the `with` block lasts.

    with Capture(model, sites) as capture:
        batch = capture.run(tokens)      # {layer: (x, y)}
    """

    def __init__(self, model: Any, sites: list[AttentionSite]) -> None:
        """Choose what to catch.

        Args:
            model: a causal language model of transformers.
            sites: its attention layers, in order; nothing after the last of them is computed.
        """
        self._model = model
        self._sites = sites
        self._caught: dict[int, tuple[Tensor, Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "Capture":
        last = self._sites[-1].layer
        for site in self._sites:

            def hook(
                module: Any, args: Any, kwargs: Any, output: Any, layer: int = site.layer
            ) -> None:
                self._caught[layer] = (module_input(args, kwargs), module_output(output))
                if layer == last:
                    raise _Enough

            self._handles.append(site.module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    @torch.inference_mode()
    def run(self, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Return x and y of every layer, each [n, n_ctx, d_model], of tokens [n, n_ctx].

        Every token attends to all before it in its sequence; positions count from 0.
        """
        self._caught = {}
        with _stopped_early():
            self._model(input_ids=tokens.long().to(self._model.device), use_cache=False)
        caught, self._caught = self._caught, {}
        return caught


@contextmanager
def _stopped_early() -> Iterator[None]:
    try:
        yield
    except _Enough:
        return
