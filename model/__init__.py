"""The Lorsa module and the attention layer that it replaces."""

from .activation import ACTIVATIONS
from .attach import (
    Edit,
    Replacement,
    edited,
    module_input,
    module_output,
    replaced,
    require_stand_in,
)
from .attention import LayerWeights, layer_attention, stored_attention
from .config import LorsaConfig, parameter_shapes
from .device import DEVICES, choose_device
from .disk import write_json
from .errors import AttachError, CheckpointError
from .geometry import AttentionGeometry, QKNorm, Rope
from .init import fit_output, init_from_layer, init_random, require_fit
from .llamascopium import write as write_llamascopium
from .lorsa import Encoding, Lorsa, Projected
from .metrics import FVU, Quality, Tally, evaluate, firing_counts
from .sites import AttentionSite, attention_paths, attention_sites

__all__ = [
    "ACTIVATIONS",
    "DEVICES",
    "FVU",
    "AttachError",
    "AttentionGeometry",
    "AttentionSite",
    "CheckpointError",
    "Edit",
    "Encoding",
    "LayerWeights",
    "Lorsa",
    "LorsaConfig",
    "Projected",
    "QKNorm",
    "Quality",
    "Replacement",
    "Rope",
    "Tally",
    "attention_paths",
    "attention_sites",
    "choose_device",
    "edited",
    "evaluate",
    "firing_counts",
    "fit_output",
    "init_from_layer",
    "init_random",
    "layer_attention",
    "module_input",
    "module_output",
    "parameter_shapes",
    "replaced",
    "require_fit",
    "require_stand_in",
    "stored_attention",
    "write_json",
    "write_llamascopium",
]
