"""The definition, against the equations written out with loops."""

import math

import pytest
import torch
from lorsa.kernels import reference
from lorsa.kernels.reference import Score, attention_pattern, lorsa_attention


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_lorsa_attention_is_the_equation(window: int | None, softcap: float | None) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 5, 2, 4), torch.randn(1, 5, 2, 4), torch.randn(1, 5, 6)
    z = lorsa_attention(q, k, v, Score(0.5, softcap, window))
    for t in range(5):
        for i in range(6):
            head = i // 3
            seen = [s for s in range(t + 1) if window is None or t - s < window]
            scores = [0.5 * float(q[0, t, head] @ k[0, s, head]) for s in seen]
            if softcap is not None:
                scores = [softcap * math.tanh(score / softcap) for score in scores]
            total = sum(math.exp(score) for score in scores)
            expected = sum(
                math.exp(score) / total * float(v[0, s, i])
                for score, s in zip(scores, seen, strict=True)
            )
            assert float(z[0, t, i]) == pytest.approx(expected, abs=1e-6)


def test_pattern_rows_sum_to_one_and_look_back_only() -> None:
    pattern = attention_pattern(torch.randn(2, 9, 3, 4), torch.randn(2, 9, 3, 4), Score(0.5))
    assert pattern.shape == (2, 3, 9, 9)
    assert torch.allclose(pattern.sum(-1), torch.ones(2, 3, 9))
    assert not pattern.triu(1).any()


def test_sparse_decode_is_the_dense_product() -> None:
    z = torch.randn(2, 5, 9)
    acts, ids = reference.select_top_k(z, torch.ones(9), top_k=4, select="abs")
    W_O = torch.randn(9, 7)
    dense = torch.zeros_like(z).scatter(-1, ids.long(), acts) @ W_O
    assert torch.allclose(reference.sparse_decode(acts, ids, W_O), dense, atol=1e-6)
