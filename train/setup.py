"""From a store and a request to a Lorsa that is ready to train."""

import math
from typing import Any, NamedTuple

import torch

from ..model import (
    AttentionGeometry,
    LayerWeights,
    Lorsa,
    LorsaConfig,
    init_from_layer,
    init_random,
    require_fit,
    stored_attention,
)
from ..store import ActivationStore, Derive, Stored, sequence_order
from .config import TrainConfig
from .errors import TrainError

QK_HEADS_PER_HEAD = 4
MAX_DEAD_WINDOW_TOKENS = 10_000_000


class Scales(NamedTuple):
    """What the activations are multiplied by in training: powers of two, so they fold away exactly.

    E||x|| and E||y|| come to lie within a factor sqrt(2) of sqrt(d_model), so one learning rate
    serves all layers.
    """

    x: float
    y: float


class Extent(NamedTuple):
    """The run in numbers."""

    batch_seqs: int
    """Sequences in a step, over all processes"""
    step_tokens: int
    """Tokens in a step"""
    n_steps: int
    train_tokens: int
    dead_window_tokens: int
    eval_every_steps: int


def lorsa_config(config: TrainConfig, store: ActivationStore) -> LorsaConfig:
    """Return the shape of the Lorsa that a run trains.

    Raises:
        ValueError: sizes that do not fit each other.
        TrainError: the layer's attention is not understood and init is "layer".
    """
    facts = store.manifest.layers[config.layer]
    if config.init == "layer" and not facts["self_check"]["passed"]:
        raise TrainError(
            f"layer {config.layer} of {store.root} cannot be started from: its geometry is unknown "
            f"({_why(facts['self_check'])}); give --init random"
        )
    geometry = layer_geometry(config.layer, store)
    n_qk_heads = config.n_qk_heads or QK_HEADS_PER_HEAD * geometry.n_heads
    wanted = math.ceil(config.expansion * geometry.d_model / n_qk_heads) * n_qk_heads
    try:
        shape = LorsaConfig(
            d_model=geometry.d_model,
            n_qk_heads=n_qk_heads,
            d_qk_head=geometry.d_head,
            n_ov_heads=config.n_ov_heads or wanted,
            top_k=config.top_k,
            scale=geometry.scale,
            select=config.select,
            rope=geometry.rope,
            qk_norm=geometry.qk_norm,
            softcap=geometry.softcap,
            window=geometry.window,
            n_ctx=store.manifest.n_ctx,
            base_model=store.manifest.model.get("id"),
            base_revision=store.manifest.model.get("revision"),
            layer=config.layer,
            store_uuid=store.manifest.uuid,
        )
        if config.init == "layer":
            require_fit(shape, geometry)
    except ValueError as error:
        raise TrainError(str(error)) from None
    return shape


def _why(check: dict[str, Any]) -> str:
    return check.get("reason") or f"self-check failed, relative error {check['error']}"


def layer_geometry(layer: int, store: ActivationStore) -> AttentionGeometry:
    """Return the geometry of a stored layer; if it is unknown, plain heads of the layer's sizes."""
    facts = store.manifest.layers[layer]
    if facts["geometry"] is not None:
        return AttentionGeometry.from_dict(facts["geometry"])
    n_heads, d_head = facts["heads"]["n_heads"], facts["heads"]["d_head"]
    return AttentionGeometry(
        d_model=store.manifest.d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_head,
        scale=float(d_head) ** -0.5,
    )


def extent(config: TrainConfig, store: ActivationStore, world: int) -> Extent:
    """Return how long a run is, in steps of whole sequences.

    Raises:
        TrainError: the store has too few training sequences for a step.
    """
    n_ctx, n_train = store.manifest.n_ctx, len(store.train_seqs)
    batch_seqs = max(1, config.batch_tokens // n_ctx)
    if batch_seqs < world:
        raise TrainError(
            f"a step takes {batch_seqs} sequences of {n_ctx} tokens, which is less than one for "
            f"each of {world} processes; use --batch-tokens {world * n_ctx} or more"
        )
    if n_train < world:
        raise TrainError(
            f"{store.root} has {n_train} training sequences for {world} processes; harvest more"
        )
    if n_train < batch_seqs:
        raise TrainError(
            f"{store.root} has {n_train} training sequences of {n_ctx} tokens, a step takes "
            f"{batch_seqs}; use --batch-tokens {n_train * n_ctx} or less"
        )
    step_tokens = batch_seqs * n_ctx
    train_tokens = config.train_tokens or n_train * n_ctx
    n_steps = max(1, train_tokens // step_tokens)
    train_tokens = n_steps * step_tokens
    return Extent(
        batch_seqs=batch_seqs,
        step_tokens=step_tokens,
        n_steps=n_steps,
        train_tokens=train_tokens,
        dead_window_tokens=config.dead_window_tokens
        or min(MAX_DEAD_WINDOW_TOKENS, max(1, train_tokens // 4)),
        eval_every_steps=-(-(config.eval_every_tokens or -(-train_tokens // 4)) // step_tokens),
    )


def activation_scales(layer: int, store: ActivationStore) -> Scales:
    """Return the powers of two that bring the mean norms nearest to sqrt(d_model)."""
    norms = store.mean_norms(layer)
    target = math.sqrt(store.manifest.d_model)

    def nearest(norm: float) -> float:
        return 2.0 ** round(math.log2(target / norm)) if norm > 0 else 1.0

    return Scales(nearest(norms.x), nearest(norms.y))


def deriver(layer: int, store: ActivationStore, device: torch.device | str) -> Derive | None:
    """Return what makes y of x where the store says that y is to be derived, otherwise None."""
    if store.manifest.outputs == "store":
        return None
    geometry = store.manifest.layers[layer]["geometry"]
    return stored_attention(store.weights(layer), geometry, device)


def initialise(
    lorsa: Lorsa, config: TrainConfig, store: ActivationStore, derive: Derive | None = None
) -> None:
    """Fill a Lorsa, which works on raw activations, from the layer or at random.

    Args:
        lorsa: on the device of the training.
        config, store: what is trained, and on what.
        derive: makes y of x on that device; needed if y is not stored.
    """
    device = next(lorsa.parameters()).device
    x, y = _init_sample(config, store).on(device, derive)
    if config.init == "random":
        init_random(lorsa, x, y, seed=config.seed)
        return
    weights = LayerWeights(**store.weights(config.layer)).to(device, torch.float32)
    geometry = layer_geometry(config.layer, store)
    init_from_layer(lorsa, weights, geometry, x, y, seed=config.seed)


def _init_sample(config: TrainConfig, store: ActivationStore) -> Stored:
    """Return x and y of the first sequences of training, the same on every rank."""
    seqs = sequence_order(store.train_seqs, store.manifest.shard_seqs, seed=config.seed, epoch=0)
    n_seqs = max(1, config.init_tokens // store.manifest.n_ctx)
    return store.stored(config.layer, seqs[:n_seqs])
