"""Every causal architecture of the installed transformers, harvested from a tiny random model.

Each is harvested whole, in one layer, without its lm_head, and with an adapter beside it. Each
ends with sites whose stored x and y are those of plain hooks, or with one line that says why not.

    python benchmarks/sweep_models.py                 # all; prints what is neither
    python benchmarks/sweep_models.py llama jamba     # some
    python benchmarks/sweep_models.py --write         # and the table of docs/models.md
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import re
import shutil
import tempfile
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from lorsa.errors import LorsaError
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.language.blocks import attention_modules
from lorsa.sites import attention_ports
from lorsa.store.read.reader import ActivationStore
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

DOC = Path(__file__).parents[1] / "docs" / "models.md"
N_CTX = 24
TEXT = "The quick brown fox jumps over the lazy dog; a store keeps what a model saw. " * 20
MOST_WEIGHTS = 30_000_000
TOLERANCE = 1e-5

_LAYERS = 4
SIZES: dict[int | float, str] = {
    400: "vocab_size vocab_size_per_layer_input",
    32: "hidden_size d_model n_embd dim embedding_size embedding_dim emb_dim word_embed_proj_dim "
    "lru_width",
    48: "intermediate_size ffn_hidden_size ffn_dim n_inner d_inner inner_dim dim_ff dff",
    _LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers "
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
    "encoder_attention_heads n_routed_experts num_experts num_local_experts moe_num_experts "
    "mamba_d_conv mamba_dt_rank laurel_rank linear_num_value_heads rotary_dim",
    2: "encoder_layers num_key_value_heads num_kv_heads n_head_kv num_experts_per_tok "
    "num_experts_per_token moe_topk moe_k top_k_experts n_activated_experts index_n_heads "
    "mamba_expand linear_num_key_heads altup_num_inputs num_global_key_value_heads",
    8: "head_dim kv_channels attention_head_size attention_head_dim q_lora_rank kv_lora_rank "
    "qk_rope_head_dim qk_nope_head_dim v_head_dim index_topk o_lora_rank mamba_d_state state_size "
    "mamba_n_heads mamba_d_head mamba_headdim n_mamba_heads mamba_head_dim mamba_num_heads "
    "ssm_state_size chunk_size mamba_chunk_size linear_key_head_dim linear_value_head_dim "
    "sliding_window attention_window_size window_size local_window_size attention_chunk_size "
    "hidden_size_per_layer_input query_pre_attn_scalar global_head_dim segment_types",
    16: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
    "moe_shared_expert_intermediate_size qk_head_dim index_head_dim position_bias_num_buckets",
    64: "mamba_d_ssm",
    128: "max_position_embeddings n_positions max_seq_len seq_length max_sequence_length",
    1: "n_group topk_group n_shared_experts num_shared_experts mamba_n_groups mamba_ngroups "
    "n_groups first_k_dense_replace num_dense_layers",
    0: "bos_token_id eos_token_id pad_token_id num_kv_shared_layers num_nextn_predict_layers "
    "num_hash_layers use_mamba_kernels",
    0.3: "initializer_range init_std",
    28: "image_size",
    14: "patch_size",
}
"""Sizes of tiny models, by the names that configurations have for them."""

HYBRID = ["mamba", "attention", "mamba", "attention"]
PARTICULAR: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "dbrx": {
        "attn_config": {"clip_qkv": 0.5, "kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1},
    },
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "expand": 2},
    "mpt": {"d_model": 32},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "prophetnet": {"num_hidden_layers": None},
    "reformer": {"is_decoder": True},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}
"""Settings without which a tiny model has no layer of a kind, or cannot be made."""
_LATENT = (
    "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash "
    "minicpm3 youtu"
)
"""Types with keys of a rank, whose head_dim is that of the part which rotates."""
_KEYS = {"head_dim": 8, "qk_head_dim": None, "num_key_value_heads": 4}
PARTICULAR |= dict.fromkeys(_LATENT.split(), _KEYS)
PARTICULAR["deepseek_v2"] = _KEYS | {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
PARTICULAR |= {k: {"head_dim": 8} for k in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")}


class Outcome(NamedTuple):
    """End of one harvest."""

    kind: str
    """exact, refused or fault"""
    what: str
    """Layers and geometry; or the line"""


def main() -> None:
    """Sweep and print, and write the table if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kinds", nargs="*", help="model types; all of transformers' if none")
    parser.add_argument("--write", action="store_true", help="write the table of docs/models.md")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows, n_faults = {}, 0
    for kind in args.kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        found = sweep(kind)
        rows[kind] = found
        for case, outcome in found.items():
            n_faults += outcome.kind == "fault"
            print(f"{kind:26} {case:8} {outcome.kind:8} {outcome.what}", flush=True)
    print(f"{len(rows)} model types, {n_faults} faults")
    if args.write:
        write_table(rows)
    raise SystemExit(n_faults > 0)


def sweep(kind: str) -> dict[str, Outcome]:
    """Harvest a tiny model of a type in every way; return the ends by way."""
    with tempfile.TemporaryDirectory() as name, silence():
        folder = Path(name) / "model"
        try:
            make(kind, folder)
        except Exception as error:  # whatever a configuration leads to
            return {"make": Outcome("not made", _line(error))}
        all_layers = _try(folder, "all")
        some = json.loads(all_layers.what) if all_layers.kind == "exact" else {}
        one = max(map(int, some), default=1)
        found = {"all": all_layers, "one": _try(folder, str(one))}
        _behead(folder)
        found["headless"] = _try(folder, str(one))
        (folder / "adapter_config.json").write_text("{}")
        found["adapter"] = _try(folder, str(one))
        return found


def tiny_config(kind: str) -> Any:
    """Return a configuration of a type with few weights."""
    usual = AutoConfig.for_model(kind)
    settings = _small(usual) | PARTICULAR.get(kind, {})
    for name in getattr(usual, "sub_configs", None) or {}:
        if name not in settings and hasattr(part := getattr(usual, name, None), "to_dict"):
            settings[name] = _small(part)
    return type(usual)(**{name: value for name, value in settings.items() if value is not None})


def _small(config: Any) -> dict[str, Any]:
    """Return the sizes that a configuration has, made small."""
    found: dict[str, Any] = {}
    for size, names in SIZES.items():
        for name in names.split():
            try:
                value = getattr(config, name, None)
            except Exception:  # an attribute that differs from layer to layer
                continue
            if isinstance(value, bool):
                found[name] = bool(size)
            is_number = isinstance(value, int | float) and _can_be_set(config, name)
            if not isinstance(value, bool) and (
                is_number or (name == "pad_token_id" and hasattr(config, name))
            ):
                found[name] = size
    return found


def _can_be_set(config: Any, name: str) -> bool:
    derived = getattr(type(config), name, None)
    return not (isinstance(derived, property) and derived.fset is None)


def make(kind: str, folder: Path) -> None:
    """Write a tiny random model of a type, with a tokenizer."""
    config = tiny_config(kind)
    with torch.device("meta"):
        n_weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if n_weights > MOST_WEIGHTS:
        raise ValueError(f"it has {n_weights:,} weights when it is made tiny")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model(input_ids=torch.arange(2 * N_CTX).view(2, N_CTX), use_cache=False)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT)


def _behead(folder: Path) -> None:
    """Take the weights of the unembedding off a model's files."""
    file = folder / "model.safetensors"
    if not file.exists():
        return
    tensors = load_file(file)
    kept = {n: t for n, t in tensors.items() if not re.search(r"(^|\.)(lm_head|embed_out)\.", n)}
    save_file(kept, file, {"format": "pt"})


def _try(folder: Path, layers: str) -> Outcome:
    """Harvest, and compare with plain hooks; what goes wrong is part of the outcome."""
    store = folder.parent / "acts"
    shutil.rmtree(store, ignore_errors=True)
    try:
        harvest(
            HarvestConfig(
                model=str(folder),
                layers=layers,
                store=store,
                data=str(folder.parent / "text.txt"),
                n_ctx=N_CTX,
                tokens=6 * N_CTX,
                dtype="float32",
                device="cpu",
            )
        )
        return _compared(folder, ActivationStore.open(store))
    except LorsaError as error:
        text = str(error)
        return Outcome("fault" if "\n" in text or not text else "refused", text)
    except Exception as error:  # which is what the sweep looks for
        return Outcome("fault", traceback.format_exc() if not str(error) else _line(error))


def _compared(folder: Path, store: ActivationStore) -> Outcome:
    """Compare a store with what hooks of torch alone see in the model that transformers loads."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    names = {layer: found.name for layer, found in attention_modules(model).items()}
    seen: dict[int, Any] = {}

    def hook(layer: int, args: Any, kwargs: Any, output: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        seen[layer] = x, output[0] if isinstance(output, tuple | list) else output

    for layer in store.layers:
        model.get_submodule(names[layer]).register_forward_hook(
            lambda _m, args, kwargs, output, layer=layer: hook(layer, args, kwargs, output),
            with_kwargs=True,
        )
    with torch.no_grad():
        model(input_ids=store.tokens([0, 1]).long(), use_cache=False)
    for layer in store.layers:
        for ours, theirs in zip(
            store.activations(attention_ports(layer), [0, 1]), seen[layer], strict=True
        ):
            if not (ours - theirs).norm() <= TOLERANCE * theirs.norm():
                return Outcome("fault", f"layer {layer} is not what plain hooks see")
    known = {
        n: store.manifest.modules[f"{n}.attention"]["self_check"]["reason"] for n in store.layers
    }
    return Outcome("exact", json.dumps(known))


def write_table(rows: dict[str, dict[str, Outcome]]) -> None:
    """Write the table between the marks of docs/models.md."""
    version = importlib.metadata.version("transformers")
    lines = [
        f"transformers {version}, {datetime.now(UTC):%Y-%m-%d}: {len(rows)} causal model types. "
        "`python benchmarks/sweep_models.py --write` makes this table.",
        "",
        "| model types | `--layers all` and one layer, with and without `lm_head` |",
        "|---|---|",
    ]
    groups: dict[str, list[str]] = {}
    for kind, found in rows.items():
        groups.setdefault(_in_words(found), []).append(f"`{kind}`")
    lines += [f"| {', '.join(kinds)} | {words} |" for words, kinds in sorted(groups.items())]
    begin, end = "<!-- sweep -->\n", "<!-- /sweep -->"
    text = DOC.read_text("utf-8")
    before, rest = text.split(begin)
    DOC.write_text(before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1], "utf-8")


def _in_words(found: dict[str, Outcome]) -> str:
    """Return the ends of a model type in a few words."""
    if "make" in found:
        return "not tried: no tiny model of it can be made"
    end = found["all"]
    if end.kind != "exact":
        return f"refused: {_general(end.what)}"
    reasons = json.loads(end.what)
    unknown = next((reason for reason in reasons.values() if reason), None)
    layers = "" if len(reasons) == _LAYERS else ", the layers with attention"
    if unknown is None:
        return f"x and y exact, geometry known{layers}"
    return f"x and y exact{layers}; geometry unknown: {_general(unknown)}"


def _general(line: str) -> str:
    """Return a line without the names and numbers of one model."""
    line = re.sub(r"^models of type \S+ (cannot be taken: )?", "", line)
    line = re.sub(r"^layer \d+: ", "", line)
    line = re.sub(r"by \d\.\de[+-]\d+", "", line)
    line = re.sub(r"\b[a-z_]\w*(\.\w+)*\.\d+\.([\w.]*\w)", r"`\2`", line)
    line = re.sub(r" in [a-z_]\w*(\.\w+)*\.\d+\b", " in the layer", line)
    line = re.sub(r"^\w+ has (none|projections)", r"its module has \1", line)
    return line.replace("|", "/")


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextlib.contextmanager
def silence() -> Any:
    """Keep what libraries print to themselves."""
    sink = io.StringIO()
    with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        yield


if __name__ == "__main__":
    main()
