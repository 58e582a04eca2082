"""What a training run is asked for."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..dictionaries.choices import ACTIVATIONS
from ..kernels.choices import BACKENDS, SELECTIONS
from ..language.choices import DEVICES
from ..store.places import Place, place
from .mask_rule import parse_rule

INITS = ("layer", "layer-weighted", "random")
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of one run: one Lorsa for one layer of a store."""

    store: Place
    """Activation store to train on."""
    layer: int
    """Layer of the language model, counted from 0."""
    out: Path
    """Run folder."""
    expansion: float = 8.0
    """OV heads per dimension of the model, where n_ov_heads is not given."""
    n_ov_heads: int | None = None
    """OV heads; None takes expansion * d_model, rounded up to a multiple of n_qk_heads."""
    n_qk_heads: int | None = None
    """QK heads; None takes 4 for every head of the layer, so that its copies can part ways."""
    top_k: int = 64
    """Heads that fire per token."""
    select: str = "relu"
    """Whether heads may fire negatively: "relu" or "abs"; the latter with "topk" only."""
    activation: str = "topk"
    """Rule by which heads fire: the top_k of every token, or top_k on average: those above a
    threshold ("batchtopk") or above one of their own that is learned ("jumprelu")."""
    max_l0: int | None = None
    """Heads that fire per token at most, where top_k is the average; None takes 4 * top_k."""
    jump_bandwidth: float = 1.0
    """Of "jumprelu": width, as a share of the threshold, of the scores around it that move it."""
    l0_coefficient: float = 3.0
    """Of "jumprelu": weight of (L0 / top_k - 1)^2 of a sequence beside the squared error. Less
    lets more heads fire than top_k, more makes all sequences alike; docs/recipe.md."""
    init: str = "layer"
    """Start from the layer's own weights, "layer-weighted" with more copies of heads that write
    more, or "random"."""
    train_tokens: int | None = None
    """Tokens to train on; None is one pass over the training shards."""
    minutes: float | None = None
    """Minutes that a run may take, beside train_tokens; the schedule is laid out for them."""
    batch_tokens: int | None = None
    """Tokens in a step, over all processes, in whole sequences; None takes four sequences, but at
    least 1,024 tokens: more and smaller steps are worth their time, see docs/recipe.md."""
    micro_batch_tokens: int | None = None
    """Tokens that a process computes at once, in whole sequences, to need less memory; gradients
    add up to those of the step. None computes its share of a step at once."""
    shard: bool = False
    """Share weights, gradients and moments among the processes, for Lorsas that do not fit; see
    docs/distributed.md."""
    exact: bool = False
    """Add up gradients sequence by sequence in float64, so that any number of processes makes the
    same run to rounding that does not grow; slower."""
    lr: float = 1e-3
    """Learning rate of Adam, for activations scaled to a norm of sqrt(d_model)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's running mean and variance."""
    warmup_frac: float = 0.05
    """Share of the run in which the learning rate rises from 0."""
    decay_frac: float = 0.6
    """Share of the run, at its end, in which it falls to 0."""
    top_k_start: float = 1.0
    """Heads that fire at first, as a multiple of top_k; 1 keeps top_k constant."""
    top_k_anneal_frac: float = 0.5
    """Share of the run in which they fall to top_k."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    init_tokens: int = 65_536
    """Training tokens whose head outputs are clustered for the start; see docs/recipe.md."""
    loss_mask: str = "none"
    """Tokens that do not count in loss and metrics, such as "special,first,norm>10x": see
    train/mask.py. They stay in their sequences, where others attend to them."""
    tracker: str = "none"
    """Who is told what metrics.jsonl is: "tensorboard", "wandb", "trackio" or "none"."""
    eval_tokens: int = 16_384
    """Held-out tokens of a look in mid-run; the last look takes all."""
    eval_every_tokens: int | None = None
    """Tokens between looks; None looks four times."""
    checkpoint_every_minutes: float = 10.0
    """Minutes between checkpoints."""
    checkpoint_every_tokens: int | None = None
    """Tokens between checkpoints, besides those by the clock."""
    keep_checkpoints: int = 2
    """The newest that are kept."""
    dead_window_tokens: int | None = None
    """A head is dead if it did not fire on so many last tokens; None takes the last quarter of the
    run, at most 10 million."""
    seed: int = 0
    """Of the initialisation and, without data_seed, of the order of sequences."""
    data_seed: int | None = None
    """Of the order of sequences; runs that share it share what is read. None takes seed."""
    precision: str = "auto"
    """Of the arithmetic: "auto" is bfloat16 on a GPU and float32 on a CPU."""
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""
    backend: str = "auto"
    """Path of the sparse kernels."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "store", place(self.store))
        object.__setattr__(self, "out", Path(self.out))
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in (
            "n_ov_heads",
            "n_qk_heads",
            "max_l0",
            "train_tokens",
            "top_k",
            "layer",
            "seed",
            "data_seed",
        ):
            least = 0 if name in ("layer", "seed", "data_seed") else 1
            if (value := getattr(self, name)) is not None and not least <= value < 1 << 63:
                raise ValueError(f"{name} is {value}; allowed: {least} or more")
        for name in ("init_tokens", "eval_tokens", "keep_checkpoints"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 or more")
        for name in (
            "eval_every_tokens",
            "checkpoint_every_tokens",
            "dead_window_tokens",
            "batch_tokens",
            "micro_batch_tokens",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 or more")
        for name in ("lr", "expansion", "grad_clip", "checkpoint_every_minutes", "l0_coefficient"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} is {value}; allowed: above 0")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes is {self.minutes}; allowed: above 0")
        for name in ("warmup_frac", "decay_frac", "top_k_anneal_frac"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} is {value}; allowed: 0..1")
        if not 0 < self.jump_bandwidth < 2:
            raise ValueError(
                f"jump_bandwidth is {self.jump_bandwidth}; allowed: above 0 and below 2"
            )
        if not 1 <= self.top_k_start < math.inf:
            raise ValueError(f"top_k_start is {self.top_k_start}; allowed: 1 or more")
        if len(self.betas) != 2 or not all(
            isinstance(beta, int | float) and 0 <= beta < 1 for beta in self.betas
        ):
            raise ValueError(f"betas are {self.betas}; allowed: two numbers from 0 to below 1")
        for name, allowed in (
            ("select", SELECTIONS),
            ("activation", ACTIVATIONS),
            ("init", INITS),
            ("precision", PRECISIONS),
            ("device", DEVICES),
            ("backend", BACKENDS),
            ("tracker", TRACKERS),
        ):
            if (choice := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is {choice!r}; allowed: {', '.join(allowed)}")

        if self.exact and (self.shard or self.micro_batch_tokens is not None):
            other = "shard" if self.shard else "micro_batch_tokens"
            raise ValueError(
                f"exact computes sequence by sequence on whole copies; leave out {other}"
            )
        parse_rule(self.loss_mask)

    @property
    def order_seed(self) -> int:
        """Of the order of sequences."""
        return self.seed if self.data_seed is None else self.data_seed

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-able data."""
        data = asdict(self)
        return data | {"store": str(self.store), "out": str(self.out), "betas": list(self.betas)}

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the resulting weights."""
        free = {"store", "out", "eval_tokens", "eval_every_tokens", "device", "backend", "tracker"}
        free |= {"checkpoint_every_minutes", "checkpoint_every_tokens", "dead_window_tokens"}
        free |= {"keep_checkpoints", "micro_batch_tokens", "shard"}
        if self.activation != "jumprelu":
            free |= {"jump_bandwidth", "l0_coefficient"}
        return {name: value for name, value in self.to_dict().items() if name not in free}
