"""Prompts frozen in tiny models: the same logits as the model's, and what is refused."""

from collections import Counter
from typing import Any

import pytest
import torch
from lorsa.circuits.tracing.edges import edges
from lorsa.circuits.tracing.freeze import freeze
from lorsa.circuits.tracing.goals import difference, likeliest, logit, vector
from lorsa.circuits.tracing.nodes import BIAS, EMBED, ERROR, FEATURE, LOGIT
from lorsa.circuits.tracing.reference import Replay
from lorsa.circuits.tracing.sources import find_nodes
from lorsa.errors import AnalyzeError, AttachError, LanguageModelError
from lorsa.sites import Ports, Site
from tiny import make_model
from traces import CASES, N_TOKENS, TOP_K, frozen_in, make_dictionary, placed

OTHERS = ("cohere", "phi", "opt", "falcon-new", "llama4", "olmo2", "mpt", "stablelm")
MIXED = {0: "lorsa skip", 2: "transcoder"}
PROMPT = torch.arange(N_TOKENS)


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens[None], use_cache=False).logits[0]
    return found


@pytest.mark.parametrize("family", [*CASES, *OTHERS])
def test_logits_are_those_of_the_model(family: str) -> None:
    """Parallel blocks, norms behind a module, caps and factors of logits, biases."""
    frozen = frozen_in(family, CASES.get(family, {0: "skip", 1: "lorsa"}))
    nodes = find_nodes(frozen)
    read = Replay(frozen, nodes, torch.ones(len(nodes))).read
    made = frozen.logits.capped(frozen.logits.before_cap(read))
    torch.testing.assert_close(made, _logits(make_model(family), frozen.tokens), rtol=0, atol=1e-4)


def test_nodes_are_sorted_and_all_that_write() -> None:
    frozen = frozen_in("gpt2", MIXED)
    nodes = find_nodes(frozen)
    key = torch.stack([nodes.depth, nodes.position, nodes.kind, nodes.feature], dim=1)
    assert key.tolist() == sorted(key.tolist())
    n = Counter(nodes.kind.tolist())
    assert n[EMBED] == N_TOKENS
    assert n[ERROR] == (3 + 1) * N_TOKENS  # three MLPs and a Lorsa
    assert n[BIAS] == 3 + 2  # three dictionaries, and the attention that is the model's own
    assert 0 < n[FEATURE] <= 3 * N_TOKENS * TOP_K
    assert n[LOGIT] == len(frozen.goals)
    assert (nodes.value != 0).all()
    assert (nodes.position[nodes.kind == BIAS] == -1).all()
    assert nodes.depth.unique().tolist() == list(range(8))
    assert set(nodes.run[nodes.kind == FEATURE].tolist()) == {0, 1, 2}
    assert nodes.feature[nodes.kind == EMBED].tolist() == frozen.tokens.tolist()


def test_a_bias_is_no_node_where_a_model_has_none() -> None:
    nodes = find_nodes(frozen_in("llama-gqa", MIXED))
    assert set(nodes.depth[nodes.kind == BIAS].tolist()) == {1, 2, 6}  # the dictionaries'


def test_nothing_replaced_is_traced_too() -> None:
    """Logits come from embeddings and the errors of MLPs through the model's own attention."""
    frozen = frozen_in("llama-gqa", {})
    nodes = find_nodes(frozen)
    assert set(nodes.kind.tolist()) == {EMBED, ERROR, LOGIT}
    rows = edges(frozen, nodes, (nodes.kind == LOGIT).nonzero()[:, 0])
    assert rows.deviation < 1e-5


def test_goals_are_the_likeliest_tokens() -> None:
    frozen, model = frozen_in("cohere", MIXED), make_model("cohere")
    logits = _logits(model, frozen.tokens)[-1]
    found = likeliest(frozen, n=3, mass=1.0)
    assert [goal.token for goal in found] == logits.topk(3).indices.tolist()
    for goal in found:
        expected = float(logits[goal.token] - logits.mean())
        assert goal.value == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert goal.probability == pytest.approx(float(logits.softmax(0)[goal.token]), rel=1e-4)
    p = logits.softmax(0).sort(descending=True).values
    assert len(likeliest(frozen, n=400, mass=float(p[:5].sum()) - 1e-6)) == 5


def test_any_direction_of_the_end_is_a_goal() -> None:
    """The difference of two logits, a logit before the last token, and a vector."""
    frozen = frozen_in("granite", MIXED)
    logits = _logits(make_model("granite"), frozen.tokens)
    read = torch.arange(32.0) / 32
    goals = [
        difference(frozen, 5, 7),
        logit(frozen, 9, position=2),
        vector(frozen, read, position=1),
    ]
    frozen = frozen.aimed(*goals)
    assert [goal.position for goal in frozen.goals] == [1, 2, N_TOKENS - 1]
    nodes = find_nodes(frozen)
    rows = edges(frozen, nodes, (nodes.kind == LOGIT).nonzero()[:, 0])
    expected = [
        frozen.read[1] @ read,
        logits[2, 9] - logits[2].mean(),
        logits[-1, 5] - logits[-1, 7],
    ]
    torch.testing.assert_close(rows.total, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert rows.deviation < 1e-5
    with pytest.raises(AnalyzeError, match="token 400 is outside the vocabulary; it has 0-399"):
        logit(frozen, 400)


def test_other_nodes_are_no_targets() -> None:
    frozen = frozen_in("llama-gqa", MIXED)
    with pytest.raises(AnalyzeError, match="a node of kind embed is no target"):
        edges(frozen, find_nodes(frozen), torch.tensor([0]))


def test_no_targets_have_no_rows() -> None:
    frozen = frozen_in("llama-gqa", MIXED)
    rows = edges(frozen, find_nodes(frozen), torch.tensor([], dtype=torch.long))
    assert rows.start.tolist() == [0]
    assert rows.deviation == 0


def test_a_dictionary_of_the_residual_stream_is_refused() -> None:
    model = make_model("llama-gqa")
    with pytest.raises(AnalyzeError, match=r"an SAE of 1\.resid_out has no place in a trace; give"):
        freeze(model, placed(model, {1: "resid_out"}), PROMPT)


def test_two_dictionaries_of_one_site_are_refused() -> None:
    model = make_model("llama-gqa")
    with pytest.raises(AnalyzeError, match=r"two dictionaries write 1\.attn_out; give one of them"):
        freeze(model, placed(model, {1: "lorsa attn_out"}), PROMPT)


def test_a_dictionary_of_another_width_is_refused() -> None:
    model = make_model("llama-gqa")
    other = make_dictionary("transcoder", 1, make_model("llama-gqa"), d_model=34)
    with pytest.raises(AttachError, match=r"d_model 34.*the model given has d_model 32"):
        freeze(model, {other.config.ports: other}, PROMPT)


def test_a_layer_outside_the_model_is_refused() -> None:
    model = make_model("llama-gqa")
    far = make_dictionary("transcoder", 1, model)
    ports = Ports((Site(7, "mlp_in"),), (Site(7, "mlp_out"),))
    with pytest.raises(AttachError, match="layer 7 is outside the model; it has 0-2"):
        freeze(model, {ports: far}, PROMPT)


def test_half_precision_is_refused() -> None:
    model = make_model("llama-gqa")
    half = {ports: each.bfloat16() for ports, each in placed(model, {1: "skip"}).items()}
    with pytest.raises(AnalyzeError, match=r"transcoder of 1\.mlp_out is in torch\.bfloat16; load"):
        freeze(model, half, PROMPT)
    with pytest.raises(AnalyzeError, match=r"the model is in torch\.bfloat16; load it in float32"):
        freeze(model.bfloat16(), {}, PROMPT)


def test_nan_is_refused() -> None:
    model = make_model("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(AnalyzeError, match=r"gives NaN or Inf at 1\.mlp_out for this prompt"):
        freeze(model, {}, PROMPT)


def test_attention_that_is_not_understood_is_refused_unless_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("llama-gqa")
    everywhere = placed(model, dict.fromkeys(range(3), "lorsa"))
    monkeypatch.setattr("lorsa.language.selfcheck.LIMIT", 0.0)
    freeze(model, everywhere, PROMPT)
    with pytest.raises(LanguageModelError, match=r"layer 0: .*; give a Lorsa for its attention"):
        freeze(model, {}, PROMPT)
