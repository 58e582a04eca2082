"""The Lorsa module and the attention layer that it replaces."""

from .activation import ACTIVATIONS
from .attention import LayerWeights, layer_attention, stored_attention
from .config import LorsaConfig, parameter_shapes
from .device import DEVICES, choose_device
from .disk import write_json
from .errors import CheckpointError
from .geometry import AttentionGeometry, QKNorm, Rope
from .init import fit_output, init_from_layer, init_random, require_fit
from .llamascopium import write as write_llamascopium
from .lorsa import Encoding, Lorsa, Projected
from .metrics import FVU, Quality, Tally, evaluate, firing_counts

__all__ = [
    "ACTIVATIONS",
    "DEVICES",
    "FVU",
    "AttentionGeometry",
    "CheckpointError",
    "Encoding",
    "LayerWeights",
    "Lorsa",
    "LorsaConfig",
    "Projected",
    "QKNorm",
    "Quality",
    "Rope",
    "Tally",
    "choose_device",
    "evaluate",
    "firing_counts",
    "fit_output",
    "init_from_layer",
    "init_random",
    "layer_attention",
    "parameter_shapes",
    "require_fit",
    "stored_attention",
    "write_json",
    "write_llamascopium",
]
