"""Attention modules of a model, told by what is computed in them in one run on a few tokens.

Attention is where scores of positions with positions go through a softmax. The module of a layer is
the innermost one around it whose output is added to the residual stream, as it is or through a norm
or a scale. Both show in the operations of the run, so the names of classes do not matter, and a run
without memory for weights (on torch's meta device) tells as much as any other.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

N_TOKENS = 23
"""Tokens of the run; a number that no other axis of a model has."""
MORE_KEYS = 4
"""Keys that scores may have besides those of the tokens: sinks."""

ADDED = "is added to the residual stream"
_SUMS = ("add", "sub", "rsub")
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "dot", "mv", "addmv", "_grouped_mm")


class Found(NamedTuple):
    """One module in which attention is computed."""

    name: str
    """Dotted name in the model"""
    fate: str
    """Clause that says what becomes of its output; ADDED if it is what the layer adds"""
    n_calls: int
    """Number of times that the module runs in one run of the model"""


@torch.no_grad()
def find_attention(model: Any) -> list[Found]:
    """Return the modules of a model that compute attention, in the order in which they run.

    Args:
        model: causal language model of transformers, with weights or on the meta device.

    Raises:
        Exception: whatever the model's own forward raises.
    """
    return _traced(model).found()


@torch.no_grad()
def modules_after(model: Any, name: str) -> set[str]:
    """Return the dotted names of the modules that begin to run only when another has ended.

    Args:
        model: causal language model of transformers, with weights or on the meta device.
        name: dotted name of the other module.

    Raises:
        Exception: whatever the model's own forward raises.
    """
    order = list(dict.fromkeys(_traced(model).entries))
    later = order[order.index(name) + 1 :]
    return {module for module in later if not module.startswith(f"{name}.")}


def _traced(model: Any) -> "_Trace":
    trace = _Trace(model)
    tokens = torch.arange(N_TOKENS)[None] % min(N_TOKENS, len(model.get_input_embeddings().weight))
    with _hooks(model, trace), trace:
        model(input_ids=tokens.to(model.device), use_cache=False)
    return trace


class _Trace(TorchDispatchMode):
    """Notes where a softmax over positions runs, and what becomes of modules' outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.entries: list[str] = []
        """Names of modules in the order in which they begin to run"""
        self._stack: list[str] = []
        self._around: list[tuple[str, ...]] = []
        """Names of the modules around each softmax, the outermost first"""
        self._labels: dict[int, frozenset[str]] = {}
        """Modules whose outputs a tensor is made of, by the tensor's id"""
        self._kept: list[Any] = []
        """Tensors with labels, so that no other gets their ids"""
        self._fates: dict[str, list[str]] = defaultdict(list)
        self._blocks = [
            name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
        ]

    def entered(self, name: str) -> None:
        """Note that a module begins to run."""
        self._stack.append(name)
        self.entries.append(name)

    def left(self, name: str, output: Any) -> None:
        """Note that a module has run; its output is followed if there was attention in it."""
        self._stack.pop()
        y = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(y, Tensor) and any(name in around for around in self._around):
            self._label(y, self._of(y) | {name})

    def found(self) -> list[Found]:
        """Return the best module around each softmax."""
        best, n_calls = {}, Counter(self.entries)
        for around in self._around:
            names = [name for name in reversed(around) if self._in_a_block(name)]
            if names:
                good = (name for name in names if self._fate(name) == ADDED)
                name = next(good, names[0])
                best[name] = Found(name, self._fate(name), n_calls[name])
        return list(best.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and note what it does."""
        name = func.overloadpacket.__name__.strip("_") if func is not None else ""
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name == "local_scalar_dense" and given[0].is_meta:
            return 1  # as if whatever is asked of the tokens were so
        labels = frozenset(chain.from_iterable(map(self._of, given)))
        made = func(*args, **(kwargs or {}))
        if _is_attention(name, given, made):
            self._around.append(tuple(self._stack))
        ending = {label: fate for label in labels if (fate := self._end(name, label, given))}
        for label, fate in ending.items():
            self._fates[label].append(fate)
        if going_on := labels - set(ending):
            for tensor in tree_leaves(made):
                if isinstance(tensor, Tensor):
                    self._label(tensor, self._of(tensor) | going_on)
        return made

    def _end(self, name: str, label: str, given: list[Tensor]) -> str | None:
        """Return what an operation makes of a module's output; None where it stays that output."""
        here = self._stack[-1] if self._stack else "the model"
        if name in _PRODUCTS or "scaled_dot_product" in name:
            return f"goes into a product with weights in {here}"
        if all(label in self._of(t) or N_TOKENS not in t.shape for t in given):
            return None
        if name in _SUMS:
            return ADDED
        if name in ("mul", "div"):
            return f"is multiplied by what else is computed of the tokens in {here}"
        return None

    def _fate(self, name: str) -> str:
        fates = self._fates[name]
        return next((f for f in fates if f != ADDED), ADDED if fates else "is not used")

    def _in_a_block(self, name: str) -> bool:
        return any(name.startswith(f"{blocks}.") for blocks in self._blocks)

    def _of(self, tensor: Tensor) -> frozenset[str]:
        return self._labels.get(id(tensor), frozenset())

    def _label(self, tensor: Tensor, labels: frozenset[str]) -> None:
        self._labels[id(tensor)] = labels
        self._kept.append(tensor)


def _is_attention(name: str, given: list[Tensor], made: Any) -> bool:
    """Return whether an operation is a softmax of positions over positions, or has one in it."""
    if "scaled_dot_product" in name:
        n_queries, n_keys = given[0].shape[-2], given[1].shape[-2]
    elif "softmax" in name and isinstance(made, Tensor) and made.ndim >= 3:
        n_queries, n_keys = made.shape[-2:]
    else:
        return False
    return n_queries == N_TOKENS and N_TOKENS <= n_keys <= N_TOKENS + MORE_KEYS


@contextmanager
def _hooks(model: Any, trace: _Trace) -> Iterator[None]:
    """Tell a trace of every module that runs."""
    handles = []
    for name, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(lambda _m, _args, name=name: trace.entered(name))
        )
        handles.append(
            module.register_forward_hook(lambda _m, _args, out, name=name: trace.left(name, out))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
