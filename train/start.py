"""From a store and a request to a Lorsa that is ready to train."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dictionaries.lorsa.config import LorsaConfig
from ..dictionaries.lorsa.module import Lorsa
from ..dictionaries.lorsa.start import fit_output, init_from_layer, init_random, require_fit
from ..errors import TrainError
from ..language.attention import LayerWeights
from ..language.stored import layer_geometry
from ..store.read.reader import Activations, ActivationStore, Derive, Stored
from ..store.read.sampler import sequence_order
from .config import TrainConfig

QK_HEADS_PER_HEAD = 4


class Scales(NamedTuple):
    """What the activations are multiplied by in training: powers of two, so they fold away exactly.

    E||x|| and E||y|| come to lie within a factor sqrt(2) of sqrt(d_model), so one learning rate
    serves all layers.
    """

    x: float
    y: float


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


def activation_scales(layer: int, store: ActivationStore) -> Scales:
    """Return the powers of two that bring the mean norms nearest to sqrt(d_model)."""
    norms = store.mean_norms(layer)
    target = math.sqrt(store.manifest.d_model)

    def nearest(norm: float) -> float:
        return 2.0 ** round(math.log2(target / norm)) if norm > 0 else 1.0

    return Scales(nearest(norms.x), nearest(norms.y))


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
