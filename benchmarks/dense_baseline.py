"""What implementations without a sparse kernel do: everything dense, by autograd.

The same parameters and result as ours, written with torch's own operators. For a Lorsa: a rotation
by a turned copy, scaled_dot_product_attention with the group's scalars as a wide value, torch.topk,
a mask, and a dense decode. For SAEs and transcoders: a linear layer, torch.topk, a scatter into
zeros, a dense decode. Every [tokens, n_features] tensor on the way is kept for the backward.

The tuned ones are dense as well, without what is easily avoided. Of a Lorsa: values cut as wide
as a key, for which torch has a flash kernel that keeps no pattern, and our rotation. Of SAEs and
transcoders: torch's embedding_bag as a sparse decode, and no product for the centre of an SAE.
"""

import torch
import torch.nn.functional as F
from lorsa.dictionaries.linear import LinearDictionary
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.dictionaries.sae import Sae
from lorsa.language.attention import project
from lorsa.language.geometry import Rope
from torch import Tensor


def dense_forward(lorsa: Lorsa, x: Tensor) -> Tensor:
    """Return y_hat of a Lorsa with RoPE on all channels, [batch, seq, d_model], x alike."""
    q, k, v = (t.transpose(1, 2) for t in dense_qkv(lorsa, x))  # [batch, n_qk_heads, seq, width]
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=lorsa.config.scale)
    return select_and_decode(lorsa, z)


def tuned_forward(lorsa: Lorsa, x: Tensor) -> Tensor:
    """Do as `dense_forward`, with torch's flash attention and without temporaries of RoPE."""
    n_qk_heads = lorsa.config.n_qk_heads
    q, k = (t.transpose(1, 2) for t in lorsa.queries_keys(x))
    v = lorsa.values(x).unflatten(-1, (n_qk_heads, -1)).transpose(1, 2)
    return select_and_decode(lorsa, sliced_attention(q, k, v, lorsa.config.scale))


def sliced_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend causally with values [..., group] in slices as wide as a key, the last one padded."""
    width, group = q.shape[-1], v.shape[-1]
    slices = F.pad(v, (0, -group % width)).split(width, dim=-1)
    parts = [
        F.scaled_dot_product_attention(q, k, part, is_causal=True, scale=scale) for part in slices
    ]
    return torch.cat(parts, dim=-1)[..., :group]


def select_and_decode(lorsa: Lorsa, z: Tensor) -> Tensor:
    """Keep the top_k of z [batch, n_qk_heads, seq, group] and decode them densely."""
    c = lorsa.config
    z = z.transpose(1, 2).flatten(2)  # [batch, seq, n_ov_heads]
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


def dense_linear_forward(dictionary: LinearDictionary, x: Tensor) -> Tensor:
    """Return y_hat of an SAE, or a transcoder without a skip connection, [batch, seq, d_model]."""
    acts, ids = dense_encode(dictionary, x)
    sparse = acts.new_zeros(*acts.shape[:2], len(dictionary.W_O)).scatter(-1, ids, acts)
    return F.linear(sparse, dictionary.W_O.T, dictionary.b_O)


def tuned_linear_forward(dictionary: LinearDictionary, x: Tensor) -> Tensor:
    """Do as `dense_linear_forward`, with torch's sparse decode and without a product for b_O."""
    acts, ids = tuned_encode(dictionary, x)
    W_O, weights = dictionary.W_O.to(acts.dtype), acts.flatten(0, 1)
    y_hat = F.embedding_bag(ids.flatten(0, 1), W_O, per_sample_weights=weights, mode="sum")
    return y_hat.view_as(x) + dictionary.b_O


def dense_encode(dictionary: LinearDictionary, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features that fire and which they are, [batch, seq, top_k] each."""
    read = x - dictionary.b_O if isinstance(dictionary, Sae) else x
    return best_of(F.linear(read, dictionary.W_E, dictionary.b_E), dictionary)


def tuned_encode(dictionary: LinearDictionary, x: Tensor) -> tuple[Tensor, Tensor]:
    """Do as `dense_encode`; the gradient of an SAE's b_O is a sum over features."""
    read, bias = dictionary.centred(x)
    return best_of(F.linear(read, dictionary.W_E, bias), dictionary)


def best_of(z: Tensor, dictionary: LinearDictionary) -> tuple[Tensor, Tensor]:
    """Keep the top_k of z [batch, seq, n_features] by their output's norm."""
    z = z.relu()
    score = z.detach() * dictionary.W_O.detach().norm(dim=1)
    ids = score.topk(dictionary.config.top_k, dim=-1, sorted=False).indices
    return z.gather(-1, ids), ids
