"""A block that is run again in float32, with all of its sites."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .blocks import AttentionSite, Block, float32_copy
from .capture import Call, Enough
from .edit import module_input, module_output
from .rotary import rotary_of
from .selfcheck import run_again


class Again:
    """A block that is run again in float32, as it was called."""

    def __init__(self, model: Any, block: Block, call: Call) -> None:
        """Copy the block.

        Args:
            model: the language model.
            block: the layer.
            call: how it was run.
        """
        module = model.get_submodule(block.name)
        self._block, self._call, self._copy = block, call, float32_copy(module, inner=True)
        device = next(module.parameters()).device
        self._x = call.x.to(device, torch.float32)
        self._rotary = None
        if block.attention is not None:
            at = AttentionSite(
                block.layer, block.attention.name, model.get_submodule(block.attention.name)
            )
            self._rotary = rotary_of(model, at)

    def sites(self, mlp_in: Tensor | None = None) -> dict[str, Tensor]:
        """Run the block and return its sites by name, each [n, n_ctx, width].

        Args:
            mlp_in: what the MLP reads instead; then nothing after the MLP is computed.
        """
        found: dict[str, Tensor] = {}
        handles = [*self._catching(found), *self._instead(mlp_in)]
        try:
            with suppress(Enough):
                run_again(self._copy, self._call, self._x, self._rotary)
        finally:
            for handle in handles:
                handle.remove()
        return {name: values.view(*self._x.shape[:2], -1) for name, values in found.items()}

    def _catching(self, found: dict[str, Tensor]) -> Iterator[Any]:
        for name, spot in self._block.spots.items():
            module = self._part(spot.module)

            def before(_m: Any, args: Any, kwargs: Any, name: str = name) -> None:
                found[name] = module_input(args, kwargs).clone()

            def after(_m: Any, _args: Any, output: Any, name: str = name) -> None:
                found[name] = module_output(output).clone()

            if spot.side == "x":
                yield module.register_forward_pre_hook(before, with_kwargs=True)
            else:
                yield module.register_forward_hook(after)

    def _instead(self, mlp_in: Tensor | None) -> Iterator[Any]:
        """Give the MLP another input, and end the run when it has been computed."""
        block = self._block
        if mlp_in is None or block.reads is None or block.mlp is None:
            return

        def replace(_m: Any, args: Any, kwargs: Any) -> Any:
            new = mlp_in.view_as(module_input(args, kwargs))
            return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": new})

        def end(*_: Any) -> None:
            raise Enough

        yield self._part(block.reads).register_forward_pre_hook(
            replace, with_kwargs=True, prepend=True
        )
        yield self._part(block.mlp.name).register_forward_hook(end)

    def _part(self, name: str) -> Any:
        """Return the module of the copy that has a name in the model."""
        return self._copy.get_submodule(name.removeprefix(self._block.name).removeprefix("."))
