"""Prompts frozen in tiny models: the same logits as the model's, and what is refused."""

from typing import Any

import pytest
import torch
from lorsa.circuits.tracing.reference import Replay
from lorsa.circuits.tracing.sources import find_nodes
from tiny import make_model
from traces import CASES, frozen_in

MIXED = {0: "lorsa skip", 2: "transcoder"}


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens[None], use_cache=False).logits[0]
    return found


@pytest.mark.parametrize("family", [*CASES, "cohere", "phi", "opt", "falcon-new", "llama4"])
def test_logits_are_those_of_the_model(family: str) -> None:
    """Parallel blocks, norms behind a module, caps and factors of logits, biases."""
    frozen = frozen_in(family, CASES.get(family, {0: "skip", 1: "lorsa"}))
    nodes = find_nodes(frozen)
    read = Replay(frozen, nodes, torch.ones(len(nodes))).read
    made = frozen.logits.capped(frozen.logits.before_cap(read))
    torch.testing.assert_close(made, _logits(make_model(family), frozen.tokens), rtol=0, atol=1e-4)
