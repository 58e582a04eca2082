"""Start of a run: the scales of the activations, and the first weights of its dictionary."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..dictionaries.dictionary import Dictionary
from ..dictionaries.linear import LinearDictionary
from ..dictionaries.linear_start import fit_scale, start_linear
from ..dictionaries.lorsa.module import Lorsa
from ..dictionaries.lorsa.start import fit_output, init_from_layer, init_random
from ..language.attention import LayerWeights
from ..language.stored import layer_geometry
from ..sites import Site
from ..store.read.reader import ActivationStore
from ..store.read.sampler import sequence_order
from ..store.read.stored import Activations, Derive, Stored
from .config import TrainConfig


class Scales(NamedTuple):
    """Factors of the activations in training: powers of two, so that they fold away exactly.

    The usual ||x|| and ||y|| come to lie within a factor sqrt(2) of sqrt(d_model), so one learning
    rate serves all sites and layers. The usual norm is the mean for Lorsas, and the median for
    other kinds: in the residual stream a few tokens of outlier norm lead the mean.
    """

    x: float
    y: float


def scales_of(config: TrainConfig, store: ActivationStore) -> Scales:
    """Return the factors of what a run's dictionary reads and writes, at one site each."""
    (read,), (written,) = config.ports
    usual = store.mean_norm if config.kind == "lorsa" else store.median_norm

    def scale(site: Site) -> float:
        norm, target = usual(site), math.sqrt(store.width(site))
        return 2.0 ** round(math.log2(target / norm)) if 0 < norm < math.inf else 1.0

    return Scales(scale(read), scale(written))


class Initialiser:
    """Fills dictionaries of one layer and order; what several have in common is computed once."""

    def __init__(self, store: ActivationStore, derive: Derive | None = None) -> None:
        """Choose a store.

        Args:
            store: the store that is trained on.
            derive: computes sites that are not stored on the device of the training.
        """
        self._store = store
        self._derive = derive
        self._sampled: tuple[object, ...] | None = None
        self._sample = Activations(torch.empty(0), torch.empty(0))
        self._filled: dict[tuple[object, ...], dict[str, Tensor]] = {}

    def fill(self, dictionary: Dictionary, config: TrainConfig) -> None:
        """Fill a dictionary, which works on raw activations, as its config says.

        Those that differ in which features fire start with the same directions.
        """
        x, y = self._sample_of(config, dictionary.W_O.device)
        start = dictionary.as_topk()  # its weights are the dictionary's
        shapes = tuple(start.config.weight_shapes().items())
        key = (config.ports, shapes, config.init, config.init_tokens, config.seed)
        if key in self._filled:
            start.load_state_dict(self._filled[key])
        else:
            self._fill(start, config, x, y)
        self._filled[key] = {n: t.detach().cpu().clone() for n, t in start.state_dict().items()}
        if isinstance(start, LinearDictionary):
            fit_scale(start, x, y)
        elif isinstance(start, Lorsa):
            fit_output(start, x, y)
        dictionary.set_threshold(x)

    def _fill(self, start: Dictionary, config: TrainConfig, x: Tensor, y: Tensor) -> None:
        """Fill a dictionary of activation topk but for the scale of what it writes."""
        if isinstance(start, LinearDictionary):
            start_linear(start, x, y, seed=config.seed)
        elif isinstance(start, Lorsa) and config.init == "random":
            init_random(start, x, seed=config.seed)
        elif isinstance(start, Lorsa):
            module = f"{config.layer}.attention"
            weights = LayerWeights(**self._store.weights(module)).to(x.device, torch.float32)
            geometry = layer_geometry(config.layer, self._store)
            weighted = config.init == "layer-weighted"
            init_from_layer(start, weights, geometry, x, seed=config.seed, weighted=weighted)

    def _sample_of(self, config: TrainConfig, device: torch.device) -> Activations:
        """Return x and y of the first training sequences; one sample is in memory at a time."""
        key = (config.ports, config.init_tokens)
        if key != self._sampled:
            self._sample = Activations(torch.empty(0), torch.empty(0))
            self._sample = _init_sample(config, self._store).on(device, self._derive)
            self._sampled = key
        return self._sample


def _init_sample(config: TrainConfig, store: ActivationStore) -> Stored:
    """Return x and y of the first training sequences, the same on every rank."""
    shard_seqs = store.manifest.shard_seqs
    seqs = sequence_order(store.train_seqs, shard_seqs, seed=config.order_seed, epoch=0)
    n_seqs = max(1, config.init_tokens // store.manifest.n_ctx)
    return store.stored(config.ports, seqs[:n_seqs])
