"""The base of every kind of dictionary: features of which few fire, and which of them do.

A kind says which features may fire (`candidates`), what they write (`decode`, `norms`) and how its
units change (`rescale_`). All else is here and the same for all: which of the candidates do fire,
in training and after it, files, and a dictionary's place in a language model.
"""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .activation import above, batch_top_k, jump
from .attach import attached
from .checkpoint import load, save
from .checkpoint_files import Saved
from .code import Code, Directions, Firing, Input
from .config import DictionaryConfig
from .fetch import local_folder

LEAST_THRESHOLD = 1e-12
"""Threshold of jumprelu at least, in units of the scores: it divides them."""


class Dictionary(nn.Module, ABC):
    """A module that encodes activations as a few features that fire, and decodes these.

    Parameters of every kind, beside its own:

        W_O: directions that features write, [n_features, d_model]; b_O: [d_model]
        log_threshold: log of a feature's threshold over `threshold`, [n_features]; "jumprelu" only

    Saved with them, but no parameter:

        threshold: threshold of the scores, in units of y, []; "batchtopk" and "jumprelu" only
    """

    kind: ClassVar[str]
    """Kind of dictionary, as files and options have it"""
    bounds_errors: ClassVar[bool] = True
    """Whether training bounds what the error of a token much longer than others counts"""
    Config: ClassVar[type[DictionaryConfig]]
    """Class of its config"""
    config: DictionaryConfig
    """Shape, rule of firing and origin"""
    W_O: nn.Parameter
    b_O: nn.Parameter
    log_threshold: nn.Parameter | None
    threshold: Tensor | None

    def __init__(self, config: DictionaryConfig, *, backend: str = "auto") -> None:
        """Make a dictionary of zeros; its kind's `start` or a checkpoint fills it.

        Args:
            config: its shape.
            backend: path of the sparse kernels: "auto", "torch", "triton" or "reference".
        """
        super().__init__()
        self.config = config
        self.backend = backend
        for name, shape in config.parameter_shapes().items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        if config.activation != "jumprelu":
            self.register_parameter("log_threshold", None)
        self.register_buffer("threshold", None if config.activation == "topk" else torch.ones(()))

    @abstractmethod
    def candidates(self, x: Input, top_k: int | None) -> Code:
        """Return the features with the largest scores.

        Args:
            x: activations that it reads, [batch, seq, d_model], or what its kind made of them.
            top_k: features per token, if not the config's; without effect where top_k is a mean,
                for then the max_l0 that may fire are returned.

        Raises:
            ValueError: x has another shape.
        """

    @abstractmethod
    def decode(self, acts: Tensor, ids: Tensor, x: Tensor | None = None) -> Tensor:
        """Return y_hat, [batch, seq, d_model].

        Args:
            acts, ids: features that fire, [batch, seq, slots].
            x: activations that it reads, [batch, seq, d_model]; needed by kinds whose output
                depends on more than the features, as a transcoder's with a skip connection.

        Raises:
            ValueError: x is needed and missing.
        """

    @abstractmethod
    def rescale_(self, x_scale: float, y_scale: float) -> Self:
        """Change units in place: y_hat(x_scale * x) becomes y_scale times what y_hat(x) was.

        Exact to the bit for powers of two, which is what training uses.
        """

    @abstractmethod
    def directions(self, ids: Tensor) -> Directions:
        """Return what features read and write.

        Args:
            ids: of the features, integer, [n].
        """

    def norms(self) -> Tensor:
        """Return how much a unit of each feature's activation writes, [n_features]; no gradient."""
        norms: Tensor = self.W_O.detach().norm(dim=1)
        return norms

    def encode(self, x: Input, *, top_k: int | None = None) -> Code:
        """Return the features that fire.

        Args:
            x: activations that it reads, [batch, seq, d_model], of any floating dtype; or what its
                kind made of them. A Lorsa reads the attention input after the norm.
            top_k: features per token, if not the config's (training may start with more). With
                batchtopk it is their mean over each sequence, as in training, and the threshold
                does not count. With jumprelu it has no effect: the thresholds decide.

        Raises:
            ValueError: x has another shape.
        """
        if self.config.activation == "batchtopk" and top_k is not None:
            firing = self.fire(x, top_k=top_k)
            return Code(firing.acts, firing.ids)
        acts, ids = self.candidates(x, top_k)
        if not self.config.has_threshold:
            scores = self._scores(acts, ids)  # the tokens given are one sequence
            fires, _ = batch_top_k(scores.flatten(0, 1)[None], self.config.top_k)
            acts = torch.where(fires.view_as(acts), acts, 0)
        elif self.threshold is not None:
            limit = self.threshold if self.config.activation == "batchtopk" else 1.0
            acts = torch.where(above(self._scores(acts, ids), limit), acts, 0)
        return Code(acts, ids)

    def fire(
        self,
        x: Input,
        *,
        top_k: int,
        counted: Tensor | None = None,
        bandwidth: float = 1.0,
    ) -> Firing:
        """Return the features that fire in training.

        Args:
            x, top_k: see `encode`.
            counted: which tokens count with batchtopk, bool, [batch, seq]; None counts all.
            bandwidth: width of jumprelu's rectangle; see `activation.jump`.

        Raises:
            ValueError: x has another shape.
        """
        acts, ids = self.candidates(x, top_k)
        if self.config.activation == "batchtopk":
            scores = self._scores(acts, ids)
            fires, edge = batch_top_k(scores, top_k, counted)
            return Firing(torch.where(fires, acts, 0), ids, edge=edge)
        if self.log_threshold is not None:
            factors = self.score_factors()
            jumped = jump(acts, ids, self.log_threshold, factors, bandwidth=bandwidth)
            return Firing(jumped.acts, ids, fires=jumped.fires)
        return Firing(acts, ids)

    def score_factors(self) -> Tensor:
        """Return the factor that makes a score of each feature's activation, [n_features].

        It is ||w_O||, or 1 without `score_by_norm`; with jumprelu, divided by the threshold.
        """
        factors = self.norms()
        if not self.config.score_by_norm:
            factors = torch.ones_like(factors)
        if self.log_threshold is not None and self.threshold is not None:
            factors = factors / (self.threshold * self.log_threshold.detach().exp())
        return factors

    def _scores(self, acts: Tensor, ids: Tensor) -> Tensor:
        """Return the scores of candidates, without a gradient, in fp32."""
        scores: Tensor = acts.detach().float() * self.score_factors()[ids.long()]
        return scores

    def forward(self, x: Tensor) -> Tensor:
        """Return y_hat, the approximate output, [batch, seq, d_model].

        Args:
            x: activations that it reads, [batch, seq, d_model], of any floating dtype.

        Raises:
            ValueError: x has another shape.
        """
        return self.decode(*self.encode(x), x)

    @torch.no_grad()
    def set_threshold(self, x: Tensor) -> None:
        """Set the threshold so that about top_k features fire on a token of a sample.

        Args:
            x: activations that it reads, [batch, seq, d_model]; the edges of the sequences are
                averaged.
        """
        if self.threshold is None:
            return
        edges = []
        for sequence in x.split(1):
            scores = self._scores(*self.candidates(sequence, None))
            edges.append(batch_top_k(scores, self.config.top_k).edge)
        level = torch.cat(edges).mean()
        if self.log_threshold is not None:
            level = self.threshold * level.clamp(min=LEAST_THRESHOLD)
        self.threshold.copy_(level)
        self.config = replace(self.config, has_threshold=True)

    @torch.no_grad()
    def move_threshold(self, edge: Tensor, share: float) -> None:
        """Move the threshold of batchtopk by a share of the way to an edge, []."""
        assert self.threshold is not None
        self.threshold.lerp_(edge.to(self.threshold), share)

    def n_candidates(self, top_k: int | None) -> int:
        """Return how many candidates of a token there are: top_k, or max_l0 where that is set."""
        if top_k is None or self.config.max_l0 is not None:
            return self.config.n_slots
        return top_k

    def as_input(self, x: Tensor) -> Tensor:
        """Return x in the weights' dtype; stores hold bfloat16.

        Raises:
            ValueError: x is not [batch, seq, d_model].
        """
        if x.ndim != 3 or x.shape[2] != self.config.d_model:
            raise ValueError(
                f"x is {list(x.shape)}; it must be [batch, seq, {self.config.d_model}]"
            )
        return x.to(self.W_O.dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype in which the kernels compute: the weights', or autocast's within its region."""
        kind = self.W_O.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.W_O.dtype

    def as_topk(self) -> Self:
        """Return one of the same parameters, shared, of which top_k features fire per token."""
        config = replace(self.config, activation="topk", max_l0=None, has_threshold=True)
        with torch.device("meta"):
            other = type(self)(config, backend=self.backend)
        for name in config.parameter_shapes():
            other.register_parameter(name, self._parameters[name])
        return other

    def attach(self, model: Any, layer: int | None = None) -> AbstractContextManager[None]:
        """Put this dictionary in its place in a language model while a block lasts.

        with lorsa_3.attach(model), transcoder_12.attach(model):
            logits = model(input_ids=ids, use_cache=False).logits

        Args:
            model: causal language model of transformers, on this dictionary's device. With a Lorsa
                it reads whole sequences without padding on their left, and generates with
                use_cache=False; a call that goes on from a cache is refused.
            layer: counted from 0; None is the config's.

        Raises:
            AttachError: the model has no such layer or site, or another width, or is no model of
                transformers; the dictionary reads something else (config.hook_in); in the model's
                call: a Lorsa's goes on from a cache, or the model lies on another device.
        """
        return attached(self, self.config, model, layer)

    def extra_repr(self) -> str:
        """Return the sizes for `print`."""
        c = self.config
        layer = "" if c.layer is None else f", layer={c.layer}"
        return (
            f"d_model={c.d_model}, n_features={c.n_features}, top_k={c.top_k}, "
            f"activation={c.activation}{layer}"
        )

    def saved(self) -> Saved:
        """Return this dictionary as plain data; its tensors are shared."""
        return Saved(self.kind, self.config, self.state_dict())

    @classmethod
    def of(cls, saved: Saved, *, backend: str = "auto") -> Self:
        """Return the dictionary that plain data describes, in eval mode."""
        dictionary = cls(saved.config, backend=backend)
        dictionary.load_state_dict(saved.tensors)
        return dictionary.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and lorsa.safetensors; see `dictionaries.checkpoint`."""
        save(self.saved(), folder)

    @classmethod
    def from_pretrained(
        cls,
        where: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        backend: str = "auto",
    ) -> Self:
        """Read one that this package wrote, or another tool; see docs/exchange.md.

        `lorsa.load` does the same for a dictionary of any kind.

        Args:
            where: a folder; or, as a text and where there is no such folder, owner/name on the
                Hugging Face Hub.
            revision: branch, tag or commit of a repository on the Hub; None is its main branch.
            subfolder: folder inside, as layer-12; None takes the dictionary in `where` itself, or
                in its only subfolder with one.
            token: access token of the Hub; None is the one that `hf auth login` or HF_TOKEN left.
            backend: see the class.

        Raises:
            CheckpointError: no such checkpoint, one of another kind, a schema that this version
                cannot read, a setting of another tool that cannot be expressed, tensors that do not
                fit the config, dictionaries in several subfolders, or what keeps the Hub from
                giving it.
            ValueError: a revision of a folder, or a subfolder that is not inside.
        """
        folder = local_folder(where, revision=revision, subfolder=subfolder, token=token)
        saved = load(folder)
        if saved.kind != cls.kind:
            raise CheckpointError(
                f"{folder} holds {saved.config.title}, and {cls.Config.title} was asked for; "
                "lorsa.load reads any kind"
            )
        return cls.of(saved, backend=backend)
