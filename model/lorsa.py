"""The Lorsa module: an attention layer as many rank-1 heads of which few fire per token.

    q = rope(qk_norm(x W_Q + b_Q))   k = rope(qk_norm(x W_K + b_K))   v = x W_V^T + b_V
    z_pre[t, i] = sum_{s <= t} softmax_s(scale * <q[t, h], k[s, h]>) v[s, i]
    z = z_pre where it is among the top_k of select(z_pre) * ||w_O||, else 0; or as
        model/activation.py says
    y_hat = z W_O + b_O

Source: He et al. 2025, arXiv:2504.20938, section 3.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import attention_pattern, lorsa_attention, sparse_decode, sparse_topk_attention
from .activation import above, jump, largest_of_sequences
from .attention import project
from .config import LorsaConfig, parameter_shapes
from .qk import norm_and_rotate

LEAST_THRESHOLD = 1e-12


class Projected(NamedTuple):
    """What attention is made of."""

    q: Tensor
    """Rotated queries, [batch, seq, n_qk_heads, d_qk_head]"""
    k: Tensor
    """Rotated keys, as q"""
    v: Tensor
    """Values, [batch, seq, n_ov_heads]"""


class Encoding(NamedTuple):
    """The heads that fire, in as many slots as may: top_k, or max_l0 where top_k is a mean."""

    acts: Tensor
    """z of the heads, [batch, seq, slots]; 0 where the slot's head does not fire"""
    ids: Tensor
    """Their ids, ascending, int32, [batch, seq, slots]"""


class Firing(NamedTuple):
    """The heads that fire in training, and what the rule is trained by."""

    acts: Tensor
    """As in Encoding"""
    ids: Tensor
    """As in Encoding"""
    edge: Tensor | None = None
    """Of batchtopk: the smallest score of a sequence that was to fire, [batch]"""
    fires: Tensor | None = None
    """Of jumprelu: 1 where a head fires, else 0, with a gradient; as acts"""


class Lorsa(nn.Module):
    """Low-rank sparse attention.

    Parameters (names as in He et al. 2025; our OV head i is their head h):

        W_Q, W_K: [n_qk_heads, d_model, d_qk_head]; b_Q, b_K: [n_qk_heads, d_qk_head]
        W_V, W_O: [n_ov_heads, d_model]; b_V: [n_ov_heads]; b_O: [d_model]
        q_norm, k_norm: [d_qk_head], or [n_qk_heads, d_qk_head] of a norm `by_head`; q_norm_bias,
            k_norm_bias: the same, of a "layer" norm; all with a qk-norm only
        log_threshold: [n_ov_heads], with "jumprelu" only: of a head's threshold over `threshold`

    Saved with them, but no parameter:

        threshold: of the scores, in units of y, []; with "batchtopk" and "jumprelu" only
    """

    W_Q: nn.Parameter
    W_K: nn.Parameter
    W_V: nn.Parameter
    W_O: nn.Parameter
    b_Q: nn.Parameter
    b_K: nn.Parameter
    b_V: nn.Parameter
    b_O: nn.Parameter
    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None
    q_norm_bias: nn.Parameter | None
    k_norm_bias: nn.Parameter | None
    log_threshold: nn.Parameter | None
    threshold: Tensor | None

    def __init__(self, config: LorsaConfig, *, backend: str = "auto") -> None:
        """Make a Lorsa of zeros (norm weights of ones); `model.init` or a checkpoint fills it.

        Args:
            config: its shape.
            backend: path of the sparse kernels: "auto", "torch", "triton" or "reference".
        """
        super().__init__()
        self.config = config
        self.backend = backend
        for name, shape in parameter_shapes(config).items():
            fill = torch.ones if name.endswith("_norm") else torch.zeros
            self.register_parameter(name, nn.Parameter(fill(shape)))
        for name in ("q_norm", "k_norm", "q_norm_bias", "k_norm_bias", "log_threshold"):
            if name not in self._parameters:
                self.register_parameter(name, None)
        self.register_buffer("threshold", None if config.activation == "topk" else torch.ones(()))

    def queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return rotated queries and keys.

        Args:
            x: [batch, seq, d_model].

        Returns:
            q, k: [batch, seq, n_qk_heads, d_qk_head].
        """
        c, norm = self.config, self.config.qk_norm
        q = project(x, self.W_Q, self.b_Q)
        q = norm_and_rotate(q, norm=norm, weight=self.q_norm, bias=self.q_norm_bias, rope=c.rope)
        k = project(x, self.W_K, self.b_K)
        return q, norm_and_rotate(
            k, norm=norm, weight=self.k_norm, bias=self.k_norm_bias, rope=c.rope
        )

    def values(self, x: Tensor) -> Tensor:
        """Return the scalar value of every OV head, [batch, seq, n_ov_heads]."""
        return F.linear(x, self.W_V, self.b_V)

    def project(self, x: Tensor) -> Projected:
        """Return queries, keys and values.

        Args:
            x: attention input after the norm, [batch, seq, d_model], of any floating dtype.

        Raises:
            ValueError: x has another shape.
        """
        x = self._as_input(x)
        return Projected(*self.queries_keys(x), self.values(x))

    def encode(self, x: Tensor | Projected, *, top_k: int | None = None) -> Encoding:
        """Return the heads that fire.

        Args:
            x: attention input after the norm, [batch, seq, d_model], of any floating dtype; or
                what `project` makes of it.
            top_k: heads per token, if not the config's (training may start with more); of
                batchtopk, by their mean over each sequence, as in training, and not by the
                threshold; of jumprelu without effect, as the thresholds decide.

        Raises:
            ValueError: x has another shape.
        """
        if self.config.activation == "batchtopk" and top_k is not None:
            firing = self.fire(x, top_k=top_k)
            return Encoding(firing.acts, firing.ids)
        acts, ids = self._candidates(x, top_k)
        if not self.config.has_threshold:
            scores = self._scores(acts, ids)  # the tokens given are one sequence
            kept, _ = largest_of_sequences(scores.flatten(0, 1)[None], self.config.top_k)
            acts = torch.where(kept.view_as(acts), acts, 0)
        elif self.threshold is not None:
            limit = self.threshold if self.config.activation == "batchtopk" else 1.0
            acts = torch.where(above(self._scores(acts, ids), limit), acts, 0)
        return Encoding(acts, ids)

    def fire(
        self,
        x: Tensor | Projected,
        *,
        top_k: int,
        counted: Tensor | None = None,
        bandwidth: float = 1.0,
    ) -> Firing:
        """Return the heads that fire in training.

        Args:
            x, top_k: as in `encode`.
            counted: of batchtopk, which tokens count, bool, [batch, seq]; None counts all.
            bandwidth: of jumprelu, see `activation.jump`.
        """
        acts, ids = self._candidates(x, top_k)
        if self.config.activation == "batchtopk":
            scores = self._scores(acts, ids)
            kept, edge = largest_of_sequences(scores, top_k, counted)
            return Firing(torch.where(kept, acts, 0), ids, edge=edge)
        if self.log_threshold is not None:
            per_threshold = self._score_factors()
            jumped = jump(acts, ids, self.log_threshold, per_threshold, bandwidth=bandwidth)
            return Firing(jumped.acts, ids, fires=jumped.fires)
        return Firing(acts, ids)

    def _score_factors(self) -> Tensor:
        """Return what makes a score of z: ||w_O||, of jumprelu over the threshold, [n_ov_heads]."""
        if self.config.score_by_norm:
            factors: Tensor = self.W_O.detach().norm(dim=1)
        else:
            factors = torch.ones_like(self.b_V)
        if self.log_threshold is not None and self.threshold is not None:
            factors = factors / (self.threshold * self.log_threshold.detach().exp())
        return factors

    def _scores(self, acts: Tensor, ids: Tensor) -> Tensor:
        """Return the scores of candidates, without a gradient, in fp32."""
        scores: Tensor = acts.detach().float() * self._score_factors()[ids.long()]
        return scores

    def _candidates(self, x: Tensor | Projected, top_k: int | None) -> Encoding:
        """Return the heads with the largest scores: top_k of a token, or the max_l0 that may fire.

        Raises:
            ValueError: x has another shape.
        """
        c = self.config
        acts, ids = sparse_topk_attention(
            *(x if isinstance(x, Projected) else self.project(x)),
            self._score_factors(),
            top_k=c.n_slots if top_k is None or c.max_l0 is not None else top_k,
            scale=c.scale,
            select=c.select,
            window=c.window,
            softcap=c.softcap,
            backend=self.backend,
        )
        return Encoding(acts, ids)

    def decode(self, acts: Tensor, ids: Tensor) -> Tensor:
        """Return y_hat, [batch, seq, d_model], of acts and ids [batch, seq, slots]."""
        kind, dtype = self.W_O.device.type, self.W_O.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        y_hat = sparse_decode(acts.to(dtype), ids, self.W_O.to(dtype), backend=self.backend)
        return y_hat + self.b_O

    def forward(self, x: Tensor) -> Tensor:
        """Return y_hat, the layer's approximate output, [batch, seq, d_model].

        Args:
            x: attention input after the norm, [batch, seq, d_model], of any floating dtype.
        """
        return self.decode(*self.encode(x))

    def z_pre(self, x: Tensor) -> Tensor:
        """Return z of all heads before the selection, [batch, seq, n_ov_heads]; for analysis."""
        c = self.config
        return lorsa_attention(*self.project(x), scale=c.scale, window=c.window, softcap=c.softcap)

    def pattern(
        self,
        x: Tensor,
        *,
        qk_heads: Sequence[int] | Tensor | None = None,
        ov_heads: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Return the attention patterns of heads; only those asked for take memory.

        Args:
            x: attention input after the norm, [batch, seq, d_model], of any floating dtype.
            qk_heads: ids of QK heads, 0..n_qk_heads - 1; None takes all of them.
            ov_heads: in their place, ids of OV heads, as `encode` gives them: the patterns are
                those of the QK heads that they attend by, in the order of the OV heads.

        Returns:
            [batch, heads, q_pos, k_pos]; rows sum to 1.

        Raises:
            ValueError: x has another shape, an id is out of range, or both are given.
        """
        if qk_heads is not None and ov_heads is not None:
            raise ValueError("qk_heads and ov_heads exclude each other; give one")
        c = self.config
        q, k = self.queries_keys(self._as_input(x))
        if ov_heads is not None:
            chosen = self._head_ids("ov_heads", ov_heads, c.n_ov_heads)
            qk_heads = chosen // (c.n_ov_heads // c.n_qk_heads)
        if qk_heads is not None:
            chosen = self._head_ids("qk_heads", qk_heads, c.n_qk_heads)
            q, k = q[:, :, chosen], k[:, :, chosen]  # [batch, seq, heads, d_qk_head]
        return attention_pattern(q, k, scale=c.scale, window=c.window, softcap=c.softcap)

    def contributions(self, x: Tensor, ids: Sequence[int] | Tensor) -> Tensor:
        """Return what every source token adds to the activations of heads, without a gradient.

        contributions[b, t, j, s] = pattern[b, h, t, s] v[b, s, i],  i = ids[b, t, j], h its QK head

        Args:
            x: attention input after the norm, [batch, seq, d_model], of any floating dtype.
            ids: OV heads of every token, [batch, seq, slots], as `encode` gives them; or [slots],
                the same heads at every token.

        Returns:
            [batch, seq, slots, k_pos]; over k_pos they sum to z before the selection, which is
            `acts` where the head fires.

        Raises:
            ValueError: x or ids has another shape, or an id is out of range.
        """
        from .sources import contributions

        heads = self._head_ids("ids", ids, self.config.n_ov_heads)
        return contributions(self, self._as_input(x), heads)

    def attach(self, model: Any, layer: int | None = None) -> AbstractContextManager[None]:
        """Put this Lorsa in place of an attention layer of a language model while a block lasts.

        with lorsa.attach(model):
            logits = model(input_ids=ids, use_cache=False).logits

        The model reads whole sequences without padding on their left, and generates with
        use_cache=False; a call that goes on from a cache is refused. Blocks within blocks replace
        several layers.

        Args:
            model: causal language model of transformers, on this Lorsa's device.
            layer: counted from 0; None is the config's.

        Raises:
            AttachError: the model has no such layer or another width, or is no model of
                transformers; the Lorsa reads something else (config.hook_in); in the model's call:
                it goes on from a cache, or lies on another device.
        """
        from .attach import attached

        return attached(self, model, layer)

    def _head_ids(self, name: str, ids: Sequence[int] | Tensor, n_heads: int) -> Tensor:
        """Return ids of heads as int64; ValueError if one is outside of 0..n_heads - 1."""
        chosen = torch.as_tensor(ids, dtype=torch.long, device=self.W_Q.device)
        outside = chosen[(chosen < 0) | (chosen >= n_heads)]
        if outside.numel():
            raise ValueError(f"{name} has {int(outside[0])}; allowed: 0..{n_heads - 1}")
        return chosen

    def _as_input(self, x: Tensor) -> Tensor:
        """Return x in the weights' dtype (stores hold bfloat16); ValueError if it is misshapen."""
        if x.ndim != 3 or x.shape[2] != self.config.d_model:
            raise ValueError(
                f"x is {list(x.shape)}; it must be [batch, seq, {self.config.d_model}]"
            )
        return x.to(self.W_V.dtype)

    def extra_repr(self) -> str:
        """Return the sizes for `print`."""
        c = self.config
        layer = "" if c.layer is None else f", layer={c.layer}"
        return (
            f"d_model={c.d_model}, n_ov_heads={c.n_ov_heads}, n_qk_heads={c.n_qk_heads}, "
            f"d_qk_head={c.d_qk_head}, top_k={c.top_k}, activation={c.activation}{layer}"
        )

    @torch.no_grad()
    def set_threshold(self, x: Tensor) -> None:
        """Set the threshold so that about top_k heads fire on a token of a sample.

        Args:
            x: attention input, [batch, seq, d_model]; the edges of its sequences are averaged.
        """
        if self.threshold is None:
            return
        edges = []
        for sequence in x.split(1):
            scores = self._scores(*self._candidates(sequence, None))
            edges.append(largest_of_sequences(scores, self.config.top_k).edge)
        level = torch.cat(edges).mean()
        if self.log_threshold is not None:
            level = self.threshold * level.clamp(min=LEAST_THRESHOLD)  # it divides the scores
        self.threshold.copy_(level)
        self.config = replace(self.config, has_threshold=True)

    @torch.no_grad()
    def move_threshold(self, edge: Tensor, share: float) -> None:
        """Move the threshold of batchtopk by a share of the way to an edge."""
        assert self.threshold is not None
        self.threshold.lerp_(edge.to(self.threshold), share)

    def as_topk(self) -> "Lorsa":
        """Return a Lorsa of the same parameters, shared, of which top_k heads fire per token."""
        config = replace(self.config, activation="topk", max_l0=None, has_threshold=True)
        with torch.device("meta"):
            other = Lorsa(config, backend=self.backend)
        for name in parameter_shapes(config):
            other.register_parameter(name, self._parameters[name])
        return other

    @torch.no_grad()
    def rescale_(self, x_scale: float, y_scale: float) -> Self:
        """Change units in place: y_hat(x_scale * x) becomes y_scale times what y_hat(x) was.

        Exact to the bit for powers of two, which is what training uses.
        """
        for weight in (self.W_Q, self.W_K, self.W_V):
            weight.div_(x_scale)
        for weight in (self.W_O, self.b_O):
            weight.mul_(y_scale)
        if self.threshold is not None and self.config.score_by_norm:  # z itself stays as it is
            self.threshold.mul_(y_scale)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and lorsa.safetensors; see `model.checkpoint`."""
        from .checkpoint import save

        save(self, folder)

    @classmethod
    def from_pretrained(
        cls,
        where: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        backend: str = "auto",
    ) -> "Lorsa":
        """Read a Lorsa that lorsa, Llamascopium or OpenMOSS/Lorsa wrote; see docs/exchange.md.

        Args:
            where: a folder; or, as a text and where there is no such folder, owner/name on the
                Hugging Face Hub.
            revision: branch, tag or commit of a repository on the Hub; None is its main branch.
            subfolder: of the folder or repository, as layer-12; None takes the Lorsa in it or in
                its only subfolder with one.
            token: of the Hub; None is the one that `hf auth login` or HF_TOKEN left, if any.
            backend: as of `Lorsa`.

        Raises:
            CheckpointError: no such checkpoint, a schema that this version cannot read, a setting
                of another tool that cannot be expressed, tensors that do not fit the config, Lorsas
                in several subfolders, or what keeps the Hub from giving it.
            ValueError: a revision of a folder, or a subfolder that is not inside.
        """
        from .checkpoint import load
        from .hub import local_folder

        folder = local_folder(where, revision=revision, subfolder=subfolder, token=token)
        return load(folder, backend=backend)
