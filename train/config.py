"""Settings of a training run."""

import math
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..checks import require_at_least, require_one_of, require_positive
from ..dictionaries.choices import ACTIVATIONS, ports_of
from ..kernels.choices import BACKENDS, SELECTIONS
from ..language.choices import DEVICES
from ..sites import SITE_NAMES, Ports, parse_site_names
from ..store.places import Place, place
from .mask_rule import parse_rule
from .recipe import DEFAULTS, INITS, KINDS, OWN, kinds_with

BY_KIND: Any = None
"""Default of a setting whose value depends on the kind: recipe.DEFAULTS fills it in."""
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of one run: one dictionary for one layer of a store."""

    store: Place
    """Activation store: its folder, or s3://bucket/folder."""
    layer: int
    """Layer of the language model, counted from 0."""
    out: Path
    """Run folder."""
    kind: str = "lorsa"
    """Kind of dictionary: lorsa (attention), sae (any site), transcoder (the MLP), or all. "all" is
    for commands: every kind whose sites the store has."""
    site: str | None = None
    """Site that an SAE reads and writes, such as attn_out. None takes resid_out."""
    expansion: float = 8.0
    """Features per dimension of the model, where n_features or n_ov_heads is not given."""
    n_features: int | None = None
    """Features of an SAE or a transcoder. None takes expansion * d_model."""
    n_ov_heads: int | None = None
    """OV heads of a Lorsa. None takes expansion * d_model, rounded up to a multiple of
    n_qk_heads."""
    n_qk_heads: int | None = None
    """QK heads of a Lorsa. None takes 4 for every head of the layer. So its copies can part
    ways."""
    skip: bool = False
    """Give a transcoder a linear map from its input to its output, besides its features."""
    prefixes: tuple[float, ...] | None = None
    """Shares of the features, joined by commas and ending at 1, each to explain the output alone
    (Matryoshka). None takes all features at once."""
    top_k: int = 64
    """Features that fire per token."""
    select: str = "relu"
    """Features that may fire: positive ones (relu), or negative ones too (abs). "abs" goes with
    "topk" only."""
    activation: str = "topk"
    """Rule by which features fire: topk, batchtopk or jumprelu. "topk" fires the top_k of every
    token, the others top_k on average: features above a threshold ("batchtopk") or above one of
    their own that is learned ("jumprelu")."""
    max_l0: int | None = None
    """Features that fire per token at most, where top_k is the average. None takes 4 * top_k."""
    jump_bandwidth: float = 1.0
    """Width of the scores around a jumprelu threshold that move it, as a share of the threshold."""
    l0_coefficient: float = 3.0
    """Weight of (L0 / top_k - 1)^2 of a sequence beside the squared error, of jumprelu. Less lets
    more features fire than top_k, more makes all sequences alike; see docs/recipe.md."""
    init: str = BY_KIND
    """Weights to start from: layer (the layer's own), layer-weighted, random, or data. None takes
    layer, or data of other kinds than Lorsas, which have no other. "layer-weighted" has more copies
    of heads that write more."""
    train_tokens: int | None = None
    """Tokens to train on. None takes one pass over the training shards."""
    minutes: float | None = None
    """Minutes that a run may take, beside train_tokens. The schedule is planned for them."""
    batch_tokens: int | None = None
    """Tokens in a step, over all processes, in whole sequences. None takes 4 sequences, but at
    least 1,024 tokens. More and smaller steps are worth their time, see docs/recipe.md."""
    micro_batch_tokens: int | None = None
    """Tokens that a process computes at once, in whole sequences, to need less memory. Gradients
    add up to those of the step. None takes its share of a step."""
    shard: bool = False
    """Share weights, gradients and moments among the processes, for those that do not fit. See
    docs/distributed.md."""
    exact: bool = False
    """Make the same run on any number of processes, to rounding that does not grow; slower.
    Gradients add up sequence by sequence in float64."""
    lr: float = BY_KIND
    """Learning rate of Adam, for activations scaled to a norm of sqrt(d_model). None takes
    0.001, or 0.002 of other kinds than Lorsas."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's running mean and variance."""
    warmup_frac: float = 0.05
    """Share of the run in which the learning rate rises from 0."""
    decay_frac: float = BY_KIND
    """Share of the run, at its end, in which the learning rate falls to 0. None takes 0.6."""
    top_k_start: float = 1.0
    """Features that fire at first, as a multiple of top_k. 1 keeps top_k constant."""
    top_k_anneal_frac: float = 0.5
    """Share of the run in which the features that fire fall to top_k."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    init_tokens: int = 65_536
    """Training tokens of which the start is made. See docs/recipe.md."""
    loss_mask: str = BY_KIND
    """Tokens that do not count in loss and metrics: none, or bos, special, first, norm>10x, joined
    by commas. None takes none, or norm>10x for an SAE. They stay in their sequences, where others
    attend to them; see train/mask_rule.py."""
    tracker: str = "none"
    """Tracker that gets the numbers of metrics.jsonl too: tensorboard, wandb, trackio or none."""
    eval_tokens: int = 16_384
    """Held-out tokens of an eval in mid-run. The last eval takes all."""
    eval_every_tokens: int | None = None
    """Tokens between evals. None takes a quarter of the run."""
    checkpoint_every_minutes: float = 10.0
    """Minutes between checkpoints."""
    checkpoint_every_tokens: int | None = None
    """Tokens between checkpoints, besides those by the clock."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    dead_window_tokens: int | None = None
    """Last tokens, on none of which a dead feature fired. None takes the last quarter of the run,
    at most 10 million."""
    seed: int = 0
    """Seed of the initialisation and, without data_seed, of the order of sequences."""
    data_seed: int | None = None
    """Seed of the order of sequences. Runs that share it share what is read. None takes seed."""
    precision: str = "auto"
    """Precision of the arithmetic: auto, float32 or bfloat16. "auto" is bfloat16 on a GPU and
    float32 on a CPU."""
    device: str = "auto"
    """Device to train on: auto, cpu or cuda."""
    backend: str = "auto"
    """Path of the sparse kernels: auto, torch, triton or reference."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "store", place(self.store))
        object.__setattr__(self, "out", Path(self.out))
        object.__setattr__(self, "betas", tuple(self.betas))
        self._fill_in()
        require_at_least(self, 0, "layer", "seed", "data_seed")
        require_at_least(self, 1, "n_features", "n_ov_heads", "n_qk_heads", "max_l0", "top_k")
        require_at_least(self, 1, "train_tokens")
        require_at_least(self, 1, "init_tokens", "eval_tokens", "eval_every_tokens")
        require_at_least(self, 1, "keep_checkpoints", "checkpoint_every_tokens")
        require_at_least(self, 1, "dead_window_tokens", "batch_tokens", "micro_batch_tokens")
        require_positive(self, "lr", "expansion", "grad_clip", "l0_coefficient", "minutes")
        require_positive(self, "checkpoint_every_minutes")
        self._require_shares()
        require_one_of(
            self,
            select=SELECTIONS,
            activation=ACTIVATIONS,
            init=INITS[self.kind],
            precision=PRECISIONS,
            device=DEVICES,
            backend=BACKENDS,
            tracker=TRACKERS,
        )
        if self.exact and (self.shard or self.micro_batch_tokens is not None):
            other = "shard" if self.shard else "micro_batch_tokens"
            raise ValueError(
                f"exact computes sequence by sequence on whole copies; leave out {other}"
            )
        parse_rule(self.loss_mask)

    def _fill_in(self) -> None:
        """Give settings the kind's defaults; ValueError if one is of another kind."""
        require_one_of(self, kind=KINDS)
        for field in fields(self):
            value, kinds = getattr(self, field.name), kinds_with(field.name)
            if self.kind not in kinds and value != field.default:
                raise ValueError(
                    f"{field.name} is a setting of kind {' and '.join(kinds)}, and this is of kind "
                    f"{self.kind}: leave it out"
                )
            if value is None and field.name in DEFAULTS[self.kind]:
                object.__setattr__(self, field.name, DEFAULTS[self.kind][field.name])
        if self.site is not None and parse_site_names(self.site) != (self.site,):
            raise ValueError(f"site is {self.site!r}; one of {', '.join(SITE_NAMES)} is meant")
        if self.prefixes is not None:
            object.__setattr__(self, "prefixes", _ascending(self.prefixes))

    def _require_shares(self) -> None:
        """Raise ValueError unless fractions, multiples and decays are in their ranges."""
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

    @property
    def order_seed(self) -> int:
        """Seed of the order of sequences."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def ports(self) -> Ports:
        """Sites that the dictionary reads and writes."""
        return ports_of(self.kind, self.layer, self.site)

    @property
    def label(self) -> str:
        """What is trained, in a word or two: layer 12 of a Lorsa, else 12.mlp or 12.resid_out."""
        if self.kind == "lorsa":
            return f"layer {self.layer}"
        return f"{self.layer}.{self.site or 'mlp'}"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-able data."""
        data = asdict(self)
        lists = {"betas": list(self.betas), "prefixes": self.prefixes and list(self.prefixes)}
        return data | {"store": str(self.store), "out": str(self.out)} | lists

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide the resulting weights."""
        free = {"store", "out", "eval_tokens", "eval_every_tokens", "device", "backend", "tracker"}
        free |= {"checkpoint_every_minutes", "checkpoint_every_tokens", "dead_window_tokens"}
        free |= {"keep_checkpoints", "micro_batch_tokens", "shard"}
        if self.activation != "jumprelu":
            free |= {"jump_bandwidth", "l0_coefficient"}
        free |= {name for name in OWN if self.kind not in OWN[name]}
        return {name: value for name, value in self.to_dict().items() if name not in free}


def _ascending(shares: Any) -> tuple[float, ...]:
    """Return shares of the features; ValueError unless they ascend, from above 0 to 1."""
    given = tuple(shares)
    numbers = all(isinstance(each, int | float) for each in given)
    if not (numbers and all(a < b for a, b in pairwise((0, *given))) and given[-1:] == (1,)):
        raise ValueError(
            f"prefixes are {', '.join(map(str, given)) or 'none'}; allowed: shares of the features "
            "that ascend and end at 1, such as 0.06,0.25,1"
        )
    return tuple(map(float, given))
