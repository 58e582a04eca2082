"""QK tracing of frozen runs: every head of every kind of layer, from real nodes."""

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from lorsa.circuits.tracing.frozen import Frozen, Module
from lorsa.circuits.tracing.nodes import EVERYWHERE, Nodes
from lorsa.circuits.tracing.paths import OwnAttention
from lorsa.circuits.tracing.qk import head_of, qk_pairs
from lorsa.circuits.tracing.qk_pairs import CONSTANT, QKTrace
from lorsa.circuits.tracing.reference import Replay
from lorsa.circuits.tracing.sources import find_nodes
from lorsa.errors import AnalyzeError
from torch import Tensor
from traces import CASES, frozen_in

QUERY = 7


class Reads(Replay):
    """The frozen model run forward, which keeps what modules read."""

    def __init__(self, *args: Any) -> None:
        self.x: dict[int, Tensor] = {}
        super().__init__(*args)

    def _added(self, module: Module, stream: Tensor) -> Tensor:
        self.x[module.depth] = module.reads.output(stream)
        return super()._added(module, stream)


class Case(NamedTuple):
    frozen: Frozen
    nodes: Nodes


@cache
def _case(family: str, dtype: torch.dtype) -> Case:
    """Return a prompt frozen in a model; in float64 with what layers read made anew, exactly."""
    frozen = frozen_in(family, CASES[family]).to(dtype)
    nodes = find_nodes(frozen)
    if dtype == torch.float32:
        return Case(frozen, nodes)
    shares = torch.ones(len(nodes), dtype=dtype)
    x = Reads(frozen, nodes, shares).x
    return Case(
        replace(frozen, modules=tuple(_reading(m, x[m.depth]) for m in frozen.modules)), nodes
    )


def _reading(module: Module, x: Tensor) -> Module:
    """Return an attention that reads x, float64, which it has in float32."""
    if isinstance(module.path, OwnAttention):
        torch.testing.assert_close(module.path.x, x, rtol=1e-4, atol=1e-4)
        return replace(module, path=replace(module.path, x=x))
    if module.depth % 2:
        torch.testing.assert_close(module.x, x, rtol=1e-4, atol=1e-4)
        return replace(module, x=x)
    return module


def pairs_of(found: QKTrace) -> dict[tuple[int, int], float]:
    """Return the values of all pairs, by node at the query and node at the keys."""
    made = {}
    for pairs in (found.positive, found.negative):
        for s, t, value in zip(*pairs, strict=True):
            made[int(s), int(t)] = float(value)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("family", CASES)
def test_pairs_of_nodes_sum_to_the_centred_score(family: str, dtype: torch.dtype) -> None:
    """In every layer: of Lorsas, of the model's own attention, and of that below an SAE."""
    limit = 1e-5 if dtype == torch.float32 else 1e-10
    case = _case(family, dtype)
    for layer in range(3):
        for key in (None, 6):
            found = qk_pairs(*case, layer, 1, QUERY, key, keep=10**6)
            assert found.gap <= limit
            assert (found.rest_positive, found.rest_negative) == pytest.approx((0, 0), abs=limit)
            size = float(found.by_position().abs().sum())
            whole = sum(pairs_of(found).values()) + found.constant
            assert abs(whole - found.centred) <= limit * size
            assert (found.layer, found.head, found.query) == (layer, 1, QUERY)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "olmo"])
def test_each_node_is_read_once_and_before_the_layer(family: str) -> None:
    case = _case(family, torch.float32)
    for layer in range(3):
        found = qk_pairs(*case, layer, 0, QUERY)
        for side in (found.query_node, found.key_node):
            assert len(side.unique()) == len(side)
            assert int(side[-1]) == CONSTANT
            assert (case.nodes.depth[side[:-1]] < 1 + 2 * layer).all()
            assert (case.nodes.position[side[:-1]] <= QUERY).all()
    if family == "llama-gqa":  # all is replaced, so that nothing moves between tokens
        at = case.nodes.position[found.query_node[:-1]].tolist()
        assert set(at) == {QUERY, EVERYWHERE}


def test_what_the_models_own_attention_carries_is_a_part_of_keys() -> None:
    """Below layer 2 nothing is replaced but an MLP: embeddings of token 0 come to later tokens."""
    case = _case("olmo", torch.float64)
    found = qk_pairs(*case, 2, 0, QUERY)
    moved = case.nodes.position[found.query_node[:-1]] < QUERY
    assert found.query_value[:-1][moved].any()


@pytest.mark.parametrize("family", CASES)
def test_values_of_nodes_are_those_of_autograd(family: str) -> None:
    """A node's value is the derivative of <q, sum of weighted keys> by its share of one side."""
    case = _case(family, torch.float64)
    shares = torch.ones(len(case.nodes), dtype=torch.float64, requires_grad=True)
    read = Reads(*case, shares).x
    for layer in range(3):
        found, head = qk_pairs(*case, layer, 1, QUERY), head_of(case.frozen, layer, 1)
        x, d_head = read[1 + 2 * layer], head.keys.W.shape[1]
        q = x[QUERY] @ head.queries.linear(QUERY, QUERY + 1)[0]
        k = torch.einsum("td,tdw->tw", x[: QUERY + 1], head.keys.linear(0, QUERY + 1))
        weight = found.weight[: QUERY + 1]
        one = q @ (weight @ head.k[: QUERY + 1, :d_head])
        other = weight @ k @ head.q[QUERY, :d_head]
        for total, node, value in (
            (one, found.query_node, found.query_value),
            (other, found.key_node, found.key_value),
        ):
            (exact,) = torch.autograd.grad(total, shares, retain_graph=True)
            made = torch.zeros_like(exact).index_put((node[:-1],), value[:-1])
            torch.testing.assert_close(made, exact, rtol=1e-10, atol=1e-10)


def test_what_is_not_there_is_one_line() -> None:
    case = _case("llama-gqa", torch.float32)
    for ask, said in (
        ((3, 0, 5), "layer is 3; the model has layers 0-2"),
        ((1, 4, 5), "QK head is 4; the Lorsa of layer 1 has QK heads 0-3"),
        ((1, 0, 9), "query is 9; the prompt has positions 0-8"),
        ((1, 0, 5, 6), "key is 6, which query 5 does not see; it sees 0-5"),
    ):
        with pytest.raises(AnalyzeError, match=said):
            qk_pairs(*case, *ask)
    with pytest.raises(AnalyzeError, match="QK head is 4; layer 1 has QK heads 0-3"):
        qk_pairs(*_case("olmo", torch.float32), 1, 4, 5)
