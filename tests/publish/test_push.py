"""What a push sends, to a folder and to a stub of the Hub, and what it says when it cannot."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stub import READER, Hub, do
from lorsa import cli
from lorsa.dictionaries.formats.llamascopium_write import write as write_llamascopium
from lorsa.dictionaries.kinds import load
from lorsa.dictionaries.linear_config import TranscoderConfig
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.dictionaries.transcoder import Transcoder
from lorsa.errors import PublishError
from lorsa.evaluate.config import EvalConfig
from lorsa.evaluate.evaluate import evaluate_run
from lorsa.publish.config import PushConfig
from lorsa.publish.push import push
from lorsa.seal import check_seal
from lorsa.train.config import TrainConfig
from lorsa.train.train import train_many
from lorsa.verify import verify_paths
from runs import settings
from safetensors.torch import load_file
from sited import with_sites
from typer.testing import CliRunner
from unseal import change_json

SENT = {"config.json", "lorsa.safetensors", "training.json", "seal.json"}


@pytest.fixture(scope="module")
def runs(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of layers 1 and 2, with all that runs have, and more."""
    out = tmp_path_factory.mktemp("pushed") / "runs"
    some = settings(store_folder, checkpoint_every_tokens=256, train_tokens=512)
    outcomes = train_many(
        [TrainConfig(**some | {"layer": n}, out=out / f"layer-{n}") for n in (1, 2)]
    )
    assert [outcome.failure for outcome in outcomes] == [None, None]
    (out / "layer-1/notes.txt").write_text("a secret")
    (out / "layer-1/checkpoints/step-000000001").mkdir(parents=True)
    (out / "layer-1/checkpoints/step-000000001/optimizer.safetensors").write_bytes(b"large")
    return out


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


def _files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _error(told: dict[str, Any], code: int = 1) -> str:
    assert told["code"] == code, told
    (line,) = (line for line in told["err"].splitlines() if line.startswith("error: "))
    assert "Traceback" not in told["err"]
    return str(line.removeprefix("error: "))


def _saved(folder: Path, **changes: Any) -> Path:
    """Save a Lorsa that was trained elsewhere."""
    facts: dict[str, Any] = {"d_model": 8, "n_qk_heads": 2, "d_qk_head": 4, "n_ov_heads": 6}
    facts |= {"top_k": 3, "scale": 0.5, "layer": 5, "base_model": "some/model"} | changes
    Lorsa(LorsaConfig(**facts)).save_pretrained(folder)
    return folder


def test_what_is_pushed_is_loaded_to_the_bit(hub: Hub, runs: Path, tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = [
        {"lorsa": ["push", runs / "layer-1", "--repo", "me/lorsas", "--dry-run"]},
        {"lorsa": ["push", runs / "layer-1", "--repo", "me/lorsas", "--license", "mit", "--json"]},
        {"load": "me/lorsas", "save": tmp_path / "got"},
        {"lorsa": ["push", runs / "layer-2", "--repo", "me/lorsas", "--message", "one more"]},
        {"load": "me/lorsas", "subfolder": "layer-2"},
        {"load": "me/lorsas"},
    ]
    planned, pushed, loaded, added, second, unclear = do(steps, url=hub.url, home=tmp_path / "home")
    assert planned["code"] == pushed["code"] == added["code"] == 0, (planned, pushed, added)
    assert loaded == {"layer": 1}
    assert second == {"layer": 2}
    assert "layer-1, layer-2: choose one" in unclear["error"]
    ours, theirs = (
        load_file(folder / "lorsa.safetensors") for folder in (runs / "layer-1", tmp_path / "got")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    repo = hub.repos["me/lorsas"]
    assert not repo.private
    first, *shas = repo.branches["main"]
    assert [repo.messages[sha] for sha in shas] == ["Lorsa of layer 1", "one more"]
    result = json.loads(pushed["out"])
    assert result["commit"] == shas[0]
    assert result["url"] == f"{hub.url}/me/lorsas"
    assert result["pushed"] == result["layers"] == [1]
    sent = {f"layer-1/{name}" for name in SENT} | {"README.md"}
    assert repo.commits[shas[0]].keys() == repo.commits[first].keys() | sent
    assert set(result["files"]) == sent
    assert {path for path, (_, lfs) in repo.commits[shas[0]].items() if lfs} == {
        "layer-1/lorsa.safetensors"
    }
    for path in sent - {"README.md"}:  # the second push left the first as it was
        assert repo.commits[shas[1]][path] == repo.commits[shas[0]][path]
    card = repo.files()["README.md"].decode()
    assert "\n| 1 | 256 " in card
    assert "\n| 2 | 256 " in card
    assert "\nlicense: mit\n" in card
    assert card.index("| 1 |") < card.index("| 2 |")
    assert "beside layers 1, which were there" in added["out"]
    dry = planned["out"].replace("\nlibrary_name: lorsa", "\nlibrary_name: lorsa\nlicense: mit", 1)
    assert repo.commits[shas[0]]["README.md"][0].decode() in dry


def test_a_dry_run_sends_nothing(hub: Hub, runs: Path, tmp_path: Path) -> None:
    words = ["push", runs / "layer-1", runs / "layer-2", "--repo", "me/lorsas", "--dry-run"]
    (told,) = do([{"lorsa": words}], url=hub.url, home=tmp_path / "home", token=None)
    assert told["code"] == 0, told
    assert hub.repos == {}
    assert {line.split()[0] for line in hub.requests} <= {"GET", "HEAD"}
    assert "nothing was sent" in told["out"]
    for layer in (1, 2):
        for name in SENT:
            assert f"layer-{layer}/{name}" in told["out"]


def test_a_layer_pushed_again_is_replaced_in_one_commit(
    hub: Hub, runs: Path, tmp_path: Path
) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    lorsa = Lorsa.from_pretrained(runs / "layer-1")
    lorsa.save_pretrained(first)
    with torch.no_grad():
        lorsa.W_O.mul_(2)
    lorsa.save_pretrained(again)
    push_to = ["--repo", "me/lorsas", "--private", "--revision", "draft"]
    steps: list[dict[str, Any]] = [
        {"lorsa": ["push", first, *push_to]},
        {"lorsa": ["push", again, *push_to]},
        {"load": "me/lorsas", "revision": "draft", "save": tmp_path / "got"},
        {"load": "me/lorsas"},
    ]
    one, two, loaded, main = do(steps, url=hub.url, home=tmp_path / "home")
    assert one["code"] == two["code"] == 0, (one, two)
    assert loaded == {"layer": 1}
    assert "holds no dictionary" in main["error"]  # the branch is one of its own
    got = load_file(tmp_path / "got/lorsa.safetensors")
    assert torch.equal(got["W_O"], lorsa.W_O)
    repo = hub.repos["me/lorsas"]
    assert repo.private
    assert len(repo.branches["main"]) == 1
    assert len(repo.branches["draft"]) == 3
    assert "stays as public or private" in two["err"]
    assert 'revision="draft"' in repo.files("draft")["README.md"].decode()


def test_what_the_hub_refuses_is_one_line(hub: Hub, runs: Path, tmp_path: Path) -> None:
    hub.make("you/lorsas")
    changed = hub.make("me/changed")
    hub.down, hub.gone = {"me/down"}, {"me/gone"}
    hub.meanwhile = lambda name: hub.repos[name].commit("main", {}, "of someone else")
    run = str(runs / "layer-1")
    here = {"lorsa": ["push", run, "--repo", "me/lorsas"]}
    steps: list[dict[str, Any]] = [
        {**here, "env": {"HF_TOKEN": None}},
        {**here, "env": {"HF_TOKEN": "hf_wrong"}},
        {**here, "env": {"HF_TOKEN": READER}},
        {"lorsa": ["push", run, "--repo", "you/lorsas"]},
        {"lorsa": ["push", run, "--repo", "you/lorsas", "--revision", "draft", "--json"]},
        {"lorsa": ["push", run, "--repo", "me/.."]},
        {"lorsa": ["push", run, "--repo", "me/changed"]},
        {"lorsa": ["push", run, "--repo", "me/down"]},
        {"lorsa": ["push", run, "--repo", "me/gone"]},
    ]
    told = do(steps, url=hub.url, home=tmp_path / "home")
    messages = [_error(step) for step in told]
    may_not = "the token may not do this; run hf auth login with one that may"
    assert messages[0].startswith("there is no token of the Hub; run: hf auth login, or set HF_TOK")
    assert messages[1].startswith("me/lorsas: the Hub does not accept the token")
    assert messages[2] == f"me/lorsas: {may_not}"
    assert messages[3] == messages[4] == f"you/lorsas: {may_not}"
    assert json.loads(told[4]["out"])["error"] == messages[4]
    assert messages[5].startswith("me/..: ")
    assert messages[6] == "me/changed was changed meanwhile; run the same command again"
    assert messages[7].startswith("me/down: the Hub answered ")
    assert messages[8] == "me/gone: the Hub cannot be reached; connect and try again"
    assert hub.repos.keys() == {"you/lorsas", "me/changed"}
    assert len(hub.repos["you/lorsas"].commits) == 1
    assert list(changed.messages.values()) == ["initial", "of someone else"]


def test_a_folder_gets_the_same_layout(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["push", str(runs / "layer-2"), str(runs / "layer-1"), "--repo", "./shared"]
    result = CliRunner().invoke(cli.app, [*words, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "shared").exists()
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    files = _files(tmp_path / "shared")
    assert set(files) == {f"layer-{n}/{name}" for n in (1, 2) for name in SENT} | {"README.md"}
    assert Lorsa.from_pretrained("shared", subfolder="layer-2").config.layer == 2
    ours, theirs = (
        load_file(folder / "layer-2/lorsa.safetensors") for folder in (runs, Path("shared"))
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert check_seal(Path("shared/layer-2")) == []
    code = files["README.md"].decode().split("```python\n")[1].split("```")[0]
    d_model = Lorsa.from_pretrained("shared", subfolder="layer-1").config.d_model
    names: dict[str, Any] = {"x": torch.randn(1, 4, d_model)}
    exec(code, names)
    assert names["y_hat"].shape == (1, 4, d_model)


def test_no_path_of_this_machine_is_reported(
    runs: Path, store_folder: Path, model_folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    """Of the store, the model and the text are folders here; only their names are told."""
    run = tmp_path / "a-run"
    shutil.copytree(runs / "layer-1", run)
    evaluate_run(EvalConfig(run=run, store=store_folder, model=str(model_folder), ce_tokens=64))
    assert str(model_folder) in (run / "config.json").read_text()
    assert str(text_folder) in (run / "run.json").read_text()
    push(PushConfig(runs=(run,), repo=str(tmp_path / "shared")))
    files = _files(tmp_path / "shared")
    for path, data in files.items():
        for part in ("/", str(tmp_path), str(Path.home())) if path.endswith(".json") else ("/tmp",):
            assert part.encode() not in data, f"{part} in {path}"
    facts = json.loads(files["layer-1/training.json"])
    assert facts["model"] == {"id": model_folder.name, "revision": None}
    assert facts["corpus"]["data"] == text_folder.name
    config = json.loads(files["layer-1/config.json"])["config"]
    assert config["base_model"] == model_folder.name
    assert b"base_model" not in files["README.md"]  # which would be a link to nowhere


def test_two_runs_of_one_layer_are_refused(tmp_path: Path) -> None:
    one, other = _saved(tmp_path / "one"), _saved(tmp_path / "other")
    with pytest.raises(PublishError, match="one and .*other are both of layer 5; push one"):
        push(PushConfig(runs=(one, other), repo=str(tmp_path / "shared")))
    assert not (tmp_path / "shared").exists()


def test_lorsas_of_another_model_are_refused(tmp_path: Path) -> None:
    shared = str(tmp_path / "shared")
    push(PushConfig(runs=(_saved(tmp_path / "one"),), repo=shared))
    before = _files(tmp_path / "shared")
    other = _saved(tmp_path / "other", base_model="other/model", layer=6)
    with pytest.raises(PublishError, match="layer 5 is of some/model, layer 6 is of other/model"):
        push(PushConfig(runs=(other,), repo=shared))
    assert _files(tmp_path / "shared") == before


def test_a_run_that_is_not_finished_is_refused(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "layer-1", run)
    change_json(run / "run.json", result=None)
    with pytest.raises(PublishError, match="run is not finished; the lorsa train command"):
        push(PushConfig(runs=(run,), repo=str(tmp_path / "shared")))


def test_damaged_weights_are_not_shared(tmp_path: Path) -> None:
    path = _saved(tmp_path / "one") / "lorsa.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = CliRunner().invoke(
        cli.app, ["push", str(path.parent), "--repo", str(tmp_path / "shared")]
    )
    assert _error({"code": result.exit_code, "err": result.stderr}).startswith(f"{path} is damaged")
    assert not (tmp_path / "shared").exists()


def test_a_checkpoint_is_shared_with_what_is_known_of_it(runs: Path, tmp_path: Path) -> None:
    step = tmp_path / "run/checkpoints/step-000000002"
    Lorsa.from_pretrained(runs / "layer-1").save_pretrained(step)
    shutil.copy(runs / "layer-1/run.json", tmp_path / "run")
    result = push(PushConfig(runs=(step,), repo=str(tmp_path / "shared")))
    assert result.layers == [1]
    facts = json.loads((tmp_path / "shared/layer-1/training.json").read_text())
    assert facts["trained"] is None  # what the run became is not what this is
    assert facts["shape"]["n_ov_heads"] == 256


def test_a_lorsa_of_no_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match="one does not say which layer it replaces"):
        push(PushConfig(runs=(_saved(tmp_path / "one", layer=None),), repo=str(tmp_path / "s")))


def test_a_lorsa_that_reads_something_else_is_refused(tmp_path: Path) -> None:
    one = _saved(tmp_path / "one", hook_in="blocks.5.ln1.hook_normalized")
    with pytest.raises(PublishError, match=r"one reads blocks.5.ln1.hook_normalized, not the"):
        push(PushConfig(runs=(one,), repo=str(tmp_path / "shared")))


def test_a_lorsa_in_another_format_is_refused(tmp_path: Path) -> None:
    lorsa = Lorsa.from_pretrained(_saved(tmp_path / "one"))
    write_llamascopium(lorsa.saved(), tmp_path / "theirs")
    with pytest.raises(PublishError, match="theirs is in another tool's format; type: lorsa conv"):
        push(PushConfig(runs=(tmp_path / "theirs",), repo=str(tmp_path / "shared")))
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("README.md", "---\nlibrary_name: transformers\n---\n", "of the library transformers"),
        ("README.md", "---\na: [\n---\n", "README.md there cannot be read .*; repair it"),
        ("layer-3/training.json", "{", "layer-3/training.json there cannot be read"),
        ("layer-3/training.json", '{"format": 1, "schema_version": 1, "layer": 3}', "of another"),
    ],
)
def test_what_is_there_and_cannot_be_read_is_left_alone(
    tmp_path: Path, path: str, content: str, message: str
) -> None:
    file = tmp_path / "shared" / path
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(PublishError, match=message):
        push(PushConfig(runs=(_saved(tmp_path / "one"),), repo=str(tmp_path / "shared")))
    assert set(_files(tmp_path / "shared")) == {path}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repo": "lorsas"}, "repo is 'lorsas'; allowed: owner/name on the Hub"),
        ({"repo": "a/b/c"}, "allowed: owner/name"),
        ({"repo": "https://huggingface.co/me/lorsas"}, "allowed: owner/name"),
        ({"repo": "./here", "private": True}, "private is True, which a folder"),
        ({"repo": "./here", "revision": "draft"}, "revision is 'draft', which a folder"),
        ({"repo": "./here", "message": "hello"}, "message is 'hello', which a folder"),
        ({"license": "MIT: yes"}, "license is 'MIT: yes'; allowed"),
        ({"runs": ()}, "runs are empty"),
    ],
)
def test_a_wrong_request_names_the_setting(changes: dict[str, Any], message: str) -> None:
    base = PushConfig(runs=(Path("runs/layer-1"),), repo="me/lorsas")
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(base, **changes)


def test_the_command_line_says_a_wrong_request_with_code_2() -> None:
    result = CliRunner().invoke(cli.app, ["push", "runs/layer-1", "--repo", "lorsas"])
    told = {"code": result.exit_code, "err": result.stderr}
    assert _error(told, code=2).startswith("repo is 'lorsas'; allowed: owner/name on the Hub")


def test_dictionaries_of_every_kind_are_shared_together(
    runs: Path, store_folder: Path, tmp_path: Path
) -> None:
    store, out = with_sites(store_folder, tmp_path / "acts"), tmp_path / "runs"
    some = settings(store, train_tokens=512)
    kinds: dict[str, dict[str, Any]] = {
        "1.mlp": {"kind": "transcoder", "skip": True},
        "1.resid_out": {"kind": "sae"},
    }
    train_many([TrainConfig(**some | own, out=out / name) for name, own in kinds.items()])
    evaluate_run(EvalConfig(run=out / "1.mlp", store=store))
    shared = tmp_path / "shared"
    push(PushConfig(runs=(out / "1.resid_out", runs / "layer-2"), repo=str(shared)))
    found = push(PushConfig(runs=(out / "1.mlp",), repo=str(shared)))
    assert (found.pushed, found.layers) == ([1], [1, 2])
    assert found.folders == ["1.mlp", "1.resid_out", "layer-2"]
    assert set(_files(shared)) == {f"{name}/{file}" for name in found.folders for file in SENT} | {
        "README.md"
    }
    for name in kinds:
        ours, theirs = load(out / name), load(shared, subfolder=name)
        assert type(ours) is type(theirs)
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    verified = verify_paths([shared])
    assert verified["ok"]
    assert {each["kind"] for each in verified["found"]} == {"transcoder", "SAE", "Lorsa"}
    again = CliRunner().invoke(cli.app, ["push", str(runs / "layer-1"), "--repo", str(shared)])
    assert "beside layers 2, 1.mlp, 1.resid_out, which were there" in again.stdout


def test_two_runs_of_one_place_are_refused(store_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        config = TranscoderConfig(d_model=8, n_features=9, top_k=3, layer=5, base_model="a/b")
        Transcoder(config).save_pretrained(tmp_path / name)
    with pytest.raises(PublishError, match=r"are both of 5\.mlp; push one of them"):
        push(PushConfig(runs=(tmp_path / "one", tmp_path / "other"), repo=str(tmp_path / "x")))
