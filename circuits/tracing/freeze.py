"""Freezing of a prompt: a language model is run, and what is not linear in it kept constant."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dictionaries.attach import require_site_read, require_width
from ...dictionaries.code import Code
from ...dictionaries.dictionary import Dictionary
from ...dictionaries.lorsa.module import Lorsa
from ...dictionaries.sae import Sae
from ...errors import AnalyzeError, AttachError, LanguageModelError
from ...evaluate.in_model import logits_of
from ...language.block import BlockReading
from ...language.blockcheck import difference_by_token, understand_sums
from ...language.blocks import AttentionSite, Block, attention_sites, find_blocks, text_config
from ...language.capture import Call, Capture, Seen
from ...language.norms import Norm, norm_modules
from ...language.selfcheck import LIMIT, difference, understand
from ...sites import Ports, Site
from .frozen import Frozen, Logits, Module
from .goals import likeliest
from .nodes import attention_depth, mlp_depth
from .paths import FrozenNorm, OwnAttention, Path, Skip

PRECISE = (torch.float32, torch.float64)
"""Precisions in which a model is traced."""
WRITTEN = ("attn_out", "mlp_out")
"""Sites that dictionaries of a trace write."""


class Placed(NamedTuple):
    """A dictionary of a trace."""

    run: int
    """Index among those that were given"""
    dictionary: Dictionary


@torch.no_grad()
def freeze(model: Any, dictionaries: Mapping[Ports, Dictionary], tokens: Tensor) -> Frozen:
    """Run a language model on a prompt and freeze it.

    Its goals are the likeliest next tokens; `Frozen.aimed` sets others.

    Args:
        model: causal language model of transformers, in float32 or float64.
        dictionaries: Lorsas, transcoders and SAEs of attention or MLP outputs by their places, on
            the model's device. A layer may have none.
        tokens: ids of the prompt, int64, [T].

    Raises:
        AttachError: the model lacks a layer, or a dictionary does not fit it.
        AnalyzeError: two dictionaries write one site, one is of another site than these, the model
            or a dictionary is in half precision, or it gives NaN or Inf.
        LanguageModelError: a block, an attention layer or the end of the model is not understood.
    """
    _require_precise("the model", model.dtype)
    placed = _placed(model, dictionaries)
    blocks = find_blocks(model)
    own = [n for n in blocks if not _is_lorsa(placed.get(Site(n, "attn_out")))]
    attention = {site.layer: site for site in attention_sites(model, own)} if own else {}
    seen = _seen(model, blocks, attention, tokens)
    stream = seen.sites[Site(len(blocks) - 1, "resid_out")][0].clone()
    embedded = seen.sites[Site(0, "resid_in")][0].clone()
    end = _end(model, blocks[0], tokens, stream)
    modules, parallel, before = [], set(), None
    for n, block in blocks.items():
        layer = _Layer.of(model, block, seen, before)
        before = layer.at["resid_out"]
        path = _own(model, attention[n], seen.attention[n]) if n in attention else None
        modules.append(_attention(layer, placed.get(Site(n, "attn_out")), path))
        modules.append(_mlp(layer, placed.get(Site(n, "mlp_out"))))
        if layer.sums.geometry.is_parallel:
            parallel.add(n)
    frozen = Frozen(
        tokens=tokens,
        runs=tuple(dictionaries),
        embedded=embedded,
        modules=tuple(modules),
        parallel=frozenset(parallel),
        **end._asdict(),
    )
    return frozen.aimed(*likeliest(frozen))


def _require_precise(what: str, dtype: torch.dtype) -> None:
    """Raise AnalyzeError if a model or a dictionary is in half precision."""
    if dtype not in PRECISE:
        raise AnalyzeError(f"{what} is in {dtype}; load it in float32 to trace a prompt")


def _placed(model: Any, dictionaries: Mapping[Ports, Dictionary]) -> dict[Site, Placed]:
    """Return the dictionaries by the sites that they write, after checks of each."""
    found: dict[Site, Placed] = {}
    n_layers = text_config(model).num_hidden_layers
    for run, (ports, dictionary) in enumerate(dictionaries.items()):
        (site,), config = ports.writes, dictionary.config
        if not 0 <= site.layer < n_layers:
            raise AttachError(f"layer {site.layer} is outside the model; it has 0-{n_layers - 1}")
        if site.name not in WRITTEN:
            raise AnalyzeError(
                f"{config.title} of {site} has no place in a trace; give Lorsas, transcoders, and "
                f"SAEs of {' or '.join(WRITTEN)}"
            )
        if site in found:
            raise AnalyzeError(f"two dictionaries write {site}; give one of them")
        require_site_read(config)
        require_width(config, model)
        _require_precise(f"the {config.noun} of {site}", dictionary.W_O.dtype)
        found[site] = Placed(run, dictionary)
    return found


def _is_lorsa(placed: Placed | None) -> bool:
    return placed is not None and isinstance(placed.dictionary, Lorsa)


def _seen(
    model: Any, blocks: Mapping[int, Block], attention: Mapping[int, AttentionSite], tokens: Tensor
) -> Seen:
    """Run the model and return its sites, and the calls of attention layers.

    Raises:
        AnalyzeError: an activation is not finite.
    """
    spots = {Site(n, name): spot for n, each in blocks.items() for name, spot in each.spots.items()}
    with Capture(model, list(attention.values()), spots=spots) as capture:
        seen = capture.see(tokens[None])
    for site, values in seen.sites.items():
        if not values.isfinite().all():
            raise AnalyzeError(f"the model gives NaN or Inf at {site} for this prompt; check it")
    return seen


class _Layer(NamedTuple):
    """A layer of the model on the prompt."""

    layer: int
    sums: BlockReading
    at: dict[str, Tensor]
    """Activations of its sites, [T, d_model], by name"""

    @classmethod
    def of(cls, model: Any, block: Block, seen: Seen, before: Tensor | None) -> "_Layer":
        """Return a layer whose norms and sums are understood, and take its sites out of `seen`.

        Args:
            model, block: the layer.
            seen: what was caught of a run.
            before: what the layer before it leaves in the residual stream, [T, d_model].

        Raises:
            LanguageModelError: they are not, or it does not read what the layer before it leaves.
        """
        n = block.layer
        sites = {name: seen.sites.pop(Site(n, name)).clone() for name in block.spots}
        known = understand_sums(model, block, sites, {})
        if known.reading is None:
            raise LanguageModelError(
                f"layer {n}: its residual stream is not the sum that lorsa knows "
                f"({known.check.reason}), so no prompt is traced through it"
            )
        if before is not None and difference_by_token(before, sites["resid_in"][0]) > LIMIT:
            raise LanguageModelError(
                f"layer {n} does not read what layer {n - 1} leaves in the residual stream, so no "
                "prompt is traced through it"
            )
        return cls(n, known.reading, {name: values[0] for name, values in sites.items()})

    def frame(self, kind: str) -> dict[str, Any]:
        """Return what a `Module` has of the layer's "attention" or "mlp" whatever stands there."""
        is_attention = kind == "attention"
        short, norms = ("attn", self.sums.norms) if is_attention else ("mlp", self.sums.norms)
        is_early = is_attention or self.sums.geometry.is_parallel
        return {
            "depth": attention_depth(self.layer) if is_attention else mlp_depth(self.layer),
            "below": attention_depth(self.layer) if is_early else mlp_depth(self.layer),
            "reads": FrozenNorm.at(
                self.at["resid_in" if is_early else "resid_mid"], norms.get(f"before_{kind}")
            ),
            "writes": FrozenNorm.at(
                self.at[f"{short}_out"], norms.get(f"after_{kind}"), self.sums.geometry.multiplier
            ),
        }


def _attention(layer: _Layer, mine: Placed | None, path: OwnAttention | None) -> Module:
    """Return the attention of a layer, or what stands in for it.

    Args:
        layer: the layer.
        mine: what stands there.
        path: the model's own attention; None under a Lorsa.
    """
    frame, x, y = layer.frame("attention"), layer.at["attn_in"], layer.at["attn_out"]
    if mine is not None:
        return _replaced(mine, frame, x if path is None else y, y, path)
    assert path is not None
    bias = frame["writes"].output(path.output(_read_bias(frame["reads"], x)))
    return Module(**frame, x=x, path=path, passes=True, bias=bias if bias.any() else None)


def _mlp(layer: _Layer, mine: Placed | None) -> Module:
    """Return the MLP of a layer, or what stands in for it."""
    frame, x, y = layer.frame("mlp"), layer.at["mlp_in"], layer.at["mlp_out"]
    if mine is None:
        return Module(**frame, x=x, error=frame["writes"].output(y))
    if isinstance(mine.dictionary, Sae):
        return _replaced(mine, frame, y, y, None)
    W_skip = getattr(mine.dictionary, "W_skip", None)
    return _replaced(mine, frame, x, y, None if W_skip is None else Skip(W_skip.detach()))


def _replaced(
    mine: Placed, frame: dict[str, Any], x: Tensor, y: Tensor, path: Path | None
) -> Module:
    """Return a module for which a dictionary stands in.

    Args:
        mine: the dictionary.
        frame: depth and norms of the module.
        x, y: what the dictionary reads, and what it approximates, [T, d_model].
        path: skip connection of a transcoder, or attention that leads to an SAE.
    """
    dictionary, writes = mine.dictionary, frame["writes"]
    code = dictionary.encode(x[None])
    y_hat = dictionary.decode(*code, x[None])[0]
    base = dictionary.b_O.expand_as(y)
    if isinstance(path, Skip):
        base = base + path.output(_read_bias(frame["reads"], x))
    return Module(
        **frame,
        x=x,
        run=mine.run,
        dictionary=dictionary,
        code=Code(code.acts[0], code.ids[0].long()),
        bias=writes.output(base),
        error=writes.direction(y - y_hat) * writes.scale[:, None],
        path=path,
        passes=isinstance(path, Skip),
    )


def _read_bias(norm: FrozenNorm, x: Tensor) -> Tensor:
    """Return what a module reads of a residual stream of zeros, like x [T, d_model]."""
    return torch.zeros_like(x) if norm.bias is None else norm.bias.expand_as(x)


def _own(model: Any, site: AttentionSite, call: Call) -> OwnAttention:
    """Return a layer's own attention on the prompt.

    Raises:
        LanguageModelError: it is not understood.
    """
    known = understand(model, site, call)
    if known.reading is None:
        raise LanguageModelError(
            f"layer {site.layer}: {known.check.reason}; give a Lorsa for its attention, or no "
            "prompt is traced through it"
        )
    return OwnAttention.at(call.x[0].clone(), known.reading)


class _End(NamedTuple):
    """The end of a model on a prompt, as `Frozen` has it."""

    final: FrozenNorm
    read: Tensor
    logits: Logits


def _end(model: Any, block: Block, tokens: Tensor, stream: Tensor) -> _End:
    """Return what is between the last residual stream [T, d_model] and the logits.

    Raises:
        LanguageModelError: it is not understood.
    """
    head, seen = model.get_output_embeddings(), []
    if head is None or block.attention is None:
        raise LanguageModelError("the model has no unembedding that lorsa can find; none is traced")
    hook = head.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
    try:
        logits = logits_of(model, tokens[None])[0]
    finally:
        hook.remove()
    read = seen[-1].view(len(tokens), -1)
    at = AttentionSite(0, block.attention.name, model.get_submodule(block.attention.name))
    last = norm_modules(model, at).last
    norm = None if last is None else Norm.read(last, stream.shape[1])
    final = FrozenNorm.at(stream, norm)
    if difference_by_token(final.output(stream), read) > LIMIT:
        raise LanguageModelError(
            "what the model's unembedding reads is no norm of its last residual stream"
        )
    return _End(final, read, _logits(model, head, read[-1], logits[-1]))


def _logits(model: Any, head: Any, read: Tensor, logits: Tensor) -> Logits:
    """Return the unembedding, by what it reads [d_model] and gives [n_vocab] at one token.

    Raises:
        LanguageModelError: the logits are made in a way that is not known.
    """
    config = model.config.get_text_config()
    factors = (getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None))
    scales = (1.0, factors[0], factors[1] and 1 / factors[1])
    for scale in (float(each) for each in scales if each):
        for cap in {None, getattr(config, "final_logit_softcapping", None)}:
            bias = None if head.bias is None else head.bias.detach()
            found = Logits(weight=head.weight.detach(), bias=bias, scale=scale, cap=cap)
            if difference(found.capped(found.before_cap(read)), logits) <= LIMIT:
                return found
    raise LanguageModelError(
        f"the logits of models of type {config.model_type} are made in a way that lorsa does not "
        "know"
    )
