"""graph.json, field by field: what circuit-tracer's and Neuronpedia's pages read."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from graphs import RUNS, pair_rows, trace
from lorsa.circuits.tracing.graph_json import cantor, graph_json
from lorsa.version import __version__

NODE = {
    "node_id": str,
    "feature": (int, type(None)),
    "layer": str,
    "ctx_idx": int,
    "feature_type": str,
    "token_prob": float,
    "is_target_logit": bool,
    "run_idx": int,
    "reverse_ctx_idx": int,
    "jsNodeId": str,
    "clerp": str,
    "influence": float,
    "activation": (float, type(None)),
}
"""Every name of a node, and its kind: Neuronpedia's schema takes `feature` as a number or null."""
FEATURE_TYPES = {
    "embedding", "logit", "lorsa", "cross layer transcoder", "lorsa error",
    "mlp reconstruction error", "bias",
}  # fmt: skip


def made(kind: str) -> dict[str, Any]:
    whole = trace(RUNS[kind])
    found = graph_json(whole.facts, whole.nodes, whole.edges)
    return dict(json.loads(json.dumps(found, allow_nan=False)))


@pytest.mark.parametrize("kind", RUNS)
def test_every_field_is_there_and_of_its_kind(kind: str) -> None:
    found = made(kind)
    assert list(found) == ["metadata", "qParams", "nodes", "links"]
    assert found["qParams"] == {
        "pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": "",
    }  # fmt: skip
    for node in found["nodes"]:
        assert node.keys() == NODE.keys()
        for name, value in node.items():
            assert isinstance(value, NODE[name]), (name, value)
        assert node["feature_type"] in FEATURE_TYPES
        assert 0 <= node["ctx_idx"] < 3
        assert 0 < node["influence"] <= 1
    ids = [node["node_id"] for node in found["nodes"]]
    assert len(set(ids)) == len(ids)
    assert len({node["jsNodeId"] for node in found["nodes"]}) == len(ids)
    for link in found["links"]:
        assert list(link) == ["source", "target", "weight"]
        assert {link["source"], link["target"]} <= set(ids)
        assert isinstance(link["weight"], float)
    assert len(found["links"]) == 11


def test_the_metadata_says_how_it_was_made() -> None:
    assert made("crm")["metadata"] == {
        "slug": "a-trace",
        "scan": "some/model",
        "transcoder_list": ["0-lorsa", "1-transcoder"],
        "prompt_tokens": ["The", " cat", "<b>"],
        "prompt": "The cat<b>",
        "node_threshold": 0.8,
        "schema_version": 1,
        "info": {
            "description": "replacement 0.50, completeness undefined",
            "generator": {"name": "lorsa", "version": __version__},
            "create_time_ms": 1_700_000_000_000,
        },
        "generation_settings": {
            "max_n_logits": 10, "desired_logit_prob": 0.95, "edges_per_node": 64,
        },
        "pruning_settings": {"node_threshold": 0.8, "edge_threshold": 0.98},
    }  # fmt: skip


def _told(kind: str) -> list[tuple[Any, ...]]:
    names = ("node_id", "feature", "layer", "feature_type", "jsNodeId", "clerp")
    return [tuple(node[name] for name in names) for node in made(kind)["nodes"]]


def test_ids_with_lorsas_are_those_of_complete_replacement_models() -> None:
    assert _told("crm") == [
        ("E_5_0", None, "E", "embedding", "E_5_0", 'Emb: "The"'),
        ("E_7_1", None, "E", "embedding", "E_7_1", 'Emb: " cat"'),
        ("E_9_2", None, "E", "embedding", "E_9_2", 'Emb: "<b>"'),
        ("0_bias_lorsa_bD_0", None, "0", "bias", "0_bias_lorsa_bD_0", "L0 bias (lorsa_bD)"),
        ("0_lor_301_1", cantor(0, 301), "0", "lorsa", "0_lor_301_1", "L0 head 301"),
        ("0_error_attn_1", None, "0", "lorsa error", "0_error_attn_1", 'Err: attn " cat"'),
        ("0_error_mlp_2", None, "0", "mlp reconstruction error", "0_error_mlp_2",
         'Err: mlp "<b>"'),
        ("1_cro_17_2", cantor(1, 17), "1", "cross layer transcoder", "1_cro_17_2",
         "L1 feature 17"),
        ("1_error_mlp_2", None, "1", "mlp reconstruction error", "1_error_mlp_2",
         'Err: mlp "<b>"'),
        ("2_3_2", 3, "2", "logit", "2_3_2", 'Output " "x"" (p=0.750)'),
        ("2_8_2", 8, "2", "logit", "2_8_2", 'Output "<8>" less "y" (p=0.250)'),
    ]  # fmt: skip


def test_ids_of_transcoders_alone_are_those_of_circuit_tracer() -> None:
    found = {told[0]: told[1:] for told in _told("plt")}
    assert found["E_7_1"] == (1, "E", "embedding", "E_7-1", 'Emb: " cat"')
    assert found["1_17_2"][:4] == (cantor(1, 17), "1", "cross layer transcoder", "1_17-0")
    assert found["1_-1_2"][:4] == (-1, "1", "mlp reconstruction error", "1_-1-2")
    assert found["2_3_2"][:4] == (3, "2", "logit", "L_3-2")


def test_values_are_those_of_the_trace() -> None:
    found = {node["node_id"]: node for node in made("crm")["nodes"]}
    assert found["0_lor_301_1"]["activation"] == 2.5
    assert found["1_cro_17_2"]["activation"] == -0.75
    assert found["E_5_0"]["activation"] is None
    assert found["2_3_2"]["token_prob"] == 0.75
    assert [found[i]["is_target_logit"] for i in ("2_3_2", "2_8_2", "1_cro_17_2")] == [
        True, False, False,
    ]  # fmt: skip
    weights = {(x["source"], x["target"]): x["weight"] for x in made("crm")["links"]}
    assert weights["1_cro_17_2", "2_3_2"] == -3.0
    assert weights["0_lor_301_1", "1_cro_17_2"] == 2.0


def test_every_logit_says_its_probability_as_pages_look_for_it() -> None:
    """Neuronpedia's page takes the text behind "(p=" of each logit, and fails without it."""
    logits = [node for node in made("crm")["nodes"] if node["feature_type"] == "logit"]
    assert [float(node["clerp"].split("(p=")[1].split(")")[0]) for node in logits] == [0.75, 0.25]


def test_a_layer_and_a_feature_have_one_number() -> None:
    pairs = [(layer, feature) for layer in range(12) for feature in range(40)]
    assert len({cantor(*pair) for pair in pairs}) == len(pairs)
    assert (cantor(0, 0), cantor(1, 0), cantor(0, 1), cantor(2, 3)) == (0, 1, 2, 18)


def test_heads_have_the_pairs_that_made_them_look() -> None:
    """Of a node outside the graph, pages look up what to show in `qk_only_nodes`."""
    whole = trace(pairs=pair_rows())
    outside = np.arange(whole.nodes.num_rows) != 6
    nodes = whole.nodes.set_column(1, "in_graph", pa.array(outside))
    edges = whole.edges.filter(pc.not_equal(whole.edges["source"], 6))
    found = graph_json(whole.facts, nodes, edges, whole.pairs)
    told = {node["node_id"]: node for node in found["nodes"]}
    assert told["0_lor_301_1"]["qk_tracing_results"] == {
        "pair_wise_contributors": [["E_7_1", "E_5_0", 1.5], ["E_7_1", "0_error_mlp_2", -0.25]],
        "top_q_marginal_contributors": [["E_7_1", 1.25]],
        "top_k_marginal_contributors": [["0_error_mlp_2", -0.25], ["E_5_0", 2.0]],
    }
    assert sum("qk_tracing_results" in node for node in found["nodes"]) == 1
    assert list(found["qk_only_nodes"]) == ["0_error_mlp_2"]
    assert found["qk_only_nodes"]["0_error_mlp_2"].keys() == {
        "node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp", "activation",
    }  # fmt: skip
    assert "0_error_mlp_2" not in told
    assert "qk_only_nodes" not in made("crm")
