"""Attention modules of a model, told by what is computed in them in one run on a few tokens.

Attention is where scores of positions with positions go through a softmax. The module of a layer is
the innermost one around it whose output is added to the residual stream, as it is or through a norm
or a scale. Both show in the operations of the run, so the names of classes do not matter, and a run
without memory for weights (on torch's meta device) tells as much as any other.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator
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


class Ran(NamedTuple):
    """First call of a module in the run."""

    x: Tensor | None
    """The tensor that it was given, the object itself; None where its first argument is none"""
    y: Tensor | None
    """The tensor that it gave, or the first of its tuple"""


class Traced(NamedTuple):
    """What one run of a model shows."""

    attention: list[Found]
    """Modules that compute attention, in the order in which they run"""
    followed: dict[str, Found]
    """Modules that were to be followed and did run, in that order"""
    ran: dict[str, Ran]
    """Every module that ran, by its dotted name, in the order in which they began"""
    changed: set[tuple[str, str]]
    """Modules and "x" or "y": tensors that are written to in place later in the run"""


@torch.no_grad()
def traced(model: Any, follow: Collection[str] = ()) -> Traced:
    """Run a model on a few tokens and return what that shows.

    Args:
        model: causal language model of transformers, with weights or on the meta device.
        follow: dotted names of modules; what becomes of their outputs is noted.

    Raises:
        Exception: whatever the model's own forward raises.
    """
    trace = _traced(model, frozenset(follow))
    followed = {name: trace.fated(name) for name in dict.fromkeys(trace.entries) if name in follow}
    return Traced(trace.found(), followed, trace.ran, trace.changed)


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


def _traced(model: Any, follow: frozenset[str] = frozenset()) -> "_Trace":
    trace = _Trace(model, follow)
    tokens = torch.arange(N_TOKENS)[None] % min(N_TOKENS, len(model.get_input_embeddings().weight))
    with _hooks(model, trace), trace:
        model(input_ids=tokens.to(model.device), use_cache=False)
    return trace


class _Trace(TorchDispatchMode):
    """Notes where a softmax over positions runs, and what becomes of modules' outputs."""

    def __init__(self, model: Any, follow: frozenset[str]) -> None:
        super().__init__()
        self._follow = follow
        self.ran: dict[str, Ran] = {}
        self.changed: set[tuple[str, str]] = set()
        self._holders: dict[int, list[tuple[str, str]]] = defaultdict(list)
        """Modules and sides whose tensors lie in a storage"""
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

    def entered(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a module begins to run."""
        self._stack.append(name)
        self.entries.append(name)
        x = args[0] if args else kwargs.get("hidden_states")
        if name not in self.ran:
            self.ran[name] = Ran(self._held(x, name, "x"), None)

    def left(self, name: str, output: Any) -> None:
        """Note that a module has run; its output is followed if asked, or attention was in it."""
        self._stack.pop()
        y = output[0] if isinstance(output, tuple | list) and output else output
        if self.ran[name].y is None:
            self.ran[name] = self.ran[name]._replace(y=self._held(y, name, "y"))
        asked = name in self._follow or any(name in around for around in self._around)
        if isinstance(y, Tensor) and asked:
            self._label(y, self._of(y) | {name})

    def _held(self, tensor: Any, name: str, side: str) -> Tensor | None:
        """Return what a module was given or gave, if it is a tensor, and watch its storage."""
        if not isinstance(tensor, Tensor):
            return None
        self._holders[tensor.untyped_storage()._cdata].append((name, side))
        return tensor

    def found(self) -> list[Found]:
        """Return the best module around each softmax."""
        best = {}
        for around in self._around:
            names = [name for name in reversed(around) if self._in_a_block(name)]
            if names:
                good = (name for name in names if self._fate(name) == ADDED)
                name = next(good, names[0])
                best[name] = self.fated(name)
        return list(best.values())

    def fated(self, name: str) -> Found:
        """Return a module that ran with what became of its output."""
        return Found(name, self._fate(name), self.entries.count(name))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and note what it does."""
        name = func.overloadpacket.__name__.strip("_") if func is not None else ""
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name == "local_scalar_dense" and given[0].is_meta:
            return 1  # as if whatever is asked of the tokens were so
        if func is not None and func.overloadpacket.__name__.endswith("_") and given:
            self.changed.update(self._holders[given[0].untyped_storage()._cdata])
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

        def entered(_m: Any, args: Any, kwargs: Any, name: str = name) -> None:
            trace.entered(name, args, kwargs)

        handles.append(module.register_forward_pre_hook(entered, with_kwargs=True))
        handles.append(
            module.register_forward_hook(lambda _m, _args, out, name=name: trace.left(name, out))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
