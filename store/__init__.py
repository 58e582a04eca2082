"""The on-disk activation store: written once by a harvest, read by many runs."""

from .care import remove_layers
from .encoding import ACTIVATION_DTYPES, COMPRESSIONS, DTYPES, Encoded
from .errors import BegunError, BusyError, StoreError
from .folder import is_begun, is_complete, layers_being_added, mending, require_free
from .info import format_bytes, store_info
from .layers import choose_layers, spell_layers
from .layout import read_weights
from .loader import Batch, batches, held_out_batches, held_out_parts
from .manifest import MANIFEST, OUTPUTS, PLAN, Manifest, held_out_shards, read_manifest
from .merge import merge_stores
from .places import Place, free_bytes, place, sync_tree, tree_bytes
from .reader import Activations, ActivationStore, Derive, Stored, TokenScales
from .repair import verify_store
from .rows import Seqs
from .sampler import Sampler, sequence_order
from .verify import Checked
from .writer import BUFFER_BYTES, StoreWriter

__all__ = [
    "ACTIVATION_DTYPES",
    "BUFFER_BYTES",
    "COMPRESSIONS",
    "DTYPES",
    "MANIFEST",
    "OUTPUTS",
    "PLAN",
    "ActivationStore",
    "Activations",
    "Batch",
    "BegunError",
    "BusyError",
    "Checked",
    "Derive",
    "Encoded",
    "Manifest",
    "Place",
    "Sampler",
    "Seqs",
    "StoreError",
    "StoreWriter",
    "Stored",
    "TokenScales",
    "batches",
    "choose_layers",
    "format_bytes",
    "free_bytes",
    "held_out_batches",
    "held_out_parts",
    "held_out_shards",
    "is_begun",
    "is_complete",
    "layers_being_added",
    "mending",
    "merge_stores",
    "place",
    "read_manifest",
    "read_weights",
    "remove_layers",
    "require_free",
    "sequence_order",
    "spell_layers",
    "store_info",
    "sync_tree",
    "tree_bytes",
    "verify_store",
]
