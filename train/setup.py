"""From a store and a request to a Lorsa that is ready to train."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model import (
    AttentionGeometry,
    LayerWeights,
    Lorsa,
    LorsaConfig,
    fit_output,
    init_from_layer,
    init_random,
    require_fit,
    stored_attention,
)
from ..store import Activations, ActivationStore, Derive, Stored, sequence_order
from .config import TrainConfig
from .errors import TrainError

QK_HEADS_PER_HEAD = 4
BATCH_SEQS = 4
BATCH_TOKENS = 1024
MAX_DEAD_WINDOW_TOKENS = 10_000_000
STEPS_UNTIL_KNOWN = 1000
"""Of a run by the minute, until its speed is known."""
STATE_BYTES = 16
"""Of a parameter in float32: itself, its gradient, two moments."""


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
    n_micro: int
    """Parts in which a process computes its share of a step"""
    n_steps: int
    train_tokens: int
    dead_window_tokens: int
    eval_every_steps: int
    state_bytes: float = STATE_BYTES
    """Of a parameter, on one process"""

    def lasting(self, n_steps: int, config: TrainConfig) -> "Extent":
        """Return the same run with another number of steps."""
        tokens = n_steps * self.step_tokens
        window = config.dead_window_tokens or min(MAX_DEAD_WINDOW_TOKENS, max(1, tokens // 4))
        looks = config.eval_every_tokens or -(-tokens // 4)
        return self._replace(
            n_steps=n_steps,
            train_tokens=tokens,
            dead_window_tokens=window,
            eval_every_steps=-(-looks // self.step_tokens),
        )


def lorsa_config(config: TrainConfig, store: ActivationStore) -> LorsaConfig:
    """Return the shape of the Lorsa that a run trains.

    Raises:
        ValueError: sizes that do not fit each other.
        TrainError: the layer's attention is not understood and init is not "random".
    """
    facts = store.manifest.layers[config.layer]
    if config.init != "random" and not facts["self_check"]["passed"]:
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
            activation=config.activation,
            max_l0=config.max_l0,
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
        if config.init != "random":
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
    batch_tokens = config.batch_tokens or max(BATCH_TOKENS, BATCH_SEQS * n_ctx)
    batch_seqs = max(1, batch_tokens // n_ctx)
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
    n_micro, state_bytes = _n_micro(config, batch_seqs, world, n_ctx), _state_bytes(config, world)
    whole = Extent(batch_seqs, step_tokens, n_micro, 0, 0, 0, 0, state_bytes)
    n_steps = max(1, train_tokens // step_tokens)
    if config.minutes is not None and config.train_tokens is None:
        n_steps = max(n_steps, STEPS_UNTIL_KNOWN)
    return whole.lasting(n_steps, config)


def _n_micro(config: TrainConfig, batch_seqs: int, world: int, n_ctx: int) -> int:
    """Return the parts of a process's share; on every process the same, and no part empty."""
    if config.exact:
        return -(-batch_seqs // world)
    if config.micro_batch_tokens is None:
        return 1
    most = -(-batch_seqs // world)
    wanted = -(-most // max(1, config.micro_batch_tokens // n_ctx))
    return min(wanted, batch_seqs // world)


def _state_bytes(config: TrainConfig, world: int) -> float:
    """Return the bytes that a parameter takes on one process."""
    if config.exact:
        return STATE_BYTES + 8  # a sum in float64
    if config.shard and world > 1:
        return 8 + STATE_BYTES / world  # whole weights and gradients during a step
    return STATE_BYTES


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


class Initialiser:
    """Fills Lorsas of one layer and order; what several have in common is made once."""

    def __init__(self, store: ActivationStore, derive: Derive | None = None) -> None:
        """Choose a store.

        Args:
            store: what is trained on.
            derive: makes y of x on the device of the training; needed if y is not stored.
        """
        self._store = store
        self._derive = derive
        self._samples: dict[int, Activations] = {}
        self._filled: dict[tuple[object, ...], dict[str, Tensor]] = {}

    def fill(self, lorsa: Lorsa, config: TrainConfig) -> None:
        """Fill a Lorsa, which works on raw activations, from the layer or at random.

        Lorsas that differ in which heads fire start with the same directions.
        """
        device = next(lorsa.parameters()).device
        if config.init_tokens not in self._samples:
            stored = _init_sample(config, self._store)
            self._samples[config.init_tokens] = stored.on(device, self._derive)
        x, y = self._samples[config.init_tokens]
        start = lorsa.as_topk()  # its weights are lorsa's
        heads = (lorsa.config.n_qk_heads, lorsa.config.n_ov_heads)
        key = (heads, config.init, config.init_tokens, config.seed)
        if key in self._filled:
            start.load_state_dict(self._filled[key])
        elif config.init == "random":
            init_random(start, x, seed=config.seed)
        else:
            weights = LayerWeights(**self._store.weights(config.layer)).to(device, torch.float32)
            geometry = layer_geometry(config.layer, self._store)
            weighted = config.init == "layer-weighted"
            init_from_layer(start, weights, geometry, x, seed=config.seed, weighted=weighted)
        self._filled[key] = {n: t.detach().cpu().clone() for n, t in start.state_dict().items()}
        fit_output(start, x, y)
        lorsa.set_threshold(x)


def _init_sample(config: TrainConfig, store: ActivationStore) -> Stored:
    """Return x and y of the first sequences of training, the same on every rank."""
    shard_seqs = store.manifest.shard_seqs
    seqs = sequence_order(store.train_seqs, shard_seqs, seed=config.order_seed, epoch=0)
    n_seqs = max(1, config.init_tokens // store.manifest.n_ctx)
    return store.stored(config.layer, seqs[:n_seqs])
