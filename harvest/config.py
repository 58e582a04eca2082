"""Settings of a harvest."""

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checks import require_one_of, require_positive
from ..language.aliases import canonical
from ..language.choices import BOS_RULES, DEVICES, MODEL_DTYPES
from ..sites import parse_site_names
from ..store.choices import ACTIVATION_DTYPES, COMPRESSIONS, DEFAULT_STORE, OUTPUTS
from ..store.places import Place, place
from .corpus.choices import DEFAULT_DATA, PACKINGS, STDLIB, config_of, is_hub_id

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_UNITS |= {f"{unit}i": 1024**i for i, unit in enumerate("kmgt", start=1)}


def parse_bytes(text: str) -> int | None:
    """Return the bytes that a text such as 500GB or 1.5TiB means, None if it means none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    return None if found is None else int(float(found[1]) * _UNITS[found[2] or ""]) or None


@dataclass(frozen=True, kw_only=True, slots=True)
class HarvestConfig:
    """Settings of one harvest."""

    model: str
    """Alias (qwen2-7b), Hub id, transformers folder, or .gguf file."""
    layers: str = "all"
    """Layers counted from 0, ends included: 0-27, 3,7,12 or all."""
    sites: str = "attn"
    """Sites of each layer, as groups (attn, mlp, resid) or names: attn_in, attn_out, mlp_in,
    mlp_out, resid_in, resid_mid, resid_out. See docs/harvest.md for what each is."""
    store: Place = Path(DEFAULT_STORE)
    """Folder to write, or s3://bucket/folder. It must be new, empty, or a harvest of the same
    request."""
    data: str = DEFAULT_DATA
    """Text: a file or folder of .txt .md .rst .py .jsonl .csv .parquet .arrow, a Hub dataset
    (owner/name), or stdlib (Python's own documentation and sources). See docs/corpora.md."""
    text_column: str = "text"
    """Column of a table, or field of a JSON line, with the text."""
    tokens_column: str | None = None
    """Column with token ids, of a corpus that is tokenised already. It is read in place of text."""
    data_config: str | None = None
    """Config of a Hub dataset. None takes its own default, of fineweb sample-10BT."""
    data_split: str = "train"
    """Split of a Hub dataset."""
    tokens: int | None = None
    """Tokens to harvest. None takes what fits the budget, at most 10 million."""
    budget: str | None = None
    """Bytes that the store may take: 500GB. With tokens, whichever is less. None takes half of the
    free disk."""
    n_ctx: int = 1024
    """Tokens in a sequence, the context that the attention sees."""
    batch_size: int | str = "auto"
    """Sequences in a forward pass, or auto: what the GPU's memory holds. "auto" begins with what
    suits the device and halves it when a GPU's memory is full."""
    dtype: str = "bfloat16"
    """Dtype of the stored activations: bfloat16, float16, float32 or int8. bfloat16 is what the
    models compute in, and half of float32; int8 is half of that again, see docs/store.md for what
    it costs."""
    outputs: str = "store"
    """Whether every site is stored, or as few as give the others when they are wanted: store or
    derive. "derive" takes one array a layer, or one each of attn and mlp; see docs/store.md."""
    compression: str = "none"
    """Lossless compression of the stored activations: none, lz4 or zstd. It saves about a quarter
    and reads slower; of int8 zstd saves a tenth."""
    model_dtype: str = "auto"
    """Dtype that the model computes in: auto, float32, bfloat16 or float16. "auto" is its own on a
    GPU, float32 on a CPU."""
    device: str = "auto"
    """Device to run the model on: auto, cpu or cuda. "auto" is a GPU if there is one."""
    bos: str = "auto"
    """BOS before documents: auto, always or never. "auto" does as the model's tokenizer does."""
    packing: str = "pack"
    """Documents run on from one sequence to the next (pack), or each begins one (no-pack). With
    "no-pack" a sequence is the beginning of a document, and shorter documents are dropped."""
    seed: int = 0
    """Seed of the order of documents."""
    selfcheck: bool = True
    """Refuse a model whose attention cannot be recomputed from what was read of it."""
    keep_nonfinite: bool = False
    """Count and keep activations with NaN or Inf instead of stopping at them. It may be changed
    when a harvest is resumed."""
    buffer_gb: float = 4.0
    """GB of activations that may wait in memory for the disk. Then the model waits."""
    force: bool = False
    """Begin although the disk looks too small."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "store", place(self.store))
        parse_site_names(self.sites)
        if str(self.batch_size).isdecimal():
            object.__setattr__(self, "batch_size", int(self.batch_size))
        for name, least in (("n_ctx", 2), ("batch_size", 1), ("tokens", 2), ("seed", 0)):
            value = getattr(self, name)
            if value is None or (name == "batch_size" and value == "auto"):
                continue
            if type(value) is not int or not least <= value < 1 << 63:
                also = " or auto" if name == "batch_size" else ""
                raise ValueError(f"{name} is {value}; allowed: {least} or more{also}")
        if self.budget is not None and parse_bytes(self.budget) is None:
            raise ValueError(f"budget is {self.budget!r}; give bytes such as 500GB or 1.5TB")
        require_one_of(
            self,
            dtype=ACTIVATION_DTYPES,
            compression=COMPRESSIONS,
            outputs=OUTPUTS,
            model_dtype=MODEL_DTYPES,
            bos=BOS_RULES,
            packing=PACKINGS,
            device=DEVICES,
        )
        if self.tokens_column is not None and self.text_column != "text":
            raise ValueError("text_column and tokens_column are both given; allowed: one of them")
        if self.dtype == "int8" and self.compression == "lz4":
            raise ValueError("compression is 'lz4', which saves nothing on int8: use none or zstd")
        require_positive(self, "buffer_gb")
        if self.outputs == "derive" and not self.selfcheck:
            raise ValueError("outputs is 'derive', which needs the self-check: use 'store'")

    @property
    def batch_seqs(self) -> int | None:
        """Sequences in a forward that are asked for; None for "auto"."""
        return self.batch_size if isinstance(self.batch_size, int) else None

    @property
    def budget_bytes(self) -> int | None:
        """The budget in bytes."""
        return None if self.budget is None else parse_bytes(self.budget)

    @property
    def buffer_bytes(self) -> int:
        """The buffer in bytes."""
        return int(self.buffer_gb * 1e9)

    def request(self) -> dict[str, Any]:
        """Return the settings that decide what is in the store, apart from its sites."""
        free = {"store", "layers", "sites", "batch_size", "device", "selfcheck"}
        free |= {"buffer_gb", "force"}
        settings = {name: value for name, value in asdict(self).items() if name not in free}
        is_name = self.data == STDLIB or is_hub_id(self.data)
        return settings | {
            "model": canonical(self.model),
            "data": self.data if is_name else str(Path(os.path.expanduser(self.data)).resolve()),
            "data_config": config_of(self.data, self.data_config),
        }
