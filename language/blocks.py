"""Blocks of a loaded language model: attention, MLP, norms and the sites around them.

The layers of a model are its one list of `num_hidden_layers` blocks; the attention of a block is
what `traced.py` finds in it. Its MLP is the other module with weights whose output is added to the
residual stream. Which norm is whose shows in the tensors that go in and out of it.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import AttachError
from ..sites import SITE_GROUPS
from .traced import ADDED, Found, Ran, Traced, traced


class AttentionSite(NamedTuple):
    """One attention layer of a loaded model."""

    layer: int
    """Counted from 0"""
    name: str
    """Dotted name of the module in the model"""
    module: nn.Module
    """Module that takes x, as keyword or first argument, and gives y or a tuple beginning with y"""


def attention_sites(model: Any, layers: Sequence[int]) -> list[AttentionSite]:
    """Return the attention modules of some layers of a loaded model, in order.

    The model is run once on a few tokens to find them.

    Args:
        model: causal language model of transformers.
        layers: counted from 0.

    Raises:
        AttachError: a layer is outside the model, no attention is found in it, or what its
            attention gives is not what the layer adds to the residual stream.
    """
    n_layers = text_config(model).num_hidden_layers
    outside = [layer for layer in layers if not 0 <= layer < n_layers]
    if outside:
        raise AttachError(f"layer {outside[0]} is outside the model; it has 0-{n_layers - 1}")
    found = attention_modules(model)
    require_usable(found, layers)
    names = {layer: found[layer].name for layer in layers}
    return [AttentionSite(i, names[i], model.get_submodule(names[i])) for i in layers]


class Spot(NamedTuple):
    """Module of a loaded model in whose input or output a site's activations are."""

    module: str
    """Dotted name in the model"""
    side: str
    """"x" for what the module is given, "y" for what it gives"""
    changes: bool = False
    """Whether the model writes to that tensor later, so that it has to be copied at once"""


class Norms(NamedTuple):
    """Dotted names of the norms of a block; None where there is none."""

    before_attention: str | None
    after_attention: str | None
    """Norm of the attention's own output, before it is added"""
    before_mlp: str | None
    after_mlp: str | None
    """Norm of the MLP's own output, before it is added"""


class Block(NamedTuple):
    """One layer of a model, and where its sites are."""

    layer: int
    name: str
    """Dotted name of the block in the model"""
    attention: Found | None
    mlp: Found | None
    """What gives the MLP's output"""
    reads: str | None
    """Dotted name of the module that reads the MLP's input; the MLP itself, if it is one module"""
    parts: tuple[str, ...]
    """Dotted names of the MLP's projections, in the order in which they run"""
    norms: Norms
    is_parallel: bool
    """Whether the MLP reads what the attention reads, or a norm of the same residual stream"""
    spots: dict[str, Spot]
    """Place of each site that the layer has, by the site's name"""
    lacks: dict[str, str]
    """Reason why a site is not there, as a clause, by the site's name"""


def find_blocks(model: Any) -> dict[int, Block]:
    """Return the blocks of a model by layer, found in one run on a few tokens.

    Args:
        model: causal language model of transformers, with weights or on the meta device.

    Raises:
        AttachError: no layer has attention, or the model does not run.
    """
    n_layers = text_config(model).num_hidden_layers
    lists = block_lists(model, n_layers)
    heavy = [name for name, m in model.named_modules() if _has_matrix(m) and _in_block(name, lists)]
    seen = _run(model, follow=heavy)
    attention = _by_layer(model, seen.attention)
    (first, found), *_ = attention.items()
    blocks = found.name.partition(f".{first}.")[0]
    modules = dict(model.named_modules())
    return {i: _block(modules, i, f"{blocks}.{i}", attention.get(i), seen) for i in range(n_layers)}


def _in_block(name: str, lists: list[str]) -> bool:
    """Whether a module lies within a block, and is none itself."""
    return any(name.startswith(f"{b}.") and "." in name.removeprefix(f"{b}.") for b in lists)


def _has_matrix(module: nn.Module) -> bool:
    """Whether a module has weights other than vectors, as a norm has not."""
    return any(parameter.ndim >= 2 for parameter in module.parameters())


def _block(
    modules: dict[str, nn.Module], layer: int, name: str, attention: Found | None, seen: Traced
) -> Block:
    """Return a block with what was seen of it in a run."""
    mlp, why = _mlp_of(name, attention, seen)
    reads = None if mlp is None else _reader(modules, name, mlp.name, attention, seen)
    norms = [n for n, m in modules.items() if n.startswith(f"{name}.") and _is_norm(m)]
    x, y = (Ran(None, None) if m is None else seen.ran[m.name] for m in (attention, mlp))
    into = None if reads is None else seen.ran[reads].x
    found = Norms(
        before_attention=_gives(norms, x[0], seen),
        after_attention=_takes(norms, x[1], seen),
        before_mlp=_gives(norms, into, seen),
        after_mlp=_takes(norms, y[1], seen),
    )
    stream = into if found.before_mlp is None else seen.ran[found.before_mlp].x
    is_parallel = attention is not None and stream is not None and stream is seen.ran[name].x
    parts = _parts(modules, mlp, reads, seen)
    block = Block(layer, name, attention, mlp, reads, parts, found, is_parallel, {}, {})
    return block._replace(spots=_spots(block, seen), lacks=_lacks(block, why))


def _mlp_of(name: str, attention: Found | None, seen: Traced) -> tuple[Found | None, str]:
    """Return the module of a block that is its MLP; None, and a clause that says why, if none is.

    It is the outermost of those with weights whose output is added to the residual stream.
    """
    added: list[Found] = []
    for module in seen.followed.values():
        inside = module.name.startswith(f"{name}.") and not _related(module.name, attention)
        within = any(module.name.startswith(f"{other.name}.") for other in added)
        if inside and not within and module.fate == ADDED:
            added.append(module)
    if len(added) > 1:
        names = " and ".join(module.name for module in added)
        return None, f"has no MLP that lorsa can tell: {names} are added to the residual stream"
    if added and added[0].n_calls != 1:
        return None, f"runs its MLP, {added[0].name}, {added[0].n_calls} times in a pass"
    return (added[0], "") if added else (None, "has no MLP that lorsa can find")


def _related(name: str, attention: Found | None) -> bool:
    """Whether a module is attention, a part of it or around it."""
    if attention is None:
        return False
    return f"{name}.".startswith(f"{attention.name}.") or attention.name.startswith(f"{name}.")


def _reader(
    modules: dict[str, nn.Module], block: str, mlp: str, attention: Found | None, seen: Traced
) -> str:
    """Return the module that reads the MLP's input: its own, or the first of its parts."""
    if any(_has_matrix(part) for part in modules[mlp].children()) or any(
        parameter.ndim > 2 for parameter in modules[mlp].parameters()
    ):
        return mlp
    around = mlp.rpartition(".")[0]  # a projection: the last of a module, or of the block (OPT)
    if around != block:
        return around
    parts = [n for n in seen.followed if n.rpartition(".")[0] == block]
    return next(n for n in parts if not _related(n, attention))


def _parts(
    modules: dict[str, nn.Module], mlp: Found | None, reads: str | None, seen: Traced
) -> tuple[str, ...]:
    """Return the modules of an MLP that hold its weights themselves, in the order of the run."""
    if mlp is None or reads is None:
        return ()
    is_whole = f"{mlp.name}.".startswith(f"{reads}.")
    own = [n for n in seen.followed if not any(_has_matrix(m) for m in modules[n].children())]
    if is_whole:
        return tuple(n for n in own if n.startswith(f"{reads}."))
    return tuple(own[own.index(reads) : own.index(mlp.name) + 1])


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: its class is called so, or all of its weights are vectors."""
    shapes = [parameter.ndim for parameter in module.parameters()]
    return "Norm" in type(module).__name__ or (bool(shapes) and max(shapes) == 1)


def _gives(names: list[str], x: Tensor | None, seen: Traced) -> str | None:
    """Return the module whose output is a tensor."""
    return next((n for n in names if x is not None and n in seen.ran and seen.ran[n].y is x), None)


def _takes(names: list[str], y: Tensor | None, seen: Traced) -> str | None:
    """Return the module whose input is a tensor."""
    return next((n for n in names if y is not None and n in seen.ran and seen.ran[n].x is y), None)


def _spots(block: Block, seen: Traced) -> dict[str, Spot]:
    """Return where the sites of a block are."""
    at: dict[str, tuple[str, str]] = {}
    if block.attention is not None and why_not(block.attention) is None:
        at |= {"attn_in": (block.attention.name, "x"), "attn_out": (block.attention.name, "y")}
    if block.mlp is not None and block.reads is not None:
        at |= {"mlp_in": (block.reads, "x"), "mlp_out": (block.mlp.name, "y")}
        if not block.is_parallel and block.attention is not None:
            at["resid_mid"] = (block.norms.before_mlp or block.reads, "x")
    at |= {"resid_in": (block.name, "x"), "resid_out": (block.name, "y")}
    return {site: Spot(*where, where in seen.changed) for site, where in at.items()}


def _lacks(block: Block, why: str) -> dict[str, str]:
    """Return why sites of a block are not there."""
    lacks: dict[str, str] = {}
    no_attention = "has no attention" if block.attention is None else why_not(block.attention)
    if no_attention is not None:
        lacks |= dict.fromkeys(SITE_GROUPS["attn"], no_attention)
    if why:
        lacks |= dict.fromkeys((*SITE_GROUPS["mlp"], "resid_mid"), why)
    elif block.is_parallel:
        lacks["resid_mid"] = "has none: attention and MLP read the same residual stream"
    elif block.attention is None:
        lacks["resid_mid"] = "has none: there is no attention before the MLP"
    return lacks


def _run(model: Any, follow: Sequence[str] = ()) -> Traced:
    """Run a model on a few tokens; AttachError if it does not run."""
    try:
        return traced(model, follow)
    except Exception as error:  # whatever a model's forward leads to
        reason = " ".join(str(error).split())[:200]
        raise AttachError(
            f"this model of type {model.config.model_type} does not run on a few tokens "
            f"({type(error).__name__}: {reason})"
        ) from error


def attention_modules(model: Any) -> dict[int, Found]:
    """Return what computes attention in each layer of a model, where there is such a module.

    Raises:
        AttachError: there is none, or the model does not run.
    """
    return _by_layer(model, _run(model).attention)


def _by_layer(model: Any, modules: list[Found]) -> dict[int, Found]:
    """Return attention modules by the layer in which they lie; AttachError if there is none."""
    kind, n_layers = model.config.model_type, text_config(model).num_hidden_layers
    lists = block_lists(model, n_layers)
    found: dict[int, Found] = {}
    for module in modules:
        if (layer := _layer_of(module.name, lists)) is not None:
            found.setdefault(layer, module)
    if not found:
        where = f" in a list of its {n_layers} layers" if modules else ""
        raise AttachError(f"models of type {kind} have no attention that lorsa can find{where}")
    return dict(sorted(found.items()))


def require_usable(found: dict[int, Found], layers: Iterable[int]) -> None:
    """Raise AttachError unless all layers have attention whose output is what they add."""
    usable = [layer for layer, module in found.items() if why_not(module) is None]
    for layer in layers:
        reason = f": {why}" if layer in found and (why := why_not(found[layer])) else None
        if layer not in found:
            reason = " has no attention"
        if reason is not None:
            others = f"; give --layers out of {','.join(map(str, usable))}" if usable else ""
            raise AttachError(f"layer {layer}{reason}{others}")


def why_not(module: Found) -> str | None:
    """Return why a module is no attention layer that can be stored; None if it is one."""
    if module.fate != ADDED:
        return (
            f"the output of {module.name}, where its attention is, {module.fate}, so it is not "
            "what the layer adds to the residual stream"
        )
    if module.n_calls != 1:
        return f"{module.name}, where its attention is, runs {module.n_calls} times in a pass"
    return None


def block_lists(model: Any, n_layers: int) -> list[str]:
    """Return the dotted names of a model's lists of as many modules as it has layers."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]


def _layer_of(name: str, lists: list[str]) -> int | None:
    """Return the layer in which a module lies; None if it lies in none of the lists."""
    for blocks in lists:
        if name.startswith(f"{blocks}."):
            return int(name.removeprefix(f"{blocks}.").partition(".")[0])
    return None


def text_config(model: Any) -> Any:
    """Return transformers' config of the part of a model that reads text.

    Raises:
        AttachError: it has none.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise AttachError(
            f"{type(model).__name__} is no language model of transformers; give one, such as "
            "AutoModelForCausalLM.from_pretrained makes"
        )
    return config.get_text_config()


def float32_copy(module: nn.Module, *, inner: bool = False) -> Any:
    """Return a copy of a module in float32 without its hooks, nor those within it if `inner`."""
    module = copy.deepcopy(module).float()
    for part in module.modules() if inner else [module]:
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return module
