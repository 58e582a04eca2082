"""What version 0.1.0 wrote still opens, verifies, goes on and measures the same."""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lorsa import (
    ActivationStore,
    Analysis,
    AnalyzeConfig,
    ConvertConfig,
    EvalConfig,
    HarvestConfig,
    Lorsa,
    PushConfig,
    TrainConfig,
    analyze_lorsa,
    build_page,
    convert_lorsa,
    evaluate_lorsa,
    evaluate_lorsas,
    find_heads,
    harvest_activations,
    push_lorsas,
    store_info,
    sweep_lorsas,
    train_lorsa,
    verify_store,
)
from lorsa.analyze.said import said
from lorsa.analyze.schema import LISTED
from lorsa.evaluate.kept import RENAMED
from lorsa.sites import Site, attention_ports

BEFORE = Path(__file__).parent / "before"
RECORDED = json.loads((BEFORE / "recorded.json").read_text("utf-8"))
PLACE = "@BEFORE@"
LAYER = 1
UNFINISHED = {
    "float32": ("whole/float32", [0, 1]),
    "int8": ("modes/int8-zstd-derive", [1]),
    "adding": ("whole/adding", [0, 1]),
}
"""Stores that go on, the same in one go, and their layers in the end."""
OTHER_CPU = 1e-4
"""Relative: sums are added up in another order."""


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all was made in, not to be changed."""
    folder = tmp_path_factory.mktemp("before")
    for archive in sorted(BEFORE.glob("*.tar.xz")):
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    for name in ("manifest.json", "plan.json"):
        for path in folder.rglob(name):
            path.write_text(path.read_text("utf-8").replace(PLACE, str(folder.resolve())), "utf-8")
    return folder


def _near(recorded: Any) -> Any:
    """Return measures as those of another CPU may be."""
    if isinstance(recorded, dict):
        return {name: _near(value) for name, value in recorded.items()}
    return pytest.approx(recorded, rel=OTHER_CPU) if isinstance(recorded, float) else recorded


def _sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(values.float().contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("mode", RECORDED["modes"])
def test_a_store_of_every_mode_verifies_and_reads_the_same(before: Path, mode: str) -> None:
    root = before / "modes" / mode
    found = verify_store(root, full=True)
    assert (found["ok"], found["complete"], found["damages"]) == (True, True, [])
    store = ActivationStore.open(root)
    assert store.layers == [LAYER]
    seqs = range(store.manifest.n_seq)
    facts = RECORDED["modes"][mode]
    assert _sha256(store.values(Site(LAYER, "attn_in"), seqs)) == facts["x_sha256"]
    if mode.endswith("-store"):
        assert _sha256(store.activations(attention_ports(LAYER), seqs).y) == facts["y_sha256"]


@pytest.mark.parametrize("mode", RECORDED["modes"])
def test_a_run_measures_the_same_on_every_mode(before: Path, tmp_path: Path, mode: str) -> None:
    """Where y is derived, it is derived of the weights and the geometry in the store."""
    run = Path(shutil.copytree(before / "runs/topk", tmp_path / "topk"))
    found = evaluate_lorsa(EvalConfig(run=run, store=before / "modes" / mode, device="cpu"))
    assert found.fvu == _near(RECORDED["runs"]["topk"]["modes"][mode])


def _committed(root: Path) -> dict[str, str]:
    """Return the SHA-256 of the files that a journal tells of, by their paths in the store."""
    lines = [
        json.loads(line)
        for path in sorted((root / "journal").glob("w*.jsonl"))
        for line in path.read_text("utf-8").splitlines()
    ]
    files = [
        path
        for line in lines
        for entry in line
        for path in (root / entry["array"] / "c" / str(entry["shard"])).rglob("*")
        if path.is_file() and path.suffix != ".partial"
    ]
    return _sums(root, files)


def _digests(root: Path) -> dict[str, str]:
    """Return the same of all files of a store's layers."""
    return _sums(root, [p for p in (root / "layers").rglob("c/**/*") if p.is_file()])


def _sums(root: Path, files: list[Path]) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def _request(before: Path, store: Path) -> HarvestConfig:
    """Return the request that a store was begun with, as its plan tells."""
    plan = json.loads((store / "journal/plan.json").read_text("utf-8"))
    asked = plan["request"] | {"layers": ",".join(plan["layers"])}
    assert asked["model"] == str(before.resolve() / "model")
    return HarvestConfig(**asked, store=store, device="cpu")


@pytest.mark.parametrize("name", UNFINISHED)
def test_an_unfinished_store_goes_on_to_its_end(before: Path, tmp_path: Path, name: str) -> None:
    """The shards that were there stay; the others are those of a harvest in one go, of now."""
    other, layers = UNFINISHED[name]
    root = Path(shutil.copytree(before / "unfinished" / name, tmp_path / name))
    found = verify_store(root, full=True)
    assert (found["complete"], found["damages"]) == (False, [])
    n_shards, n_missing = (store_info(root)[key] for key in ("n_shards", "n_missing_shards"))
    assert 0 < n_missing < n_shards == 22
    kept, config = _committed(root), _request(before, root)
    harvested = harvest_activations(config)
    assert harvested.layers == layers
    assert verify_store(root, full=True)["ok"]
    assert verify_store(before / other, full=True)["ok"]

    now = harvest_activations(HarvestConfig(**{**_fields(config), "store": tmp_path / "in-one-go"}))
    digests, fresh = _digests(root), _digests(Path(now.store))
    assert {path: digests[path] for path in kept} == kept
    arrays = {path for path in digests if "/norms/" not in path}
    assert arrays == {path for path in fresh if "_norm/" not in path}  # now an array for each site
    if name != "int8":  # whose channels' scales were taken on the machine that began it
        new = arrays - kept.keys()
        assert {path: digests[path] for path in new} == {path: fresh[path] for path in new}
    finished, whole = ActivationStore.open(root), ActivationStore.open(before / other)
    seqs = range(whole.manifest.n_seq)
    assert torch.equal(finished.tokens(seqs), whole.tokens(seqs))
    steps = {"float32": 1e-5, "int8": 0.02, "adding": 0.01}[name]  # of rounding
    for site in finished.sites:
        norms = [store.norms(site, seqs) for store in (finished, ActivationStore.open(now.store))]
        assert torch.allclose(*norms, rtol=steps)
    for layer in layers:
        x, known = (each.values(Site(layer, "attn_in"), seqs).float() for each in (finished, whole))
        assert (x - known).abs().max() < steps * known.abs().max()


def _fields(config: HarvestConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__slots__}


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_a_finished_run_measures_the_same(before: Path, tmp_path: Path, name: str) -> None:
    """On its store and in the language model; beside it, eval.json and the run's own result."""
    run = Path(shutil.copytree(before / "runs" / name, tmp_path / name))
    facts = RECORDED["runs"][name]
    again = train_lorsa(_run_config(before, run, before / "runs" / name))
    assert (again.fvu, again.l0, again.dead_fraction) == (
        facts["fvu"],
        facts["l0"],
        facts["dead_fraction"],
    )
    card = push_lorsas(PushConfig(runs=(run,), repo=str(tmp_path / "shared")), dry_run=True).card
    assert f"{facts['fvu']:.4f}" in card
    config = EvalConfig(run=run, store=before / "acts", model=str(before / "model"), device="cpu")
    assert _like(evaluate_lorsa(config).to_dict(), facts["eval"]) == _near(facts["eval"])
    kept = json.loads((run / "eval.json").read_text("utf-8"))
    assert _like(kept, facts["eval"]) == _near(facts["eval"])


def _like(measured: Any, recorded: dict[str, Any]) -> dict[str, Any]:
    """Return of some measures those that were recorded, under the names of then."""
    found = {name: measured[RENAMED.get(name, name)] for name in recorded}
    return {
        name: _like(found[name], value) if isinstance(value, dict) else found[name]
        for name, value in recorded.items()
    }


def _run_config(before: Path, out: Path, known: Path) -> TrainConfig:
    """Return the request of a run, as its folder tells."""
    asked = json.loads((known / "run.json").read_text("utf-8"))["config"]
    return TrainConfig(**asked | {"store": before / "acts", "out": out})


def test_two_runs_measure_the_same_together(before: Path, tmp_path: Path) -> None:
    configs = [
        EvalConfig(
            run=Path(shutil.copytree(before / "runs" / name, tmp_path / name)),
            store=before / "acts",
            model=str(before / "model"),
            device="cpu",
        )
        for name in ("topk", "jumprelu")
    ]
    together, recorded = (
        evaluate_lorsas(configs).to_dict()["together"],
        RECORDED["runs"]["together"],
    )
    assert _like(together, recorded) == _near(recorded)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_a_stopped_run_goes_on_to_its_end(before: Path, tmp_path: Path, name: str) -> None:
    """From the checkpoint, to the Lorsa that the same run came to when nothing stopped it."""
    run = Path(shutil.copytree(before / "stopped" / name, tmp_path / name))
    told: list[Any] = []
    result = train_lorsa(_run_config(before, run, run), report=told.append)
    assert any("step-000000018" in str(event) for event in told)
    assert [event.step for event in told if hasattr(event, "grad_norm")] == [20, 24]
    facts = RECORDED["runs"][name]
    assert (result.fvu, result.l0) == (_near(facts["fvu"]), _near(facts["l0"]))
    found, whole = (
        Lorsa.from_pretrained(folder).state_dict() for folder in (run, before / "runs" / name)
    )
    assert found.keys() == whole.keys()
    for parameter, values in whole.items():
        torch.testing.assert_close(
            found[parameter], values, rtol=1e-3, atol=1e-4 * float(values.abs().max())
        )


def test_a_stopped_sweep_goes_on_to_its_end(before: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(before / "sweep", tmp_path / "sweep"))
    known = json.loads((out / "top_k=4,select=relu/run.json").read_text("utf-8"))["config"]
    base = known | {"store": before / "acts"}
    for name in ("out", "top_k", "select"):
        del base[name]
    told: list[str] = []
    values = {"top_k": [4, 6], "select": ["relu", "abs"]}
    result = sweep_lorsas(base, values, out, report=lambda event: told.append(str(event.event)))
    assert sum("step-000000018" in line for line in told) == 4
    found = {Path(row["run"]).name: row["fvu"] for row in result.rows}
    assert found == _near(RECORDED["sweep"])


@pytest.mark.parametrize("kind", RECORDED["analysis"]["found"])
def test_an_analysis_finds_the_same_heads(before: Path, kind: str) -> None:
    """Scores were those on probes, and are now the smaller of text and probes."""
    run = before / "runs/topk"
    found = find_heads(kind, store=before / "acts", runs=[run], n=32, least=0)
    heads = {head.head: head for head in found}
    for known in RECORDED["analysis"]["found"][kind]:
        head = heads[known["head"]]
        assert head.score_on_probes == known["score"]
        assert head.score == min(known["score"], known["score_on_text"])
        same = ("layer", "score_on_text", "frequency", "evidence")
        assert {name: getattr(head, name) for name in same} == {n: known[n] for n in same}
    assert [head.score for head in found] == sorted((head.score for head in found), reverse=True)
    assert Analysis.open(run).head(found[0].head)["qk_head"] == found[0].head // 2


def test_a_page_is_made_of_an_analysis(before: Path, tmp_path: Path) -> None:
    """It has no z: nothing that it lists is said of a head."""
    row = Analysis.open(before / "runs/topk").head(0)
    for name in LISTED:
        assert row[name], name
        assert said(row, name) is None
    page = build_page(before / "runs/topk", tmp_path / "page")
    assert page.file.exists()


def test_half_an_analysis_is_begun_again(before: Path, tmp_path: Path) -> None:
    """Bounds take other sums, and induction was another; one line says so."""
    out = Path(shutil.copytree(before / "half-read", tmp_path / "half-read"))
    asked = AnalyzeConfig(run=before / "runs/topk", store=before / "acts", out=out, device="cpu")
    told: list[str] = []
    facts = analyze_lorsa(asked, report=lambda event: told.append(str(event)))
    assert (
        sum("of another request or an earlier version: all is read again" in t for t in told) == 1
    )
    known = RECORDED["analysis"]["types_without_model"]
    assert sum(facts["types"].values()) == sum(known.values())
    assert [path.suffix for path in out.iterdir() if "partial" in path.name] == []


def test_a_lorsa_of_another_tool_comes_back(before: Path, tmp_path: Path) -> None:
    asked = ConvertConfig(
        source=str(before / "llamascopium"), out=tmp_path / "ours", model=str(before / "model")
    )
    convert_lorsa(asked)
    found = evaluate_lorsa(EvalConfig(run=tmp_path / "ours", store=before / "acts", device="cpu"))
    assert found.fvu == _near(RECORDED["runs"]["topk"]["fvu"])


def _lorsa(*words: str | Path) -> Any:
    """Run a command and return what it prints with --json."""
    command = [sys.executable, "-m", "lorsa", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_command_line_takes_them(before: Path, tmp_path: Path) -> None:
    assert _lorsa("store", "verify", before / "acts", "--full")["ok"]
    run = shutil.copytree(before / "runs/topk", tmp_path / "topk")
    found = _lorsa("eval", run, "--store", before / "acts", "--device", "cpu")
    assert found["fvu"] == _near(RECORDED["runs"]["topk"]["fvu"])
    heads = _lorsa("find", "induction", run, "--top", "32", "--least", "0")["heads"]
    recorded = RECORDED["analysis"]["found"]["induction"]
    assert {head["head"] for head in heads} >= {head["head"] for head in recorded}
