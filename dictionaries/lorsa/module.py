"""The Lorsa module: an attention layer as many rank-1 heads of which few fire per token.

    q = x W_Q + b_Q,  k = x W_K + b_K    normed, limited and rotated as the layer does
    v = x W_V^T + b_V
    z_pre[t, i] = sum_{s <= t} softmax_s(scale * <q[t, h], k[s, h]>) v[s, i]
    z = z_pre where it is among the top_k of select(z_pre) * ||w_O||, else 0; or as
        dictionaries/activation.py says
    y_hat = z W_O + b_O

Source: He et al. 2025, arXiv:2504.20938, section 3.
"""

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.dispatch import sparse_decode, sparse_topk_attention
from ...kernels.reference import attention_pattern, lorsa_attention
from ...language.attention import opened, project
from ...language.qk import as_scored
from ..code import Code, Directions, Input
from ..dictionary import Dictionary
from .config import LorsaConfig
from .contributions import BLOCK_ELEMENTS, Projected, blocks
from .units import rescale_

OPTIONAL = ("q_norm", "k_norm", "q_norm_bias", "k_norm_bias", "sinks", "W_G", "b_G")
"""Parameters that only some Lorsas have; None in others."""


class Lorsa(Dictionary):
    """Low-rank sparse attention.

    Parameters (names as in He et al. 2025; our OV head i is their head h):

        W_Q, W_K: [n_qk_heads, d_model, d_qk_head]; b_Q, b_K: [n_qk_heads, d_qk_head]
        W_V, W_O: [n_ov_heads, d_model]; b_V: [n_ov_heads]; b_O: [d_model]
        q_norm, k_norm: [d_qk_head], or [n_qk_heads, d_qk_head] of a norm `by_head`; q_norm_bias,
            k_norm_bias: the same, of a "layer" norm; all with a qk-norm only
        sinks: [n_qk_heads]; with sinks only
        W_G: [n_ov_heads, d_model]; b_G: [n_ov_heads]; with a gate only
        log_threshold: [n_ov_heads], log of a head's threshold over `threshold`; "jumprelu" only

    Saved with them, but no parameter:

        threshold: threshold of the scores, in units of y, []; "batchtopk" and "jumprelu" only
    """

    kind: ClassVar[str] = "lorsa"
    bounds_errors: ClassVar[bool] = False
    Config = LorsaConfig
    config: LorsaConfig
    W_Q: nn.Parameter
    W_K: nn.Parameter
    W_V: nn.Parameter
    b_Q: nn.Parameter
    b_K: nn.Parameter
    b_V: nn.Parameter
    b_O: nn.Parameter
    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None
    q_norm_bias: nn.Parameter | None
    k_norm_bias: nn.Parameter | None
    sinks: nn.Parameter | None
    W_G: nn.Parameter | None
    b_G: nn.Parameter | None

    def __init__(self, config: LorsaConfig, *, backend: str = "auto") -> None:
        """Make a Lorsa of zeros (norm weights of ones); `start` or a checkpoint fills it.

        Args:
            config: its shape.
            backend: path of the sparse kernels: "auto", "torch", "triton" or "reference".
        """
        super().__init__(config, backend=backend)
        for name in OPTIONAL:
            if name not in self._parameters:
                self.register_parameter(name, None)
            elif name.endswith("_norm"):
                nn.init.ones_(getattr(self, name))

    def queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return rotated queries and keys.

        Args:
            x: [batch, seq, d_model].

        Returns:
            q, k: [batch, seq, n_qk_heads, d_qk_head].
        """
        q, k = project(x, self.W_Q, self.b_Q), project(x, self.W_K, self.b_K)
        return as_scored(q, k, self.config, self)

    def values(self, x: Tensor) -> Tensor:
        """Return the scalar value of every OV head, [batch, seq, n_ov_heads]."""
        return F.linear(x, self.W_V, self.b_V)

    def project(self, x: Tensor) -> Projected:
        """Return rotated queries, keys and values, which `encode` and `fire` take in x's place.

        Args:
            x: attention input after the norm, [batch, seq, d_model], of any floating dtype.

        Raises:
            ValueError: x has another shape.
        """
        x = self.as_input(x)
        return Projected(*self.queries_keys(x), self.values(x), self.sinks, self.gate(x))

    def gate(self, x: Tensor) -> Tensor | None:
        """Return the factors of z, [batch, seq, n_ov_heads]; None where there is no gate."""
        if self.W_G is None or self.config.gate is None:
            return None
        return opened(F.linear(x, self.W_G, self.b_G), self.config.gate)

    def candidates(self, x: Input, top_k: int | None) -> Code:
        """Return the heads with the largest scores; see `Dictionary.candidates`."""
        c = self.config
        q, k, v, sinks, gate = self.project(x) if isinstance(x, Tensor) else Projected._make(x)
        acts, ids = sparse_topk_attention(
            q,
            k,
            v,
            self.score_factors(),
            top_k=self.n_candidates(top_k),
            scale=c.scale,
            select=c.select,
            window=c.window,
            chunk=c.chunk,
            softcap=c.softcap,
            sinks=sinks,
            gate=gate,
            backend=self.backend,
        )
        return Code(acts, ids)

    def decode(self, acts: Tensor, ids: Tensor, x: Tensor | None = None) -> Tensor:
        """Return y_hat, [batch, seq, d_model], of acts and ids, of any x; see `Dictionary`."""
        dtype = self.compute_dtype
        y_hat = sparse_decode(acts.to(dtype), ids, self.W_O.to(dtype), backend=self.backend)
        return y_hat + self.b_O

    def z_pre(self, x: Tensor) -> Tensor:
        """Return z of all heads before the selection, [batch, seq, n_ov_heads]; for analysis."""
        q, k, v, sinks, gate = self.project(x)
        return lorsa_attention(q, k, v, self.config, sinks, gate)

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
            [batch, heads, q_pos, k_pos]; rows sum to 1, or less with sinks.

        Raises:
            ValueError: x has another shape, an id is out of range, or both are given.
        """
        if qk_heads is not None and ov_heads is not None:
            raise ValueError("qk_heads and ov_heads exclude each other; give one")
        c = self.config
        q, k = self.queries_keys(self.as_input(x))
        sinks: Tensor | None = self.sinks
        if ov_heads is not None:
            chosen = self._head_ids("ov_heads", ov_heads, c.n_ov_heads)
            qk_heads = chosen // (c.n_ov_heads // c.n_qk_heads)
        if qk_heads is not None:
            chosen = self._head_ids("qk_heads", qk_heads, c.n_qk_heads)
            q, k = q[:, :, chosen], k[:, :, chosen]  # [batch, seq, heads, d_qk_head]
            sinks = None if sinks is None else sinks[chosen]
        return attention_pattern(q, k, c, sinks=sinks)

    def contributions(self, x: Tensor, ids: Sequence[int] | Tensor) -> Tensor:
        """Return the contribution of every source token to heads' activations; no gradient.

        contributions[b, t, j, s] = pattern[b, h, t, s] v[b, s, i],  i = ids[b, t, j], h its QK head
            times the gate[b, t, i], where there is one

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
        heads = self._head_ids("ids", ids, self.config.n_ov_heads)
        projected = self.project(x)
        batch, seq, _d_model = x.shape
        if heads.ndim == 0 or heads.shape[:-1] not in ((), (batch, seq)):
            raise ValueError(
                f"ids is {list(heads.shape)}; it must be [{batch}, {seq}, slots] or [slots]"
            )
        found = blocks(self.config, projected, heads.expand(batch, seq, -1))
        return torch.cat([F.pad(b.parts, (0, seq - b.rows.stop)) for b in found], dim=1)

    def _head_ids(self, name: str, ids: Sequence[int] | Tensor, n_heads: int) -> Tensor:
        """Return ids of heads as int64; ValueError if one is outside of 0..n_heads - 1."""
        chosen = torch.as_tensor(ids, dtype=torch.long, device=self.W_Q.device)
        outside = chosen[(chosen < 0) | (chosen >= n_heads)]
        if outside.numel():
            raise ValueError(f"{name} has {int(outside[0])}; allowed: 0..{n_heads - 1}")
        return chosen

    def extra_repr(self) -> str:
        """Return the sizes for `print`."""
        c = self.config
        layer = "" if c.layer is None else f", layer={c.layer}"
        return (
            f"d_model={c.d_model}, n_ov_heads={c.n_ov_heads}, n_qk_heads={c.n_qk_heads}, "
            f"d_qk_head={c.d_qk_head}, top_k={c.top_k}, activation={c.activation}{layer}"
        )

    def rescale_(self, x_scale: float, y_scale: float) -> Self:
        """Change units in place: y_hat(x_scale * x) becomes y_scale times what y_hat(x) was.

        Exact to the bit for powers of two, which is what training uses.
        """
        rescale_(self.state_dict(), self.config, x_scale, y_scale)
        return self

    def directions(self, ids: Tensor) -> Directions:
        """Return what heads read of the tokens that they attend to, and what they write."""
        return Directions(self.W_V[ids], self.W_O[ids])


@torch.no_grad()
def contributions_at(
    lorsa: Lorsa, x: Tensor, which: Tensor, positions: Tensor, heads: Tensor
) -> Tensor:
    """Return the contributions to single activations.

    Args:
        lorsa: on x's device.
        x: the layer's input, [batch, seq, d_model].
        which, positions, heads: sequence in the batch, position and OV head, int64, [n].

    Returns:
        P[t, s] v[s], times the gate where there is one, [n, seq].
    """
    c = lorsa.config
    q, k = lorsa.queries_keys(x)
    qk = heads // (c.n_ov_heads // c.n_qk_heads)
    parts = torch.empty(len(heads), x.shape[1], device=x.device)
    for b in which.unique().tolist():
        of_sequence = (which == b).nonzero().squeeze(1)
        for mine in of_sequence.split(max(1, BLOCK_ELEMENTS // (x.shape[1] * c.d_qk_head))):
            at = positions[mine]
            query, keys = q[b, at, qk[mine]], k[b].transpose(0, 1)[qk[mine]]
            sinks = None if lorsa.sinks is None else lorsa.sinks[qk[mine], None]
            pattern = attention_pattern(
                query[:, None, None], keys[:, :, None], c, at[:, None], sinks
            )
            values = F.linear(x[b], lorsa.W_V[heads[mine]], lorsa.b_V[heads[mine]])
            parts[mine] = pattern[:, 0, 0] * values.T  # [n, seq]
            if lorsa.W_G is not None and lorsa.b_G is not None and c.gate is not None:
                logits = (x[b, at] * lorsa.W_G[heads[mine]]).sum(dim=1) + lorsa.b_G[heads[mine]]
                parts[mine] *= opened(logits, c.gate)[:, None]
    return parts
