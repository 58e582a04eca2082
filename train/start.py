"""Start of a run: the scales of the activations, and the first weights of its Lorsa."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..dictionaries.lorsa.module import Lorsa
from ..dictionaries.lorsa.start import fit_output, init_from_layer, init_random
from ..language.attention import LayerWeights
from ..language.stored import layer_geometry
from ..sites import Site, attention_ports
from ..store.read.reader import ActivationStore
from ..store.read.sampler import sequence_order
from ..store.read.stored import Activations, Derive, Stored
from .config import TrainConfig


class Scales(NamedTuple):
    """Factors of the activations in training: powers of two, so that they fold away exactly.

    E||x|| and E||y|| come to lie within a factor sqrt(2) of sqrt(d_model), so one learning rate
    serves all layers.
    """

    x: float
    y: float


def activation_scales(layer: int, store: ActivationStore) -> Scales:
    """Return the powers of two that bring the mean norms nearest to sqrt(d_model)."""

    def nearest(site: Site) -> float:
        norm, target = store.mean_norm(site), math.sqrt(store.width(site))
        return 2.0 ** round(math.log2(target / norm)) if norm > 0 else 1.0

    return Scales(*map(nearest, attention_ports(layer).sites))


class Initialiser:
    """Fills Lorsas of one layer and order; what several have in common is computed once."""

    def __init__(self, store: ActivationStore, derive: Derive | None = None) -> None:
        """Choose a store.

        Args:
            store: the store that is trained on.
            derive: computes y from x on the device of the training; needed if y is not stored.
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
            own = self._store.weights(f"{config.layer}.attention")
            weights = LayerWeights(**own).to(device, torch.float32)
            geometry = layer_geometry(config.layer, self._store)
            weighted = config.init == "layer-weighted"
            init_from_layer(start, weights, geometry, x, seed=config.seed, weighted=weighted)
        self._filled[key] = {n: t.detach().cpu().clone() for n, t in start.state_dict().items()}
        fit_output(start, x, y)
        lorsa.set_threshold(x)


def _init_sample(config: TrainConfig, store: ActivationStore) -> Stored:
    """Return x and y of the first training sequences, the same on every rank."""
    shard_seqs = store.manifest.shard_seqs
    seqs = sequence_order(store.train_seqs, shard_seqs, seed=config.order_seed, epoch=0)
    n_seqs = max(1, config.init_tokens // store.manifest.n_ctx)
    return store.stored(attention_ports(config.layer), seqs[:n_seqs])
