"""What implementations without a sparse kernel do for a Lorsa: everything dense, by autograd.

The same parameters and result as `lorsa.model.Lorsa`, written with torch's own operators: a
rotation by a turned copy, scaled_dot_product_attention with the group's scalars as a wide value,
torch.topk, a mask, and a dense decode. Every [tokens, n_ov_heads] tensor on the way is kept for the
backward.
"""

import torch
import torch.nn.functional as F
from lorsa.model import Lorsa, Rope
from lorsa.model.attention import project
from torch import Tensor


def dense_forward(lorsa: Lorsa, x: Tensor) -> Tensor:
    """Return y_hat of a Lorsa with RoPE on all channels, [batch, seq, d_model], x alike."""
    c = lorsa.config
    batch, seq, _d_model = x.shape
    q, k, v = (t.transpose(1, 2) for t in dense_qkv(lorsa, x))  # [batch, n_qk_heads, seq, width]
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=c.scale)
    z = z.transpose(1, 2).reshape(batch, seq, c.n_ov_heads)
    z = z.relu() if c.select == "relu" else z
    score = z.abs() * lorsa.W_O.detach().norm(dim=1)
    kept = score.topk(c.top_k, dim=-1, sorted=False).indices
    mask = torch.zeros_like(z).scatter_(-1, kept, 1.0)
    return torch.einsum("bsn,nd->bsd", z * mask, lorsa.W_O) + lorsa.b_O


def dense_qkv(lorsa: Lorsa, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries and keys, and values by QK head: [batch, seq, n_qk_heads, width]."""
    c = lorsa.config
    assert c.rope is not None
    q = rotated(project(x, lorsa.W_Q, lorsa.b_Q), c.rope)
    k = rotated(project(x, lorsa.W_K, lorsa.b_K), c.rope)
    return q, k, lorsa.values(x).unflatten(-1, (c.n_qk_heads, -1))


def rotated(x: Tensor, rope: Rope) -> Tensor:
    """Return queries or keys turned by their positions, [batch, seq, heads, d_head]."""
    position = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
    angle = position[:, None] * torch.tensor(rope.inv_freq, device=x.device).repeat(2)
    cos, sin = (f(angle).to(x.dtype)[:, None] for f in (torch.cos, torch.sin))  # [seq, 1, d_head]
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin
