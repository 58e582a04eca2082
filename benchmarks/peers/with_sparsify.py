"""Train sparsify (package eai-sparsify) on exported batches: its own Trainer and its own classes.

The Trainer takes activations from a language model by hooks. The model here has one module, which
gives back what was exported; token ids are numbers of sequences.

Documented (README and config.py of 1.3.3): signum with momentum 0.95, schedule-free, at
5e-3 / sqrt(n_features / 2^14); loss is the FVU of the batch; no AuxK (auxk_alpha 0); decoder rows
of an SAE kept at norm 1, a transcoder's start at zero; biases start at the mean of the first batch.
The variant "adam" is its Adam (betas 0.9, 0.999) at 2e-4 / sqrt(n_features / 2^14), with linear
warm-up and decay, which was its default in other versions.
"""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it reads this when it is imported

import shared
import sparsify  # type: ignore[import-not-found]
import torch
from torch import Tensor, nn

DOCUMENTED = {"": ("signum", 5e-3), "adam": ("adam", 2e-4)}
"""Optimizer and learning rate at 2^14 features, by variant."""


class Site(nn.Module):
    """Module whose input and output the Trainer reads."""

    def forward(self, _x: Tensor, y: Tensor) -> Tensor:
        """Return y."""
        return y


class Exported(nn.Module):
    """Language model in place of the one that the activations came from."""

    device = torch.device("cpu")

    def __init__(self, data: shared.Data) -> None:
        super().__init__()
        self.data = data
        self.site = Site()
        self.config = SimpleNamespace(num_hidden_layers=1)
        self.dummy_inputs = {"input_ids": torch.zeros(1, data.train.n_ctx, dtype=torch.long)}

    @property
    def base_model(self) -> "Exported":
        """Itself, in which the Trainer looks for modules."""
        return self

    def forward(self, input_ids: Tensor) -> None:
        """Run the module on the sequences that are named, [n, n_ctx]."""
        first = int(input_ids.min())
        x, y, _ = self.data.train.sequences(first, first + len(input_ids))
        self.site(x, y)


class Sequences:
    """Token ids for the Trainer: the sequence's number, or one that is left out."""

    def __init__(self, data: shared.Data) -> None:
        self.data = data
        self.left_out = data.train.n_seqs

    def __len__(self) -> int:
        return self.data.n_steps * self.data.batch_seqs

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        counts = self.data.train.sequences(number, number + 1)[2][0]
        return {"input_ids": torch.where(counts, number, self.left_out)}


def train(data: shared.Data, lr: float | None, variant: str, scratch: Path) -> shared.Trained:
    optimizer, documented = DOCUMENTED[variant]
    chosen = lr or documented / (data.n_features / 2**14) ** 0.5
    config = sparsify.TrainConfig(
        sparsify.SaeConfig(
            expansion_factor=shared.EXPANSION, k=shared.TOP_K, transcode=data.kind == "transcoder"
        ),
        batch_size=data.batch_seqs,
        optimizer=optimizer,
        lr=chosen,
        lr_warmup_steps=round(shared.WARMUP * data.n_steps),
        hookpoints=["site"],
        exclude_tokens=[data.train.n_seqs],
        log_to_wandb=False,
        save_dir=str(scratch),
        run_name="run",
    )
    sequences: Any = Sequences(data)
    sparsify.Trainer(config, sequences, Exported(data)).fit()
    coder = sparsify.SparseCoder.load_from_disk(scratch / "run" / "site")

    def reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        acts, ids, pre_acts = coder.encode(x)
        fired = torch.zeros_like(pre_acts, dtype=torch.bool).scatter_(1, ids, acts > 0)
        return coder.decode(acts, ids), fired

    return shared.Trained(reconstruct, chosen, optimizer)


if __name__ == "__main__":
    shared.run("sparsify", ("eai-sparsify",), ("sae", "transcoder"), train)
