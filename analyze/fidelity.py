"""How well a Lorsa stands in for its layer: on stored activations, and inside the language model.

    loss recovered = (CE_ablated - CE_lorsa) / (CE_ablated - CE_original)

where CE is the mean cross-entropy of the next token, in nats, and ablated means that the attention
layer's output is zero, or its mean. 1 is as good as the layer, 0 as bad as having none.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..harvest import (
    AttentionSite,
    attention_sites,
    load_config,
    load_model,
    module_input,
    module_output,
    require_same_weights,
    resolve,
)
from ..model import DEVICES, Lorsa, choose_device, evaluate, stored_attention
from ..store import ActivationStore, Derive, Place, held_out_batches, place
from .errors import AnalyzeError

BATCH_TOKENS = 2048
"""Tokens of a forward: logits of a large vocabulary take much memory."""
MEAN_SEQS = 64
"""Training sequences that the mean of y is taken over."""

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """What an evaluation is asked for."""

    run: Path
    """Run folder, or any folder with a saved Lorsa."""
    store: Place
    """Store with its layer."""
    model: str | None = None
    """Language model for the cross-entropies; None leaves them out."""
    tokens: int | None = None
    """Held-out tokens for FVU, L0 and dead heads; None takes all."""
    ce_tokens: int = 16_384
    """Held-out tokens for the cross-entropies, which cost four forward passes each."""
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "run", Path(self.run))
        object.__setattr__(self, "store", place(self.store))
        for name in ("tokens", "ce_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 or more")
        if self.device not in DEVICES:
            raise ValueError(f"device is {self.device!r}; allowed: {', '.join(DEVICES)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossEntropy:
    """Next-token losses of the language model, nats per token."""

    original: float
    """Of the model as it is."""
    lorsa: float
    """With the attention layer's output replaced by the Lorsa's."""
    zero_ablated: float
    """With it replaced by zero."""
    mean_ablated: float
    """With it replaced by its mean over training tokens."""
    increase_se: float | None
    """Standard error of lorsa - original, over sequences; None of a single one."""
    n_tokens: int
    """Predicted tokens."""

    @property
    def recovered_from_zero(self) -> float | None:
        """Share of the loss that zero-ablation costs, recovered; None if it costs nothing."""
        return self._recovered(self.zero_ablated)

    @property
    def recovered_from_mean(self) -> float | None:
        """Share of the loss that mean-ablation costs, recovered; None if it costs nothing."""
        return self._recovered(self.mean_ablated)

    def _recovered(self, ablated: float) -> float | None:
        cost = ablated - self.original
        return (ablated - self.lorsa) / cost if cost > 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """What `evaluate_run` measures."""

    run: str
    """Folder of the Lorsa."""
    layer: int
    """Layer of the language model."""
    fvu: float
    """Fraction of variance unexplained on held-out tokens."""
    l0: float
    """Heads that fire per token."""
    dead_fraction: float
    """Share of heads that did not fire on `dead_window_tokens` tokens: here, those held out. The
    fewer the tokens, the larger it reads; training counts over a longer window."""
    dead_window_tokens: int
    """See dead_fraction."""
    n_tokens: int
    """Held-out tokens of all three."""
    cross_entropy: CrossEntropy | None
    """In the language model, if one was given."""

    def to_dict(self) -> dict[str, Any]:
        """Return the measures as JSON-able data, the shares recovered among them."""
        data: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        data["fvu"] = self.fvu if math.isfinite(self.fvu) else None
        if (ce := self.cross_entropy) is not None:
            data["cross_entropy"] = {name: getattr(ce, name) for name in ce.__slots__} | {
                "recovered_from_zero": ce.recovered_from_zero,
                "recovered_from_mean": ce.recovered_from_mean,
            }
        return data


def evaluate_run(config: EvalConfig, *, report: Report = lambda text: None) -> Fidelity:
    """Measure a trained Lorsa on held-out data.

    Args:
        config: the request.
        report: is told, in a line of text, what is being done.

    Raises:
        CheckpointError: the run holds no Lorsa.
        StoreError: the store cannot be read.
        AnalyzeError: the Lorsa does not belong to the store, or a loss is not finite.
        HarvestError: the language model cannot be had, or is not the store's.
    """
    lorsa = Lorsa.from_pretrained(config.run)
    store = ActivationStore.open(config.store)
    layer = _layer_of(lorsa, store, config)
    try:
        device = choose_device(config.device)
    except ValueError as error:
        raise AnalyzeError(str(error)) from None
    if config.model is not None:
        load_config(resolve(config.model))  # a model that is not there is said at once
    lorsa = lorsa.to(device)
    report("measuring on the store")
    n_seqs = _batch_seqs(store.manifest.n_ctx)
    derive = _deriver(store, layer, device)
    held_out = held_out_batches(
        store, layer, batch_seqs=n_seqs, n_tokens=config.tokens, device=device, derive=derive
    )
    quality = evaluate(lorsa, held_out)
    cross_entropy = None
    if config.model is not None:
        cross_entropy = _in_the_model(lorsa, store, layer, config, device, report)
    return Fidelity(
        run=str(config.run),
        layer=layer,
        fvu=quality.fvu,
        l0=quality.l0,
        dead_fraction=quality.dead_fraction,
        dead_window_tokens=quality.n_tokens,
        n_tokens=quality.n_tokens,
        cross_entropy=cross_entropy,
    )


def _deriver(store: ActivationStore, layer: int, device: str) -> Derive | None:
    """Return what makes y of x where the store says that y is to be derived, otherwise None."""
    if store.manifest.outputs == "store":
        return None
    geometry = store.manifest.layers[layer]["geometry"]
    return stored_attention(store.weights(layer), geometry, device)


def _layer_of(lorsa: Lorsa, store: ActivationStore, config: EvalConfig) -> int:
    """Return the layer that a Lorsa stands for, after checking that the store has it."""
    shape, manifest = lorsa.config, store.manifest
    if shape.layer is None:
        raise AnalyzeError(f"{config.run} does not say which layer it replaces")
    store.require_layer(shape.layer)
    same_model = shape.store_uuid == manifest.uuid or shape.base_model == manifest.model["id"]
    if not same_model or shape.d_model != manifest.d_model:
        raise AnalyzeError(
            f"{config.run} is a Lorsa of {shape.base_model} (d_model {shape.d_model}); "
            f"{config.store} holds {manifest.model['id']} (d_model {manifest.d_model})"
        )
    return shape.layer


def _in_the_model(
    lorsa: Lorsa,
    store: ActivationStore,
    layer: int,
    config: EvalConfig,
    device: str,
    report: Report,
) -> CrossEntropy:
    """Run the language model with the layer as it is, replaced and ablated."""
    assert config.model is not None
    path = resolve(config.model)
    if path.name == store.manifest.model["id"]:
        path = path._replace(revision=store.manifest.model["revision"])
    report(f"loading {path.id} on {device}")
    model = load_model(path, load_config(path), dtype="auto", device=device).model
    sites = attention_sites(model, [layer])
    require_same_weights(model, sites, store.root, store.manifest)
    report("running the language model")
    n_seqs = max(1, config.ce_tokens // store.manifest.n_ctx)
    tokens = store.tokens(store.held_out_seqs[:n_seqs])
    some = store.stored(layer, store.train_seqs[:MEAN_SEQS])
    mean = some.on(device, _deriver(store, layer, device)).y.mean(dim=(0, 1))
    replacements: dict[str, Replacement | None] = {
        "original": None,
        "lorsa": lambda x: lorsa(x.float()),
        "zero_ablated": torch.zeros_like,
        "mean_ablated": lambda x: mean.to(x.device).expand_as(x),
    }
    losses = {
        name: cross_entropy(model, tokens, sites[0], replacement)
        for name, replacement in replacements.items()
    }
    for name, loss in losses.items():
        if not loss.isfinite().all():
            raise AnalyzeError(
                f"the language model's loss ({name.replace('_', '-')}) is not finite; "
                "check the model with a short prompt, and the run for NaN weights"
            )
    increase = losses["lorsa"] - losses["original"]
    n_seqs = len(increase)
    return CrossEntropy(
        **{name: float(loss.mean()) for name, loss in losses.items()},
        increase_se=float(increase.std()) / n_seqs**0.5 if n_seqs > 1 else None,
        n_tokens=len(tokens) * (tokens.shape[1] - 1),
    )


def _batch_seqs(n_ctx: int) -> int:
    return max(1, BATCH_TOKENS // n_ctx)


Replacement = Callable[[Tensor], Tensor]
"""From an attention layer's input to what stands in for its output, [batch, seq, d_model]."""


@contextmanager
def replaced(site: AttentionSite, replacement: Replacement | None) -> Iterator[None]:
    """Let something stand in for an attention layer's output while the block lasts.

    Args:
        site: the layer.
        replacement: what to compute from its input; None leaves the layer as it is.
    """
    if replacement is None:
        yield
        return

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        x = module_input(args, kwargs)
        y = replacement(x).to(module_output(output).dtype)
        return (y, *output[1:]) if isinstance(output, tuple | list) else y

    handle = site.module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def cross_entropy(
    model: Any, tokens: Tensor, site: AttentionSite, replacement: Replacement | None
) -> Tensor:
    """Return a language model's mean next-token loss on each sequence, with a layer replaced.

    Args:
        model: causal language model of transformers.
        tokens: [n, n_ctx]; the first of a sequence is not predicted.
        site: the attention layer.
        replacement: what stands in for it; None leaves it.

    Returns:
        Nats per token, float64, [n].
    """
    losses = []
    with replaced(site, replacement):
        for batch in tokens.long().split(_batch_seqs(tokens.shape[1])):
            ids = batch.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # [n, n_ctx - 1, n_vocab]
            loss = F.cross_entropy(
                logits.transpose(1, 2).float(), ids[:, 1:], reduction="none"
            )  # [n, n_ctx - 1]
            losses.append(loss.double().mean(dim=1).cpu())
    return torch.cat(losses)
