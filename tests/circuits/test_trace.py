"""`lorsa trace` from a tiny model to a folder, and what it refuses."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lorsa import cli
from lorsa.circuits.tracing import trace as module
from lorsa.circuits.tracing.config import TraceConfig
from lorsa.circuits.tracing.edges import edges
from lorsa.circuits.tracing.files import FACTS, read_trace
from lorsa.circuits.tracing.influence import influence_of, prune, scores
from lorsa.circuits.tracing.nodes import FEATURE, LOGIT, mlp_depth
from lorsa.circuits.tracing.opened import require_patterns
from lorsa.circuits.tracing.sources import find_nodes
from lorsa.circuits.tracing.told import told
from lorsa.circuits.tracing.trace import Traced, explore, joined, require_sums, trace
from lorsa.dictionaries.linear_config import TranscoderConfig
from lorsa.dictionaries.transcoder import Transcoder
from lorsa.display.trace import trace_tables
from lorsa.errors import AnalyzeError, AttachError, CheckpointError, LanguageModelError
from lorsa.store.parquet import numbers
from rich.console import Console
from tiny import make_model, make_tokenizer
from traces import ALL, frozen_in, make_dictionary
from typer.testing import CliRunner

PROMPT = "The quick brown fox jumps over the lazy dog"
Make = Callable[..., TraceConfig]


@pytest.fixture(scope="module")
def runs(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of random dictionaries: Lorsas in layers 0 and 2, transcoders in 0 and 1."""
    root, model, found = tmp_path_factory.mktemp("runs"), make_model("llama-gqa"), {}
    for layer, kind in ((0, "lorsa"), (0, "transcoder"), (1, "skip"), (2, "lorsa")):
        dictionary = make_dictionary(kind, layer, model)
        dictionary.config = replace(dictionary.config, base_model=str(model_folder))
        place = dictionary.config.place
        dictionary.save_pretrained(root / place)
        found[place] = root / place
    return found


@pytest.fixture
def config(runs: dict[str, Path], model_folder: Path, tmp_path: Path) -> Make:
    def make(**changes: Any) -> TraceConfig:
        usual = {"runs": tuple(runs.values()), "model": str(model_folder), "prompt": PROMPT}
        if {"tokens", "tokens_file"} & changes.keys():
            del usual["prompt"]
        return TraceConfig(**{**usual, "device": "cpu", "out": tmp_path / "traces", **changes})

    return make


@pytest.fixture(scope="module")
def made(
    runs: dict[str, Path], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Traced:
    """A whole trace with default settings."""
    out = tmp_path_factory.mktemp("traces")
    given = {"runs": tuple(runs.values()), "model": str(model_folder), "prompt": PROMPT}
    return trace(TraceConfig(**given, out=out, device="cpu"))


def test_a_trace_is_written_and_read_back(made: Traced) -> None:
    assert made.root.name.startswith("the-quick-brown-fox-jumps-over-the-lazy-")
    found = read_trace(made.root)
    assert found.nodes.equals(made.trace.nodes)
    assert found.edges.equals(made.trace.edges)
    assert found.facts["rows"]["worst"] < 1e-5
    assert found.facts["replaced"] == {"attn": [0, 2], "mlp": [0, 1]}
    ids = make_tokenizer()(PROMPT)["input_ids"]
    assert [token["token"] for token in found.facts["tokens"]] == ids
    assert "".join(token["text"] for token in found.facts["tokens"]) == PROMPT


def test_targets_are_the_likeliest_tokens(made: Traced) -> None:
    ids = torch.tensor([make_tokenizer()(PROMPT)["input_ids"]])
    with torch.no_grad():
        p = make_model("llama-gqa")(input_ids=ids).logits[0, -1].softmax(0)
    targets = made.trace.facts["targets"]
    assert {target["token"] for target in targets} == set(p.topk(10).indices.tolist())
    for target in targets:
        assert target["probability"] == pytest.approx(float(p[target["token"]]), rel=1e-4)
        row = made.trace.nodes.slice(target["node"], 1).to_pylist()[0]
        assert (row["kind"], row["feature"]) == ("logit", target["token"])
        assert row["weight"] == pytest.approx(target["weight"])
    assert sum(target["weight"] for target in targets) == pytest.approx(1)


def test_what_is_written_is_the_whole_graph_at_thresholds_of_one(config: Make) -> None:
    """Nothing is cut then: the scores are those of the whole graph, and rows are whole."""
    exact = {"keep": 10_000, "explore": 1.0, "node_threshold": 1.0, "edge_threshold": 1.0}
    found = trace(config(**exact)).trace
    whole, pruned = found.facts["scores"]["whole"], found.facts["scores"]["pruned"]
    assert pruned == pytest.approx(whole, rel=1e-6)
    assert whole["not_shown"] < 1e-6
    rows = found.nodes.to_pylist()
    sums = np.zeros(len(rows))
    np.add.at(sums, numbers(found.edges["target"]), numbers(found.edges["weight"]))
    for row, made_of in zip(rows, sums, strict=True):
        if row["total"] is not None:
            assert abs(row["rest_positive"] - row["rest_negative"]) < 1e-5
            assert row["constant"] + made_of == pytest.approx(row["total"], abs=1e-4)


def test_exploring_from_the_top_finds_what_all_rows_have() -> None:
    frozen = frozen_in("llama-gqa", ALL)
    nodes = find_nodes(frozen)
    weights = torch.zeros(len(nodes), dtype=torch.float64)
    probabilities = [goal.probability for goal in frozen.goals]
    weights[nodes.kind == LOGIT] = torch.tensor(probabilities, dtype=torch.float64)
    features, logits = ((nodes.kind == kind).nonzero()[:, 0] for kind in (FEATURE, LOGIT))
    parts = [edges(frozen, nodes, features, keep=7), edges(frozen, nodes, logits, keep=None)]
    rows = joined(parts)  # those of the targets are whole
    found = explore(frozen, nodes, weights, keep=7, share=1.0)
    wanted = influence_of(nodes, rows, weights)
    torch.testing.assert_close(found.influence, wanted, rtol=1e-5, atol=1e-9)
    whole = scores(nodes, rows, weights)
    assert scores(nodes, found.rows, weights) == pytest.approx(whole, rel=1e-5)
    some = explore(frozen, nodes, weights, keep=7, share=0.9)
    assert len(some.rows.target) < len(found.rows.target)
    assert scores(nodes, some.rows, weights).not_shown > whole.not_shown


def test_the_same_request_is_shown_as_it_was_kept(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trace(config())
    monkeypatch.setattr(module, "find_nodes", None)
    lines: list[str] = []
    again = trace(config(), report=lines.append)
    assert again.root == first.root
    assert again.trace.facts.items() >= first.trace.facts.items()
    assert lines == [f"traced before, and kept in {first.root}"]
    with pytest.raises(TypeError):  # another request is computed
        trace(config(keep=3))


def test_a_name_of_another_request_is_refused(config: Make) -> None:
    root = trace(config(name="mine")).root
    before = (root / FACTS).read_bytes()
    with pytest.raises(AnalyzeError, match="is a trace of another request; give another --name"):
        trace(config(name="mine", prompt="The lazy dog"))
    assert (root / FACTS).read_bytes() == before


def test_a_single_token_is_explained(config: Make) -> None:
    found = trace(config(target=" fox")).trace
    (target,) = found.facts["targets"]
    row = found.nodes.to_pylist()[target["node"]]
    (token,) = make_tokenizer()(" fox", add_special_tokens=False)["input_ids"]
    assert (target["token"], target["text"], target["less"]) == (token, " fox", None)
    assert (row["kind"], row["weight"], row["value"]) == ("logit", 1.0, target["value"])
    by_id = trace(config(target=f"#{token}", name="by-id")).trace
    assert by_id.nodes.equals(found.nodes)


def test_a_difference_of_two_tokens_is_explained(config: Make) -> None:
    found = trace(config(target=" fox", less=" dog")).trace
    (target,) = found.facts["targets"]
    assert target["less"]["text"] == " dog"
    ids = torch.tensor([make_tokenizer()(PROMPT)["input_ids"]])
    with torch.no_grad():
        logits = make_model("llama-gqa")(input_ids=ids).logits[0, -1]
    difference = float(logits[target["token"]] - logits[target["less"]["token"]])
    assert target["value"] == pytest.approx(difference, abs=1e-4)
    graph = json.loads((trace(config(target=" fox", less=" dog")).root / "graph.json").read_text())
    (logit,) = [node for node in graph["nodes"] if node["feature_type"] == "logit"]
    assert logit["clerp"].startswith('Output " fox" less " dog" (p=')


@pytest.mark.parametrize("place", ["1.mlp", "layer-2"])
def test_a_feature_is_explained(config: Make, made: Traced, place: str) -> None:
    run = [run["place"] for run in made.trace.facts["runs"]].index(place)
    rows = [row for row in made.trace.nodes.to_pylist() if row["run"] == run]
    row = next(row for row in rows if row["kind"] == "feature")
    target = f"feature:{place}/{row['feature']}@{row['position']}"
    found = trace(config(target=target)).trace
    (fact,) = found.facts["targets"]
    last = found.nodes.to_pylist()[fact["node"]]
    assert (last["kind"], last["feature"], last["weight"]) == ("feature", row["feature"], 1.0)
    assert found.nodes["weight"].to_pylist()[fact["node"]] == 1.0
    assert "logit" not in found.nodes["kind"].to_pylist()
    strongest = trace(config(target=target.split("@")[0], name="strongest")).trace
    (chosen,) = [each for each in strongest.nodes.to_pylist() if each["weight"] > 0]
    assert chosen["value"] >= row["value"]
    graph = json.loads((trace(config(target=target)).root / "graph.json").read_text())
    assert len(graph["nodes"]) == found.facts["nodes"]["kept"]


def test_tokens_of_a_file_are_as_they_are(config: Make, tmp_path: Path) -> None:
    for name, text in (("a", "5, 17, 301\n"), ("b", "[5,17,301]"), ("c", "5\n17\n301")):
        (tmp_path / name).write_text(text)
        found = trace(config(tokens_file=tmp_path / name, name=name)).trace
        assert [token["token"] for token in found.facts["tokens"]] == [5, 17, 301]


def test_pairs_of_the_most_influential_heads_are_there(made: Traced) -> None:
    """What all kept pairs, their rest and the constant add up to is the centred score."""
    found = read_trace(made.root)
    heads = found.facts["heads"]
    assert 0 < len(heads) <= 8
    assert [head["influence"] for head in heads] == sorted(
        (head["influence"] for head in heads), reverse=True
    )
    assert found.pairs is not None
    rows = found.pairs.to_pylist()
    for head in heads:
        assert head["gap"] < 1e-4
        at = ("layer", "head", "query", "key")
        mine = [row for row in rows if all(row[name] == head[name] for name in at)]
        assert {row["kind"] for row in mine} == {"pair", "query", "key"}
        pairs = sum(row["value"] for row in mine if row["kind"] == "pair")
        rest = head["rest_positive"] + head["rest_negative"] + head["unpaired"]
        assert pairs + rest + head["constant"] == pytest.approx(head["centred"], abs=1e-3)
    nodes = found.nodes.to_pylist()
    kept = [row["node"] for row in nodes if row["in_graph"]]
    assert len(kept) == found.facts["nodes"]["kept"] <= len(nodes)
    ends = {*found.edges["source"].to_pylist(), *found.edges["target"].to_pylist()}
    assert ends <= set(kept)


def test_no_pairs_are_made_where_none_are_asked_for(config: Make) -> None:
    found = trace(config(qk=0))
    assert found.trace.pairs is None
    assert found.trace.facts["heads"] == []
    assert not (found.root / "pairs.parquet").exists()
    assert all(found.trace.nodes["in_graph"].to_pylist())


def test_what_is_told_names_the_strongest(made: Traced) -> None:
    found = told(*made)
    strongest = found["strongest"]
    shares = [node["influence"] for node in strongest]
    assert shares == sorted(shares, reverse=True)
    rows = [row for row in made.trace.nodes.to_pylist() if row["kind"] != "error"]
    assert shares[0] == max(row["influence"] for row in rows)
    assert [node["kind"] for node in found["errors"]] == ["error"] * 4
    assert found["not_replaced"] == {"attn": [1], "mlp": [2]}
    json.dumps(found, allow_nan=False)


def test_tables_say_it_in_plain_words(made: Traced) -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(trace_tables(told(*made)))
    text = out.getvalue()
    for words in (
        "attention without", "layers 1: paths go through it", "MLP without", "replacement",
        "of the influence of tokens and errors is the tokens'", "the strongest nodes",
        "largest errors", "error of layer-2 at token", "why they look there",
    ):  # fmt: skip
        assert words in text, words


def test_a_layer_without_any_dictionary_is_said_and_not_refused(
    config: Make, runs: dict[str, Path]
) -> None:
    found = told(*trace(config(runs=(runs["1.mlp"],))))
    assert found["not_replaced"] == {"attn": [0, 1, 2], "mlp": [0, 2]}


def _two_of_one_site(config: Make, runs: dict[str, Path], tmp_path: Path) -> None:
    trace(config(runs=(runs["1.mlp"], runs["layer-0"], runs["1.mlp"])))


def _two_models(config: Make, runs: dict[str, Path], tmp_path: Path) -> None:
    other = make_dictionary("transcoder", 2, make_model("llama-gqa"))
    other.config = replace(other.config, base_model="another/model")
    other.save_pretrained(tmp_path / "other")
    trace(config(runs=(runs["1.mlp"], tmp_path / "other")))


def _another_width(config: Make, runs: dict[str, Path], tmp_path: Path) -> None:
    wide = TranscoderConfig(n_features=24, d_model=48, top_k=3, layer=1)
    Transcoder(wide).save_pretrained(tmp_path / "other")
    trace(config(runs=(tmp_path / "other",)))


def _not_finite(config: Make, runs: dict[str, Path], tmp_path: Path) -> None:
    model = make_model("llama-gqa")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    trace(config(model=str(tmp_path / "model")))


def _outside(config: Make, runs: dict[str, Path], tmp_path: Path) -> None:
    trace(config(tokens="5,99999999"))


def _one_token(config: Make, runs: dict[str, Path], tmp_path: Path) -> None:
    trace(config(tokens="5"))


def _too_long(config: Make, runs: dict[str, Path], tmp_path: Path) -> None:
    trace(config(tokens="0-9," * 20_000 + "1"))


def _no_token(config: Make, runs: dict[str, Path], tmp_path: Path) -> None:
    trace(config(target=" foxjumps over"))


def _no_id(config: Make, runs: dict[str, Path], tmp_path: Path) -> None:
    trace(config(target="#99999999"))


def _no_feature(config: Make, runs: dict[str, Path], tmp_path: Path) -> None:
    trace(config(target="feature:1.mlp/4000@2"))


def _no_place(config: Make, runs: dict[str, Path], tmp_path: Path) -> None:
    trace(config(target="feature:7.mlp/4@2"))


def _silent(config: Make, runs: dict[str, Path], tmp_path: Path) -> None:
    trace(config(target="feature:1.mlp/4@9999"))


def _no_run(config: Make, runs: dict[str, Path], tmp_path: Path) -> None:
    trace(config(runs=(tmp_path,)))


def _no_model(config: Make, runs: dict[str, Path], tmp_path: Path) -> None:
    trace(config(model=str(tmp_path / "nothing")))


def _no_file(config: Make, runs: dict[str, Path], tmp_path: Path) -> None:
    trace(config(tokens_file=tmp_path / "nothing"))


def _no_ids(config: Make, runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "words").write_text("once upon a time")
    trace(config(tokens_file=tmp_path / "words"))


@pytest.mark.parametrize(
    ("bad", "kind", "line"),
    [
        (_two_of_one_site, AnalyzeError, "both write 1.mlp_out; give one of them"),
        (_two_models, AnalyzeError, "is of model .* of another/model: give runs of one model"),
        (_another_width, AttachError, "d_model"),
        (_not_finite, AnalyzeError, "NaN or Inf"),
        (_outside, AnalyzeError, "outside the vocabulary"),
        (_one_token, AnalyzeError, "the prompt has 1 token; a trace takes 2 or more"),
        (_too_long, AnalyzeError, "tokens; the model takes"),
        (_no_token, AnalyzeError, "is no token but"),
        (_no_id, AnalyzeError, "token 99999999 is outside the vocabulary"),
        (_no_feature, AnalyzeError, "feature 4000 is outside 1.mlp; it has 0-23"),
        (_no_place, AnalyzeError, "no run is of 7.mlp; the runs are of layer-0, 0.mlp"),
        (_silent, AnalyzeError, "feature 4 of 1.mlp does not fire"),
        (_no_run, CheckpointError, "config.json"),
        (_no_model, LanguageModelError, "nothing"),
        (_no_file, AnalyzeError, "cannot be read"),
        (_no_ids, AnalyzeError, "holds no token ids"),
    ],
)
def test_what_cannot_be_traced_is_a_line_and_leaves_nothing(
    bad: Any, kind: type[Exception], line: str, config: Make, runs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(kind, match=line) as found:
        bad(config, runs, tmp_path)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "traces").exists()


def test_more_than_the_memory_holds_names_the_option(
    config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        module.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 30_000})()
    )
    with pytest.raises(AnalyzeError, match=r"are free; give --keep \d+$"):
        trace(config())
    monkeypatch.setattr(
        module.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1_500})()
    )
    with pytest.raises(AnalyzeError, match="give a shorter prompt$"):
        trace(config())
    assert not (tmp_path / "traces").exists()


def test_features_of_an_mlps_output_are_written_though_no_node_contributes() -> None:
    frozen = frozen_in("llama-gqa", {1: "lorsa mlp_out"})
    nodes = find_nodes(frozen)
    weights = torch.zeros(len(nodes), dtype=torch.float64)
    (logits,) = torch.where(nodes.kind == LOGIT)
    weights[logits] = 1 / len(logits)
    found = explore(frozen, nodes, weights, keep=10_000, share=1.0)
    pruned = prune(nodes, found.rows, weights, node_threshold=1.0, edge_threshold=1.0)
    of_sae = (nodes.kind == FEATURE) & (nodes.depth == mlp_depth(1)) & (found.influence > 0)
    assert of_sae.any()
    assert pruned.nodes[of_sae].all()


def test_patterns_that_do_not_fit_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1600})()
    )
    require_patterns(10, 4)
    with pytest.raises(AnalyzeError, match="of 11 tokens take .* give a prompt of 10 tokens"):
        require_patterns(11, 4)


def test_rows_that_do_not_add_up_are_refused() -> None:
    frozen = frozen_in("llama-gqa", ALL)
    nodes = find_nodes(frozen)
    rows = edges(frozen, nodes, (nodes.kind == LOGIT).nonzero()[:, 0])
    assert require_sums(rows) < 1e-5
    with pytest.raises(AnalyzeError, match="nothing is written"):
        require_sums(rows._replace(total=rows.total * 1.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "give one of --prompt"),
        ({"tokens": "5", "prompt": "a"}, "give one of --prompt"),
        ({"prompt": ""}, "prompt is empty"),
        ({"tokens": "five"}, "tokens is 'five'"),
        ({"target": ""}, "target is empty"),
        ({"target": "feature:12"}, "a feature is feature:12.mlp/301@5"),
        ({"less": " dog"}, "less takes a token off another"),
        ({"target": "feature:1.mlp/3@2", "less": " dog"}, "less takes a token off another"),
        ({"runs": ()}, "runs is empty"),
        ({"name": "../up"}, "name is '../up'"),
        ({"name": ".."}, "name is '..'"),
        ({"keep": 0}, "keep is 0"),
        ({"explore": 0.0}, "explore is 0.0; allowed: above 0, at most 1"),
        ({"node_threshold": 1.5}, "node_threshold is 1.5"),
        ({"device": "tpu"}, "device is 'tpu'"),
    ],
)
def test_a_config_refuses(config: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_the_command_prints_json_and_tables(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call = ["trace", *map(str, runs.values()), "--prompt", PROMPT, "--device", "cpu"]
    done = CliRunner().invoke(cli.app, [*call, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["ok"]
    assert (tmp_path / found["trace"] / FACTS).is_file()
    again = CliRunner().invoke(cli.app, call)
    assert again.exit_code == 0
    assert "the strongest nodes" in again.stdout
    wrong = CliRunner().invoke(cli.app, [*call, "--keep", "0"])
    assert wrong.exit_code == 2
    assert "keep is 0" in wrong.stderr
    taken = CliRunner().invoke(cli.app, [*call, "--target", " fox", "--less", " foxes dog"])
    assert taken.exit_code == 1
    assert len(taken.stderr.strip().splitlines()[-1].split("is no token")) == 2
