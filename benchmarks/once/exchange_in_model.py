"""Lorsas from here in TransformerLens' models: what the model predicts, and what it predicts here.

    python benchmarks/once/exchange_in_model.py ours --folder F [--run RUN ... --store STORE]
    THEIR_PYTHON benchmarks/once/exchange_in_model.py theirs --folder F --write

THEIR_PYTHON as for exchange_llamascopium.py. `ours` converts Lorsas to Llamascopium's format with
the norm folded out, and saves what the language model predicts with them in the layer's place.
`theirs` loads the language model with TransformerLens, its weights processed, puts the Lorsa
between blocks.L.ln1.hook_normalized and blocks.L.hook_attn_out, and tells the differences.
"""

import argparse
import json
import platform
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from exchange_llamascopium import distance
from safetensors.torch import load_file, save_file
from torch import Tensor

RESULTS = Path(__file__).parent.parent / "results" / "exchange_in_model.md"
N_SEQS, N_CTX, LAYER = 8, 64, 1
TINY: dict[str, dict[str, Any]] = {
    "LayerNorm, learned positions": {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 3,
        "n_ctx": 128,
    },
    "LayerNorm, parallel, rotary": {
        "model_type": "gpt_neox",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
    },
    "RMSNorm, grouped queries": {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
    },
}
"""Models with random weights. TransformerLens takes a folder with llama in its name for another."""
N_TOKENS = 300
COMMON: dict[str, Any] = {
    "vocab_size": N_TOKENS,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.3,
}


def main() -> None:
    args = parse()
    {"ours": ours, "theirs": theirs}[args.part](args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=["ours", "theirs"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--run", type=Path, nargs="*", default=[], help="trained Lorsas, as well")
    parser.add_argument("--store", help="store with their layer")
    parser.add_argument("--write", action="store_true", help=f"append rows to {RESULTS.name}")
    return parser.parse_args()


@torch.no_grad()
def ours(args: argparse.Namespace) -> None:
    """Convert Lorsas, and save what the model predicts with them here."""
    from lorsa import ActivationStore, Lorsa

    for case in TINY:
        folder = args.folder / case
        model = tiny_model(case)
        model.save_pretrained(folder / "model")
        random_lorsa(model.config).save_pretrained(folder / "lorsa")
        random = torch.Generator().manual_seed(2)
        tokens = torch.randint(N_TOKENS, (N_SEQS, N_CTX), generator=random)
        save(folder, model, tokens)
    for run in args.run:
        lorsa = Lorsa.from_pretrained(run)
        folder = args.folder / f"trained, layer {lorsa.config.layer}"
        store = ActivationStore.open(args.store)
        model = language_model(store.manifest.model["id"])
        model.save_pretrained(folder / "model")
        lorsa.save_pretrained(folder / "lorsa")
        tokens = torch.as_tensor(store.tokens(store.held_out_seqs[:N_SEQS])).long()
        save(folder, model, tokens)


def tiny_model(case: str) -> Any:
    """Return a model whose norms have weights and biases of their own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**COMMON, **TINY[case])
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.add_(torch.randn_like(parameter) * 0.2)
        elif name.endswith("bias"):
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def random_lorsa(language: Any) -> Any:
    from lorsa import Lorsa, LorsaConfig
    from lorsa.language.geometry import Rope

    width = 16
    lorsa = Lorsa(
        LorsaConfig(
            d_model=language.hidden_size,
            n_qk_heads=16,
            d_qk_head=width,
            n_ov_heads=512,
            top_k=24,
            n_ctx=N_CTX,
            scale=width**-0.5,
            rope=Rope(inv_freq=tuple(10000 ** (-2 * j / width) for j in range(width // 2))),
            layer=LAYER,
        )
    )
    random = torch.Generator().manual_seed(1)
    for parameter in lorsa.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    return lorsa


def language_model(name: str) -> Any:
    from lorsa.language.subject import Subject

    loaded = Subject.find(name).load(devices=["cpu"], dtype="float32")
    model = type(loaded)(loaded.config)  # one of a .gguf file cannot be saved as it is
    model.load_state_dict(loaded.state_dict())
    return model.eval()


def save(folder: Path, model: Any, tokens: Tensor) -> None:
    """Convert a folder's Lorsa, and save what is predicted with it."""
    from lorsa import ConvertConfig, Lorsa, convert_lorsa

    convert_lorsa(
        ConvertConfig(
            source=str(folder / "lorsa"),
            out=folder / "theirs",
            to="llamascopium",
            model=str(folder / "model"),
        )
    )
    bare = model(tokens).logits
    lorsa = Lorsa.from_pretrained(folder / "lorsa")
    with lorsa.attach(model):
        logits = model(tokens).logits
    io = {"tokens": tokens, "bare": bare.log_softmax(-1), "logprobs": logits.log_softmax(-1)}
    save_file({name: tensor.contiguous() for name, tensor in io.items()}, folder / "io.safetensors")


@torch.no_grad()
def theirs(args: argparse.Namespace) -> None:
    """Load both with TransformerLens and Llamascopium, and tell the differences."""
    machine = f"{platform.machine()}, torch {torch.__version__}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("llamascopium", "transformer-lens"))
    lines = []
    for folder in sorted(path.parent for path in args.folder.glob("*/io.safetensors")):
        io = load_file(folder / "io.safetensors")
        model = hooked(folder / "model")
        bare = model(io["tokens"]).log_softmax(-1)
        with_it = replaced(model, folder / "theirs", io["tokens"])
        moved = (io["logprobs"] - io["bare"]).abs().max()
        lines.append(
            f"| {datetime.now(UTC):%Y-%m-%d} | {folder.name} | {io['tokens'].numel()} | "
            f"{distance(bare, io['bare']):.1e} | {distance(with_it, io['logprobs']):.1e} | "
            f"{float(moved):.1f} | {cross_entropy(io['logprobs'], io['tokens']):.6f} | "
            f"{cross_entropy(with_it, io['tokens']):.6f} | {versions}; {machine} |"
        )
        print(lines[-1])
    if args.write:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


def hooked(folder: Path) -> Any:
    """Return a folder's language model with its weights processed, as Llamascopium loads it.

    Of a Llama that TransformerLens does not know by name, it does not read the rotary base.
    """
    from transformers import AutoModelForCausalLM

    loading = import_module("transformer_lens.loading_from_pretrained")
    language = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = loading.get_pretrained_model_config(str(folder), fold_ln=True, device="cpu")
    settings = json.loads((folder / "config.json").read_text())
    rope = settings.get("rope_parameters") or settings
    config.rotary_base = rope.get("rope_theta") or settings.get("rotary_emb_base") or 10000
    config.tokenizer_name = None
    weights = loading.get_pretrained_state_dict(str(folder), config, language)
    model = import_module("transformer_lens").HookedTransformer(config)
    model.load_and_process_state_dict(weights)
    return model.eval()


def replaced(model: Any, folder: Path, tokens: Tensor) -> Tensor:
    """Return log-probabilities with a Lorsa in its layer's place."""
    package = import_module("llamascopium.models.lorsa")
    sae = package.LowRankSparseAttention.from_pretrained(str(folder))
    seen: dict[str, Tensor] = {}

    def read(x: Tensor, hook: Any) -> None:
        seen["x"] = x

    def write(y: Tensor, hook: Any) -> Tensor:
        y_hat: Tensor = sae.decode(sae.encode(seen["x"]))
        return y_hat

    hooks = [(sae.cfg.hook_point_in, read), (sae.cfg.hook_point_out, write)]
    logits: Tensor = model.run_with_hooks(tokens, fwd_hooks=hooks)
    return logits.log_softmax(-1)


def cross_entropy(logprobs: Tensor, tokens: Tensor) -> float:
    """Return the mean over next tokens, in nats."""
    return -float(logprobs[:, :-1].gather(-1, tokens[:, 1:, None]).mean())


if __name__ == "__main__":
    main()
