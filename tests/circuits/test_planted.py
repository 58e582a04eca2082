"""A planted circuit is found: its edges with their signs, and nothing else above 1 %."""

import torch
from lorsa.circuits.tracing.edges import edges
from lorsa.circuits.tracing.freeze import freeze
from lorsa.circuits.tracing.nodes import KINDS, Nodes
from lorsa.circuits.tracing.sources import find_nodes
from planted import INHIBITED, PROMPT, A, B, planted_dictionaries, planted_model

LAST, SOURCE = 4, 2
"""Positions: where B is predicted, and where it is read."""
PREVIOUS, INDUCTION, SURE = 1, 3, 4
"""Depths of what writes."""


def _name(nodes: Nodes, node: int) -> tuple[str, int, int, int]:
    """Return kind, depth, position and feature of a node."""
    rest = (int(getattr(nodes, name)[node]) for name in ("depth", "position", "feature"))
    return (KINDS[nodes.kind[node]], *rest)


def test_a_planted_circuit_is_found() -> None:
    model = planted_model()
    frozen = freeze(model, planted_dictionaries(), PROMPT)
    nodes = find_nodes(frozen)
    assert int(model(input_ids=PROMPT[None]).logits[0, -1].argmax()) == B
    of_name = {_name(nodes, node): node for node in range(len(nodes))}
    logit = of_name["logit", frozen.end, LAST, B]
    sure = of_name["feature", SURE, LAST, B]
    induction = of_name["feature", INDUCTION, LAST, B]
    previous = of_name["feature", PREVIOUS, SOURCE, A]
    tokens = {at: of_name["embed", 0, at, int(id_)] for at, id_ in enumerate(PROMPT)}
    planted = {
        logit: {sure: 1, induction: 1},
        sure: {induction: 1},
        induction: {tokens[SOURCE]: 1, previous: -1},
        previous: {tokens[SOURCE - 1]: 1},
    }
    rows = edges(frozen, nodes, torch.tensor(list(planted)))
    for i, (target, expected) in enumerate(planted.items()):
        mine = slice(int(rows.start[i]), int(rows.start[i + 1]))
        weights, sources = rows.weight[mine], rows.source[mine]
        large = weights.abs() > 0.01 * weights.abs().sum()
        signs = zip(sources[large].tolist(), weights[large].sign().tolist(), strict=True)
        assert dict(signs) == expected, _name(nodes, target)
    found = dict(zip(rows.source.tolist(), rows.weight.tolist(), strict=True))
    ratio = float(nodes.value[previous]) * INHIBITED
    torch.testing.assert_close(-found[previous] / found[tokens[SOURCE]], ratio, rtol=1e-4, atol=0)


def test_a_planted_circuit_has_no_errors() -> None:
    frozen = freeze(planted_model(), planted_dictionaries(), PROMPT)
    for module in frozen.modules:
        assert module.error is not None
        assert float(module.error.abs().max()) < 1e-5
