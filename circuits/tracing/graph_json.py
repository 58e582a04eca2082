"""Attribution graphs in the JSON of circuit-tracer's and Neuronpedia's pages.

The names are those of schema version 1. A trace of transcoders alone has the ids of circuit-tracer;
one with other dictionaries those of Neuronpedia's complete replacement models, in which attention
and MLP of one layer have ids of their own.

A bias acts at every position and stands at the first here, for a page needs one. `influence` is
the share of all influence that a node and stronger ones have, by which pages prune.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from ...version import __version__

SCHEMA_VERSION = 1
DIGITS = 6
"""Significant digits of numbers: float32 has about seven."""
SHORT = {"lorsa": "lor", "transcoder": "cro", "sae": "sae"}
"""Kinds of dictionaries within ids; an SAE's has its module behind it, as sae-attn."""
BIAS = {"lorsa": "lorsa_bD", "transcoder": "tc_bD"}
"""Biases of dictionaries within ids."""
TYPES = {"lorsa": "lorsa", "transcoder": "cross layer transcoder", "sae": "cross layer transcoder"}
"""Types of features that pages know."""
RESULTS = {
    "pair": "pair_wise_contributors",
    "query": "top_q_marginal_contributors",
    "key": "top_k_marginal_contributors",
}
"""Lists of a head, by the kind of row in pairs.parquet."""
ENDS = {"pair": ("query_node", "key_node"), "query": ("query_node",), "key": ("key_node",)}
"""Columns of the nodes that such a row names."""
QK_ONLY = (
    "node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp", "activation",
)  # fmt: skip
Row = Mapping[str, Any]


class HeadAt(NamedTuple):
    """A QK head of a layer, at a query."""

    layer: int
    head: int
    query: int


def graph_json(
    facts: Row, nodes: pa.Table, edges: pa.Table, pairs: pa.Table | None = None
) -> dict[str, Any]:
    """Return a trace as a graph that other pages show.

    Args:
        facts: content of trace.json.
        nodes, edges, pairs: tables of the trace.
    """
    spell, rows = _Spelling(facts), nodes.to_pylist()
    every = [spell.node(row) for row in rows]
    ids = [entry["node_id"] for entry in every]
    entries = [entry for entry, row in zip(every, rows, strict=True) if row["in_graph"]]
    others = [entry for entry, row in zip(every, rows, strict=True) if not row["in_graph"]]
    ends = zip(edges["source"].to_pylist(), edges["target"].to_pylist(), strict=True)
    links = [
        {"source": ids[source], "target": ids[target], "weight": _rounded(weight)}
        for (source, target), weight in zip(ends, edges["weight"].to_pylist(), strict=True)
    ]
    found = {"metadata": _metadata(facts), "qParams": _q_params(), "nodes": entries, "links": links}
    if pairs is None:
        return found
    _tell_heads(facts, zip(every, rows, strict=True), _results(pairs, ids))
    return found | {"qk_only_nodes": {entry["node_id"]: _short(entry) for entry in others}}


def _results(pairs: pa.Table, ids: list[str]) -> dict[HeadAt, dict[str, list[list[Any]]]]:
    """Return what pages show of each QK head at a query: pairs, and nodes of either side."""
    found: dict[HeadAt, dict[str, list[list[Any]]]] = {}
    for row in pairs.to_pylist():
        ends = [None if row[name] is None else ids[row[name]] for name in ENDS[row["kind"]]]
        if None in ends:  # biases of projections, which are no node
            continue
        at = HeadAt(row["layer"], row["head"], row["query"])
        lists = found.setdefault(at, {name: [] for name in RESULTS.values()})
        lists[RESULTS[row["kind"]]].append([*ends, _rounded(row["value"])])
    return found


def _tell_heads(
    facts: Row,
    nodes: Iterable[tuple[dict[str, Any], Row]],
    results: Mapping[HeadAt, dict[str, list[list[Any]]]],
) -> None:
    """Give the heads of Lorsas what is told of the QK head that they share."""
    for entry, row in nodes:
        if entry["feature_type"] != "lorsa" or not row["in_graph"]:
            continue
        run = facts["runs"][row["run"]]
        head = row["feature"] // (run["n_features"] // run["n_qk_heads"])
        if (told := results.get(HeadAt(row["layer"], head, row["position"]))) is not None:
            entry["qk_tracing_results"] = told


def _short(entry: Row) -> dict[str, Any]:
    """Return what pages need of a node that is in no edge."""
    return {name: entry[name] for name in QK_ONLY}


def cantor(layer: int, feature: int) -> int:
    """Return the one number of a layer and a feature: Cantor's pairing."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _metadata(facts: Row) -> dict[str, Any]:
    settings, texts = facts["settings"], [_text(token) for token in facts["tokens"]]
    return {
        "slug": facts["name"],
        "scan": facts["model"]["id"],
        "transcoder_list": [run["name"] for run in facts["runs"]],
        "prompt_tokens": texts,
        "prompt": facts["prompt"] or "".join(texts),
        "node_threshold": settings["node_threshold"],
        "schema_version": SCHEMA_VERSION,
        "info": {
            "description": "replacement {replacement}, completeness {completeness}".format(
                **{name: _two_digits(value) for name, value in facts["scores"]["whole"].items()}
            ),
            "generator": {"name": "lorsa", "version": __version__},
            "create_time_ms": facts["created_ms"],
        },
        "generation_settings": {
            "max_n_logits": settings["max_logits"],
            "desired_logit_prob": settings["logit_prob"],
            "edges_per_node": settings["keep"],
        },
        "pruning_settings": {
            "node_threshold": settings["node_threshold"],
            "edge_threshold": settings["edge_threshold"],
        },
    }


def _two_digits(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"


def _q_params() -> dict[str, Any]:
    """Return what a page begins with: nothing pinned, nothing grouped."""
    return {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}


class _Spelling:
    """Ids, types and texts of a trace's nodes."""

    def __init__(self, facts: Row) -> None:
        self.kinds = [run["kind"] for run in facts["runs"]]
        self.texts = [_text(token) for token in facts["tokens"]]
        self.n_layers = facts["model"]["n_layers"]
        self.logits = {target["node"]: target for target in facts["targets"]}
        self.is_plain = set(self.kinds) <= {"transcoder"}
        self.by_kind: dict[str, Callable[[Row], dict[str, Any]]] = {
            "embed": self._embed,
            "feature": self._feature,
            "error": self._error,
            "bias": self._bias,
            "logit": self._logit,
        }

    def node(self, row: Row) -> dict[str, Any]:
        """Return the entry of a node: every name that either page reads."""
        entry = {
            "node_id": "",
            "feature": None,
            "layer": str(row["layer"]),
            "ctx_idx": row["position"] or 0,
            "feature_type": "",
            "token_prob": 0.0,
            "is_target_logit": False,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "jsNodeId": "",
            "clerp": "",
            "influence": _rounded(row["cumulative"]),
            "activation": None,
        } | self.by_kind[row["kind"]](row)
        return {**entry, "jsNodeId": entry["jsNodeId"] or entry["node_id"]}

    def _embed(self, row: Row) -> dict[str, Any]:
        token, position = row["feature"], row["position"]
        plain = {"feature": position, "jsNodeId": f"E_{token}-{position}"}
        return {
            "node_id": f"E_{token}_{position}",
            "layer": "E",
            "feature_type": "embedding",
            "clerp": f'Emb: "{self.texts[position]}"',
            **(plain if self.is_plain else {}),
        }

    def _feature(self, row: Row) -> dict[str, Any]:
        kind, layer, feature = self.kinds[row["run"]], row["layer"], row["feature"]
        place = f"{feature}_{row['position']}"
        unit = "head" if kind == "lorsa" else "feature"
        short = f"{SHORT[kind]}-{_module(row)}" if kind == "sae" else SHORT[kind]
        return {
            "node_id": f"{layer}_{place}" if self.is_plain else f"{layer}_{short}_{place}",
            "feature": cantor(layer, feature),
            "feature_type": TYPES[kind],
            "jsNodeId": f"{layer}_{feature}-0" if self.is_plain else "",
            "clerp": f"L{layer} {unit} {feature}",
            "activation": _rounded(row["value"]),
        }

    def _error(self, row: Row) -> dict[str, Any]:
        layer, position = row["layer"], row["position"]
        what = _module(row)
        plain = {
            "node_id": f"{layer}_-1_{position}",
            "feature": -1,
            "jsNodeId": f"{layer}_-1-{position}",
        }
        return {
            "node_id": f"{layer}_error_{what}_{position}",
            "feature_type": "lorsa error" if what == "attn" else "mlp reconstruction error",
            "clerp": f'Err: {what} "{self.texts[position]}"',
            **(plain if self.is_plain else {}),
        }

    def _bias(self, row: Row) -> dict[str, Any]:
        layer, what, run = row["layer"], _module(row), row["run"]
        if run is None:
            kind = "attn_bO" if what == "attn" else "mlp_bout"
        else:
            kind = BIAS.get(self.kinds[run], f"sae_{what}_bD")
        return {
            "node_id": f"{layer}_bias_{kind}_0",
            "feature_type": "bias",
            "clerp": f"L{layer} bias ({kind})",
        }

    def _logit(self, row: Row) -> dict[str, Any]:
        target, position = self.logits[row["node"]], row["position"]
        token = target["token"]
        return {
            "node_id": f"{self.n_layers}_{token}_{position}",
            "feature": token,
            "layer": str(self.n_layers),
            "feature_type": "logit",
            "token_prob": _rounded(target["probability"] or 0.0),
            "is_target_logit": target["node"] == max(self.logits.values(), key=_weight)["node"],
            "jsNodeId": f"L_{token}-{position}" if self.is_plain else "",
            "clerp": f"Output {_wanted(target)}{_likely(target)}",
        }


def _weight(target: Row) -> float:
    return float(target["weight"])


def _wanted(target: Row) -> str:
    """Return what a logit is of: a token, or one less another."""
    less = "" if target["less"] is None else f' less "{_text(target["less"])}"'
    return f'"{_text(target)}"{less}'


def _likely(target: Row) -> str:
    """Return a logit's probability as pages look for it; of a difference of two, its weight."""
    share = target["weight"] if target["probability"] is None else target["probability"]
    return f" (p={share:.3f})"


def _text(token: Row) -> str:
    """Return a token's text, or its id where no tokenizer was at hand."""
    return f"<{token['token']}>" if token["text"] is None else str(token["text"])


def _module(row: Row) -> str:
    """Return whose error or bias a node is, by its depth."""
    return "attn" if row["depth"] % 2 else "mlp"
