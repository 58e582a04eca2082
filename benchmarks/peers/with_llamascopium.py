"""Train Llamascopium on exported batches: its Initializer, its Trainer and its SparseAutoEncoder.

Documented (docs/models/sae.md, docs/models/transcoder.md, docs/train-saes.md and
examples/train_pythia_sae_topk.py): Adam (betas 0.9, 0.999) at 1e-4; 5,000 steps of warm-up, the
last 20 % falling to 1/32; activations scaled to a mean norm of sqrt(d_model); features chosen by
score times decoder norm; k constant; float32. Start of an SAE: decoder bias from the mean, the
decoder's norm by grid search, encoder from its transpose, encoder bias from the mean of the
pre-activations. Start of a transcoder: the same, and decoder rows from the layer's own MLP
(initialize_tc_with_mlp), whose weights are given to it in a model of one layer. Its first batch is
of 4,096 tokens, as documented; those of the run are ours.
"""

import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import shared
import torch
from safetensors.torch import load_file
from torch import Tensor

package: Any = import_module("llamascopium")
trainers: Any = import_module("llamascopium.trainer")
HOOKS = {"sae": ("resid", "resid"), "transcoder": ("mlp_in", "mlp_out")}
START_SEQS = 16


class Stream:
    """Batches as the Initializer and the Trainer take them, from the first on each time."""

    def __init__(self, data: shared.Data, seqs: int | None = None) -> None:
        self.data, self.seqs = data, seqs

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        reads, writes = HOOKS[self.data.kind]
        for x, y in self.data.batches(self.seqs):
            ones = torch.ones(len(x), dtype=torch.int64)
            yield {reads: x, writes: y, "tokens": ones, "mask": ones}


def train(data: shared.Data, lr: float | None, _variant: str, scratch: Path) -> shared.Trained:
    chosen = lr or 1e-4
    coder = started(data)
    n_first = len(next(iter(data.batches()))[0])
    settings = trainers.TrainerConfig(
        amp_dtype=torch.float32,
        lr=chosen,
        lr_warm_up_steps=shared.WARMUP,
        lr_cool_down_steps=0.2,
        initial_k=shared.TOP_K,
        k_warmup_steps=0,
        total_training_tokens=data.n_steps * n_first,
        skip_metrics_calculation=True,
        n_checkpoints=0,
        exp_result_path=str(scratch),
    )
    trainers.Trainer(settings).fit(coder, Stream(data))
    reads, writes = HOOKS[data.kind]

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        factors = {hook: float(coder.compute_norm_factor(x, hook)) for hook in (reads, writes)}
        acts = coder.encode(x * factors[reads])
        return coder.decode(acts) / factors[writes], acts > 0

    return shared.Trained(reconstruct, chosen, "Adam, its recommended start and schedule")


def started(data: shared.Data) -> Any:
    """Return its dictionary as its Initializer makes it, once for all learning rates."""
    path = data.folder / "starts" / f"{data.layer}.{data.kind}.pt"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        torch.save(initialised(data).full_state_dict(), path)
    coder = package.SparseAutoEncoder.from_config(coder_config(data))
    coder.load_full_state_dict(torch.load(path))
    return coder


def coder_config(data: shared.Data) -> Any:
    """Return the shape of its dictionary."""
    reads, writes = HOOKS[data.kind]
    return package.SAEConfig(
        hook_point_in=reads,
        hook_point_out=writes,
        d_model=data.train.d_model,
        expansion_factor=shared.EXPANSION,
        act_fn="topk",
        top_k=shared.TOP_K,
        dtype=torch.float32,
        device="cpu",
    )


def initialised(data: shared.Data) -> Any:
    """Return its dictionary as its Initializer makes it."""
    from_mlp = data.kind == "transcoder"
    settings = package.InitializerConfig(
        bias_init_method="geometric_median",
        grid_search_init_norm=True,
        init_encoder_bias_with_mean_hidden_pre=True,
        init_encoder_with_decoder_transpose=not from_mlp,
        initialize_tc_with_mlp=from_mlp,
        model_layer=0,
    )
    initializer: Any = import_module("llamascopium.initializer")
    return initializer.Initializer(settings).initialize_sae_from_config(
        coder_config(data),
        activation_stream=Stream(data, START_SEQS),
        model=language_model(data) if from_mlp else None,
    )


@torch.no_grad()
def language_model(data: shared.Data) -> Any:
    """Return a model of one layer, in its class, whose MLP is the one that the data came from."""
    lens: Any = import_module("transformer_lens")
    backend: Any = import_module("llamascopium.backend.language_model")
    weights = load_file(data.folder / f"{data.layer}.mlp-weights.safetensors")
    config = lens.HookedTransformerConfig(
        n_layers=1,
        d_model=data.train.d_model,
        n_ctx=data.train.n_ctx,
        d_head=data.train.d_model,
        n_heads=1,
        d_mlp=len(weights["W_up"]),
        d_vocab=2,
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        device="cpu",
    )
    model = backend.TransformerLensLanguageModel.from_hooked_transformer(
        lens.HookedTransformer(config)
    )
    mlp = model.blocks[0].mlp
    for parameter in mlp.parameters():
        parameter.zero_()
    mlp.W_gate.copy_(weights["W_gate"].T)
    mlp.W_in.copy_(weights["W_up"].T)
    mlp.W_out.copy_(weights["W_down"])
    x, y, _ = data.held_out.sequences(0, 1)
    away = float((mlp(x) - y).norm() / y.norm())
    if not math.isfinite(away) or away > 1e-2:
        raise SystemExit(f"its MLP is {away:.1e} away from the outputs that were exported")
    return model


if __name__ == "__main__":
    packages = ("llamascopium", "transformer-lens")
    shared.run("Llamascopium", packages, ("sae", "transcoder"), train)
