"""Train dictionary_learning on exported batches: its trainSAE, TopKTrainer and AutoEncoderTopK.

It trains autoencoders alone: its trainers take one tensor, so there is no transcoder to compare.

Documented (README, top_k.py of 0.1.0 and its demonstration): Adam (betas 0.9, 0.999) at
2e-4 / sqrt(n_features / 2^14); activations scaled to a mean squared norm of 1
(normalize_activations); 1,000 steps of warm-up, decay over the last 20 %; gradients clipped to
norm 1; decoder columns kept at norm 1; bias from the geometric median of the first batch; AuxK with
weight 1/32 for features that did not fire on 10 million tokens, more than this comparison has.
"""

from collections.abc import Iterator
from pathlib import Path

import shared
from dictionary_learning.trainers.top_k import (  # type: ignore[import-not-found]
    AutoEncoderTopK,
    TopKTrainer,
)
from dictionary_learning.training import trainSAE  # type: ignore[import-not-found]
from torch import Tensor


class Batches:
    """Batches of x, from the first on each time."""

    def __init__(self, data: shared.Data) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Tensor]:
        return (x for x, _ in self.data.batches())


def train(data: shared.Data, lr: float | None, _variant: str, scratch: Path) -> shared.Trained:
    chosen = lr or 2e-4 / (data.n_features / 2**14) ** 0.5
    settings = {
        "trainer": TopKTrainer,
        "dict_class": AutoEncoderTopK,
        "steps": data.n_steps,
        "activation_dim": data.train.d_model,
        "dict_size": data.n_features,
        "k": shared.TOP_K,
        "layer": data.layer,
        "lm_name": "SmolLM2",
        "lr": chosen,
        "warmup_steps": round(shared.WARMUP * data.n_steps),
        "decay_start": round(0.8 * data.n_steps),
        "seed": 0,
        "device": "cpu",
    }
    trainSAE(
        Batches(data),
        [settings],
        steps=data.n_steps,
        save_dir=str(scratch),
        normalize_activations=True,
        device="cpu",
    )
    coder = AutoEncoderTopK.from_pretrained(scratch / "trainer_0" / "ae.pt")

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = coder.encode(x)
        return coder.decode(acts), acts > 0

    return shared.Trained(reconstruct, chosen, "Adam, scaled activations, TopKTrainer")


if __name__ == "__main__":
    shared.run("dictionary_learning", ("dictionary-learning",), ("sae",), train)
