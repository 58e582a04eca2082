"""Pairs of nodes against the score that they make up, in every kind of attention."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from lorsa.circuits.tracing.qk_head import Head, Side
from lorsa.circuits.tracing.qk_pairs import CONSTANT, Asked, QKTrace, pair_up
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.errors import AnalyzeError
from lorsa.language.geometry import Rope
from tiny import FAMILIES, config_like, make_model, read_layer, some_tokens
from torch import Tensor

KINDS = [
    "llama-gqa", "llama-llama3-rope", "llama-yarn-rope", "llama-mqa-bias", "qwen2-window", "qwen3",
    "olmo", "olmo2", "stablelm-norm", "cohere", "gemma2", "gemma3", "gpt2", "neox-partial",
    "falcon-alibi", "mpt", "gpt-oss", "llama4", "deepseek-v3", "deepseek-v3-yarn", "phi-norm",
]  # fmt: skip
"""Rotations of every kind, grouped heads, norms, biases, limits, caps, windows, chunks, linear
biases, sinks, latents."""
KINDS = [kind for kind in KINDS if kind in FAMILIES]
LAYER = 1
N_PARTS = 5
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


class Written(NamedTuple):
    """Vectors that nodes write into a layer's input, read three tokens at a time."""

    node: Tensor
    position: Tensor
    vector: Tensor

    def __call__(self, maps: Tensor, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(maps), 3):
            of = maps[start : start + 3]
            at = self.position - first - start
            here = (at >= 0) & (at < len(of))
            yield self.node[here], torch.einsum("nd,ndw->nw", self.vector[here], of[at[here]])


def split(x: Tensor, seed: int = 3) -> Written:
    """Return nodes that add up to x [T, d_model]: some that are drawn, and what is left."""
    seq, d_model = x.shape
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(seq, N_PARTS - 1, d_model, generator=generator).to(x)
    parts = torch.cat([drawn, (x - drawn.sum(dim=1))[:, None]], dim=1)
    position = torch.arange(seq).repeat_interleave(N_PARTS)
    return Written(torch.arange(len(position)), position, parts.flatten(0, 1))


def trace(
    head: Head, written: Written, query: int, key: int | None = None, **settings: int
) -> QKTrace:
    return pair_up(head, Asked(LAYER, 0, query, key), written, **settings)


def random_lorsa(config: LorsaConfig, seed: int = 5) -> Lorsa:
    """Return a Lorsa of random weights."""
    lorsa, generator = Lorsa(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lorsa.named_parameters():
            parameter.normal_(std=0.3, generator=generator)
            if name in ("q_norm", "k_norm"):
                parameter.abs_().add_(0.5)
    return lorsa


def own_head(
    family: str, head: int, dtype: torch.dtype = torch.float64, *, eager: bool = False
) -> tuple[Head, Tensor]:
    """Return a head of a tiny model's layer, frozen at a prompt, and the layer's input."""
    reading, x, _ = read_layer(make_model(family, eager=eager), LAYER)
    x = x[0].to(dtype)
    return Head.of_layer(x, reading.weights.to(dtype), reading.geometry, head), x


def dense(head: Head, written: Written, found: QKTrace) -> Tensor:
    """Return all pairs in the order of the nodes, [n, m]."""

    def parts(side: Side, position: int) -> Tensor:
        mine = written.vector[written.position == position]
        return mine @ side.linear(position, position + 1)[0]

    keys = found.weight.nonzero()[:, 0].tolist()
    own = sum(found.weight[k] * head.keys.constant(k, k + 1) for k in keys)
    theirs = torch.cat([*(found.weight[k] * parts(head.keys, k) for k in keys), own])
    at = found.query
    return torch.cat([parts(head.queries, at), head.queries.constant(at, at + 1)]) @ theirs.T


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", KINDS)
def test_nodes_and_pairs_sum_to_the_centred_score(kind: str, dtype: torch.dtype) -> None:
    head, x = own_head(kind, 3, dtype)
    for query, key in ((20, None), (5, 4), (20, 17)):
        found = trace(head, split(x), query, key, keep=10)
        limit = TOLERANCE[dtype] * float(found.by_position().abs().sum())
        assert found.gap <= TOLERANCE[dtype]
        pairs = found.positive.value.sum() + found.negative.value.sum()
        whole = float(pairs) + found.rest_positive + found.rest_negative
        sums = [float(found.query_value.sum()), float(found.key_value.sum()), whole]
        for each in sums:
            assert abs(each + found.constant - found.centred) <= limit
        assert found.score == float(found.scores[found.key])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "falcon-alibi"])
def test_the_centred_score_is_that_of_the_models_own_pattern(kind: str) -> None:
    """Scores are logs of the pattern but for a constant, which centring takes off.

    Falcon's plain attention scales its linear biases in another way than the one that it uses.
    """
    model = make_model(kind, eager=True)
    with torch.no_grad():
        out = model(input_ids=some_tokens(), output_attentions=True, use_cache=False)
    pattern = out.attentions[LAYER][0, 3].double()
    head, x = own_head(kind, 3, eager=True)
    found = trace(head, split(x), 20)
    p = pattern[20]
    p = torch.cat([p, (1 - p.sum()).clamp(min=0)[None]]) if head.sink is not None else p
    expected = p[:-1].max().log() if head.sink is not None else p.max().log()
    expected = expected - torch.special.xlogy(p, p).sum()
    assert torch.allclose(found.pattern, pattern[20], atol=1e-5)
    assert found.centred == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("kind", ["llama-gqa", "qwen3", "gemma2", "gpt-oss", "falcon-alibi"])
def test_a_lorsas_head_in_the_same_way(kind: str) -> None:
    reading, x, _ = read_layer(make_model(kind), LAYER)
    x = x[0].double()
    config = config_like(reading.geometry, n_ov_heads=16, top_k=2, n_qk_heads=8)
    lorsa = random_lorsa(config).double()
    found = trace(Head.of_lorsa(x, lorsa, 5), split(x), 20)
    assert torch.allclose(found.pattern, lorsa.pattern(x[None], qk_heads=[5])[0, 0, 20])
    assert found.gap <= 1e-10
    assert found.key == int(found.pattern.argmax())


@pytest.mark.parametrize("kind", ["llama-gqa", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("keep", [1, 7, 10_000])
def test_the_largest_pairs_of_each_sign_are_kept(
    kind: str, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorsa.circuits.tracing.pairing.BLOCK_PAIRS", 13)  # blocks of two key nodes
    head, x = own_head(kind, 2)
    written = split(x)
    found = trace(head, written, 20, keep=keep)
    values = dense(head, written, found)
    q_node, k_node = found.query_node.tolist(), found.key_node.tolist()
    for sign, kept, rest in (
        (1, found.positive, found.rest_positive),
        (-1, found.negative, found.rest_negative),
    ):
        mine = (sign * values).clamp(min=0).flatten()
        best = mine.sort(descending=True).values[:keep]
        best = best[best > 0]
        assert torch.allclose(sign * kept.value, best)
        assert rest == pytest.approx(float(sign * (mine.sum() - best.sum())), abs=1e-9)
        for s, t, value in zip(*kept, strict=True):
            place = q_node.index(int(s)), k_node.index(int(t))
            assert float(values[place]) == pytest.approx(float(value))
    assert torch.allclose(found.query_value, values.sum(dim=1))
    assert torch.allclose(found.key_value, values.sum(dim=0))
    assert found.unpaired == 0.0


def test_nodes_that_are_too_many_to_be_paired_are_counted_together() -> None:
    head, x = own_head("llama-gqa", 2)
    whole, found = trace(head, split(x), 20), trace(head, split(x), 20, most=12)
    assert found.gap <= 1e-10
    assert torch.equal(found.key_value, whole.key_value)
    assert torch.equal(found.query_value, whole.query_value)
    assert found.unpaired != 0.0
    totals = [
        float(each.positive.value.sum() + each.negative.value.sum())
        + each.rest_positive + each.rest_negative + each.unpaired
        for each in (whole, found)
    ]  # fmt: skip
    assert totals[0] == pytest.approx(totals[1])


@pytest.mark.parametrize("kind", ["llama-gqa", "qwen3", "gemma2", "gpt-oss", "mpt", "olmo"])
def test_a_pair_is_the_slope_of_the_log_of_the_pattern(kind: str) -> None:
    head, x = own_head(kind, 1)
    found = trace(head, split(x), 20, keep=4)
    tiny = 1e-6
    pairs = [*zip(*found.positive, strict=True), *zip(*found.negative, strict=True)]
    for _query_node, key_node, value in pairs:
        if key_node == CONSTANT:  # it is read at every key
            continue
        k = int(key_node) // N_PARTS
        without = torch.zeros_like(found.weight)
        without[k] = tiny * float(value / found.weight[k])
        moved = head.pattern(20, without)[found.key].log() - found.pattern[found.key].log()
        assert float(moved / tiny) == pytest.approx(-float(value), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("kind", ["llama-gqa", "qwen3", "gpt-oss", "mpt", "olmo"])
def test_the_pattern_without_a_pair(kind: str) -> None:
    """Competitors gain what the key loses; a sink is one of them."""
    head, x = own_head(kind, 1)
    found = trace(head, split(x), 20, keep=4)
    pairs = [*zip(*found.positive, strict=True), *zip(*found.negative, strict=True)]
    for _query_node, key_node, value in pairs:
        if key_node == CONSTANT:
            continue
        k = int(key_node) // N_PARTS
        without = torch.zeros_like(found.weight)
        without[k] = float(value / found.weight[k])
        torch.testing.assert_close(
            found.pattern_without(float(value), k), head.pattern(20, without)
        )


def test_keys_that_are_not_seen_do_not_compete() -> None:
    head, x = own_head("mistral-window", 0)
    found = trace(head, split(x), 20)
    seen = list(range(14, 21))
    assert (found.key_node[:-1] // N_PARTS).unique().tolist() == seen
    assert found.by_position().nonzero()[:, 0].tolist() == seen
    by_position = torch.zeros_like(x[:, 0])
    by_position.index_add_(0, found.key_node[:-1] // N_PARTS, found.key_value[:-1])
    assert torch.allclose(by_position, found.by_position())  # the layer has no biases
    assert float(found.by_position().sum()) == pytest.approx(found.centred)
    best = found.pattern.argsort(descending=True)[:4].tolist()
    assert [found.key, *found.competitors(3).tolist()] == best


def test_a_token_that_sees_itself_alone_has_nothing_to_explain() -> None:
    head, x = own_head("llama-gqa", 0)
    found = trace(head, split(x), 0)
    assert (found.key, found.centred, found.gap) == (0, 0.0, 0.0)
    assert not found.key_value.any()
    assert found.positive.value.tolist() == []
    assert found.competitors().tolist() == []


@pytest.mark.parametrize("kind", ["gpt2", "deepseek-v3", "deepseek-v3-yarn", "qwen3"])
def test_the_bias_of_the_norm_in_front_is_a_constant(kind: str) -> None:
    reading, x, _ = read_layer(make_model(kind), LAYER)
    x, bias = x[0].double(), torch.randn(x.shape[-1]).double()
    weights = reading.weights.to(torch.float64)
    head = Head.of_layer(x, weights, reading.geometry, 1, bias)
    assert trace(head, split(x - bias), 9).gap <= 1e-10


def test_a_query_or_key_that_is_not_there_is_one_line() -> None:
    head, x = own_head("mistral-window", 0)
    written = split(x)
    with pytest.raises(AnalyzeError, match="query is 32; the prompt has positions 0-31"):
        trace(head, written, 32)
    for key in (13, 21, -1):
        said = f"key is {key}, which query 20 does not see; it sees 14-20"
        with pytest.raises(AnalyzeError, match=said):
            trace(head, written, 20, key)


A, B, C, A_AGAIN, BEFORE_B, INHIBITOR, ECHO, OTHER = range(8)
"""Nodes of the planted prompt A B C A."""


def planted() -> tuple[Lorsa, Written, Tensor]:
    """Return an induction head, the nodes of a prompt and its input.

    Queries read which token is here, keys which was before. At B stands a feature "after A", which
    makes the last token look at B, and one that takes a part of that off; at C one that looks as if
    C came after A too.
    """
    config = LorsaConfig(
        d_model=8, n_qk_heads=1, d_qk_head=4, n_ov_heads=1, top_k=1, scale=1.0,
        rope=Rope(inv_freq=(1e-6, 1e-6)),
    )  # fmt: skip
    lorsa = Lorsa(config)
    token, before = torch.eye(8)[:4], torch.eye(8)[4:]
    with torch.no_grad():
        lorsa.W_Q[0] = token.T @ torch.eye(4)
        lorsa.W_K[0] = before.T @ torch.eye(4)
    vectors = [
        (A, 0, token[0]), (B, 1, token[1]), (C, 2, token[2]), (A_AGAIN, 3, 2 * token[0]),
        (BEFORE_B, 1, 2 * before[0]), (INHIBITOR, 1, -0.5 * before[0]),
        (ECHO, 2, 0.75 * before[0]), (OTHER, 2, 2 * before[1]),
    ]  # fmt: skip
    node, position, vector = zip(*vectors, strict=True)
    written = Written(torch.tensor(node), torch.tensor(position), torch.stack(vector).double())
    x = torch.zeros(4, 8).double().index_add(0, written.position, written.vector)
    return lorsa.double(), written, x


def test_a_planted_induction_head_is_found() -> None:
    lorsa, written, x = planted()
    found = trace(Head.of_lorsa(x, lorsa, 0), written, 3)
    assert found.key == 1
    assert [int(each[0]) for each in found.positive[:2]] == [A_AGAIN, BEFORE_B]
    assert found.negative.key_node[:2].tolist() == [ECHO, INHIBITOR]
    assert found.negative.query_node[:2].tolist() == [A_AGAIN, A_AGAIN]
    assert int(found.key_node[found.key_value.argmax()]) == BEFORE_B
    assert int(found.query_node[found.query_value.argmax()]) == A_AGAIN
    assert found.competitors(1).tolist() == [2]
    largest = float(found.positive.value[0])
    others = [*found.positive.value[1:].tolist(), *found.negative.value[2:].tolist()]
    assert max(map(abs, [0.0, *others])) < 0.01 * largest


def test_a_clamped_pair_moves_the_pattern_as_predicted() -> None:
    """Without "after A" at B, and so without the pair, the Lorsa attends as was said."""
    lorsa, written, x = planted()
    head = Head.of_lorsa(x, lorsa, 0)
    found = trace(head, written, 3)
    for pairs in (found.positive, found.negative):
        node = int(pairs.key_node[0])
        position = int(written.position[written.node == node])
        without = torch.zeros(4).double()
        without[position] = pairs.value[0] / found.weight[position]
        clamped = x.clone()
        clamped[position] -= written.vector[written.node == node][0]
        live = lorsa.pattern(clamped[None])[0, 0, 3]
        assert torch.allclose(head.pattern(3, without), live)
        assert torch.allclose(found.pattern_without(float(pairs.value[0]), position), live)
        assert (live[1] < found.pattern[1]) == (float(pairs.value[0]) > 0)
