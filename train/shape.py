"""Shape of the dictionary that a run trains: its settings brought together with its store."""

import math
from typing import Any

from ..dictionaries.config import DictionaryConfig
from ..dictionaries.linear_config import SaeConfig, TranscoderConfig
from ..dictionaries.lorsa.config import LorsaConfig
from ..dictionaries.lorsa.start import require_fit, scored_as
from ..errors import TrainError
from ..language.stored import layer_geometry
from ..store.read.reader import ActivationStore
from .config import TrainConfig

QK_HEADS_PER_HEAD = 4
"""QK heads for every head of the layer, where n_qk_heads is not given."""


def shape_of(config: TrainConfig, store: ActivationStore) -> DictionaryConfig:
    """Return the shape of the dictionary that a run trains.

    Raises:
        TrainError: sizes do not fit each other, or the dictionary is to start from a module of the
            layer that is not understood.
    """
    make = {"lorsa": _lorsa, "sae": _sae, "transcoder": _transcoder}[config.kind]
    try:
        return make(config, store)
    except ValueError as error:
        raise TrainError(str(error)) from None


def _lorsa(config: TrainConfig, store: ActivationStore) -> LorsaConfig:
    self_check = store.manifest.modules[f"{config.layer}.attention"].get("self_check") or {}
    if config.init != "random" and not self_check.get("passed"):
        error = self_check.get("error")
        why = self_check.get("reason") or f"self-check failed, relative error {error}"
        raise TrainError(
            f"layer {config.layer} of {store.root} cannot be started from: its geometry is unknown "
            f"({why}); give --init random"
        )
    geometry = layer_geometry(config.layer, store)
    n_qk_heads = config.n_qk_heads or QK_HEADS_PER_HEAD * geometry.n_heads
    wanted = math.ceil(config.expansion * geometry.d_model / n_qk_heads) * n_qk_heads
    shape = LorsaConfig(
        n_qk_heads=n_qk_heads,
        d_qk_head=geometry.d_head,
        n_ov_heads=config.n_ov_heads or wanted,
        **scored_as(geometry, n_qk_heads),
        **_common(config, store),
    )
    if config.init != "random":
        require_fit(shape, geometry)
    return shape


def _sae(config: TrainConfig, store: ActivationStore) -> SaeConfig:
    assert config.site is not None
    return SaeConfig(site=config.site, **_features(config, store), **_common(config, store))


def _transcoder(config: TrainConfig, store: ActivationStore) -> TranscoderConfig:
    return TranscoderConfig(skip=config.skip, **_features(config, store), **_common(config, store))


def _features(config: TrainConfig, store: ActivationStore) -> dict[str, Any]:
    """Return what SAEs and transcoders have in common besides what all kinds have."""
    wanted = math.ceil(config.expansion * store.width(config.ports.reads[0]))
    return {"n_features": config.n_features or wanted, "prefixes": config.prefixes}


def _common(config: TrainConfig, store: ActivationStore) -> dict[str, Any]:
    """Return what dictionaries of every kind have."""
    facts = store.manifest
    return {
        "d_model": store.width(config.ports.reads[0]),
        "top_k": config.top_k,
        "select": config.select,
        "activation": config.activation,
        "max_l0": config.max_l0,
        "n_ctx": facts.n_ctx,
        "base_model": facts.model.get("id"),
        "base_revision": facts.model.get("revision"),
        "layer": config.layer,
        "store_uuid": facts.uuid,
    }
