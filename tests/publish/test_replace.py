"""A layer in a folder is replaced as one: a killed push leaves the old one or the new one."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.errors import CheckpointError, PublishError
from lorsa.publish import replace
from lorsa.publish.config import PushConfig
from lorsa.publish.push import push
from lorsa.publish.replace import replaced
from lorsa.seal import check_seal, is_sealed
from lorsa.whole import lock_folder
from safetensors.torch import load_file, save_file
from unseal import change_json, unseal

LAYER = 5
KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
from lorsa.publish import replace
from lorsa.publish.config import PushConfig
from lorsa.publish.push import push

root, name = Path(sys.argv[1]), sys.argv[2]
if sys.argv[3] == "without exchange":
    replace._exchange = lambda one, other: False

def read(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else None

def run(module, call, at):
    real, left = getattr(module, call), at
    def counted(*words, **named):
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*words, **named)
    setattr(module, call, counted)
    push(PushConfig(runs=(root / "two",), repo=str(root / "repo")))
    os._exit(0)

states = {"old": read(root / "of-one" / name), "new": read(root / "of-two" / name), "none": None}
for state in ("old", "new"):
    states[state]["notes.txt"] = b"mine"
for module, call in ((os, "replace"), (os, "link"), (os, "unlink"), (os, "mkdir"), (os, "fsync"),
                     (shutil, "copyfile"), (shutil, "rmtree")):
    for at in range(1, 20):
        shutil.rmtree(root / "repo", ignore_errors=True)
        shutil.copytree(root / "of-one", root / "repo")
        (root / "repo" / name / "notes.txt").write_text("mine")
        child = os.fork()
        if not child:
            run(module, call, at)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = read(root / "repo" / name)
        after = [state for state, files in states.items() if files == found]
        push(PushConfig(runs=(root / "two",), repo=str(root / "repo")))
        again = read(root / "repo" / name) == states["new"]
        names = sorted(p.name for p in (root / "repo").iterdir())
        print(json.dumps([call, ended, after, again, names]))
        if ended == 0:
            break
"""


def _save(folder: Path, scale: float, *, layer: int = LAYER) -> Path:
    config = LorsaConfig(d_model=4, n_qk_heads=1, d_qk_head=2, n_ov_heads=2, top_k=1, scale=scale,
                         layer=layer, base_model="some/model")  # fmt: skip
    torch.manual_seed(int(scale * 10))
    Lorsa(config).save_pretrained(folder)
    return folder


def _read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("how", ["with exchange", "without exchange"])
def test_a_killed_push_leaves_the_old_or_the_new(tmp_path: Path, how: str) -> None:
    """Files were replaced one by one: a kill in between left the new config.json with the old
    weights, which loaded. Where a disk cannot exchange folders there may be none, never half."""
    for name, scale in (("one", 0.5), ("two", 1.0)):
        run = _save(tmp_path / name, scale)
        push(PushConfig(runs=(run,), repo=str(tmp_path / f"of-{name}")))
    words = [sys.executable, "-c", KILLED, str(tmp_path), f"layer-{LAYER}", how]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    ends = Counter((call, ended) for call, ended, *_ in results)
    assert ends["replace", -signal.SIGKILL] >= 2 - (how == "with exchange")
    assert ends["fsync", -signal.SIGKILL] > 5
    for call, ended, found, again, names in results:
        assert ended in (0, -signal.SIGKILL), call
        assert found in (
            [["old"], ["new"]] if how == "with exchange" else [["old"], ["new"], ["none"]]
        )
        assert ended != 0 or found == ["new"]
        assert again, "what a kill left was in the way, or another's file is lost"
        assert names == ["README.md", f"layer-{LAYER}"]
    states = {found[0] for _, _, found, *_ in results}
    assert states == ({"old", "new"} if how == "with exchange" else {"old", "new", "none"})


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    folder = tmp_path / "layer-1"
    folder.mkdir()
    (folder / "a").write_text("old")

    def fail() -> None:
        with replaced(folder) as partial:
            (partial / "a").unlink()
            (partial / "a").write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert _read(folder) == {"a": b"old"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_disk_that_fails_in_between_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an exchange, a failed second rename removed the old layer with the new one."""
    folder = tmp_path / "layer-1"
    folder.mkdir()
    (folder / "a").write_text("old")
    real, calls = os.replace, Counter[str]()

    def failing(source: Path, target: Path) -> None:
        calls["replace"] += 1
        if calls["replace"] == 2:
            raise OSError(116, "Stale file handle")
        real(source, target)

    monkeypatch.setattr(replace, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="Stale"), replaced(folder) as partial:
        (partial / "b").write_text("new")
    assert _read(folder) == {"a": b"old"}
    assert list(tmp_path.iterdir()) == [folder]


def test_what_was_put_aside_is_seen_again(tmp_path: Path) -> None:
    """After a kill in between, a push of another layer wrote a card without this one."""
    aside = tmp_path / f"layer-1{replace.ASIDE}"
    aside.mkdir()
    (aside / "a").write_text("old")
    replace.put_all_back(tmp_path)
    assert _read(tmp_path / "layer-1") == {"a": b"old"}


@pytest.mark.parametrize("exchange", [True, False])
def test_other_files_of_a_layer_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(replace, "_exchange", lambda one, other: False)
    folder = tmp_path / "layer-1"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner/mine").write_text("mine")
    (folder / "link").symlink_to("inner/mine")
    with replaced(folder) as partial:
        (partial / "new").write_text("new")
    assert (folder / "inner/mine").read_text() == (folder / "link").read_text() == "mine"
    assert (folder / "link").is_symlink()
    assert (folder / "new").read_text() == "new"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "layer-1").symlink_to("elsewhere")
    with replaced(tmp_path / "layer-1") as partial:
        (partial / "new").write_text("new")
    assert (tmp_path / "layer-1").is_symlink()
    assert (tmp_path / "elsewhere/new").exists()


def test_a_second_push_to_a_folder_is_refused(tmp_path: Path) -> None:
    """Two pushes at once would write one partial folder."""
    run, repo = _save(tmp_path / "one", 0.5), tmp_path / "shared"
    repo.mkdir()
    handle = lock_folder(repo)
    assert handle is not None
    with pytest.raises(PublishError, match="another process pushes to .*shared; run the same"):
        push(PushConfig(runs=(run,), repo=str(repo)))
    assert list(repo.iterdir()) == []
    os.close(handle)
    push(PushConfig(runs=(run,), repo=str(repo)))


def test_what_is_pushed_is_sealed_and_bound(tmp_path: Path) -> None:
    """Weights that another tool wrote anew have no checksums; what is shared always has."""
    run = _save(tmp_path / "one", 0.5)
    tensors = load_file(run / "lorsa.safetensors")
    tensors["W_O"] = -tensors["W_O"]
    save_file(tensors, run / "lorsa.safetensors")
    push(PushConfig(runs=(run,), repo=str(tmp_path / "shared")))
    layer = tmp_path / f"shared/layer-{LAYER}"
    assert is_sealed(layer)
    assert check_seal(layer) == []
    assert torch.equal(load_file(layer / "lorsa.safetensors")["W_O"], tensors["W_O"])
    other = _read(_save(tmp_path / "two", 1.0))
    (layer / "config.json").write_bytes(other["config.json"])
    with pytest.raises(CheckpointError, match="config.json is damaged, or not the one"):
        Lorsa.from_pretrained(layer)
    (problem,) = check_seal(layer)
    assert "config.json" in problem


def test_a_flipped_bit_is_not_shared(tmp_path: Path) -> None:
    """A push shared damaged weights with a fresh checksum of the damage."""
    path = _save(tmp_path / "one", 0.5) / "lorsa.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        push(PushConfig(runs=(path.parent,), repo=str(tmp_path / "shared")))
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": None}, "model is None"),
        ({"shape": {"d_model": "8"}}, "shape.d_model is '8'"),
        ({"corpus": {"data": "x"}}, "corpus.data_config is missing"),
        ({"trained": {"fvu": "<b>"}}, "trained.fvu is '<b>'"),
        ({"versions": {"lorsa": 3}}, "versions.lorsa is 3"),
        ({"evaluated": {"cross_entropy": [1]}}, r"evaluated.cross_entropy is \[1\]"),
        ({"command": ["a"]}, r"command is \['a'\]"),
    ],
)
def test_facts_of_others_are_of_their_kind(
    tmp_path: Path, change: dict[str, object], told: str
) -> None:
    """A training.json that was there, of whomever, ended a push in a traceback."""
    repo = tmp_path / "shared"
    push(PushConfig(runs=(_save(tmp_path / "one", 0.5),), repo=str(repo)))
    path = repo / f"layer-{LAYER}/training.json"
    unseal(path.parent)
    change_json(path, **change)
    other = _save(tmp_path / "two", 1.0, layer=6)
    with pytest.raises(PublishError, match=rf"training.json there cannot be read \({told}\)"):
        push(PushConfig(runs=(other,), repo=str(repo)))


def test_a_license_that_is_taken_over_is_said(tmp_path: Path) -> None:
    """It comes from a card that anybody may edit, and went into the next one without a word."""
    repo, told = tmp_path / "shared", []
    push(PushConfig(runs=(_save(tmp_path / "one", 0.5),), repo=str(repo), license="mit"))
    other = _save(tmp_path / "two", 1.0, layer=6)
    push(PushConfig(runs=(other,), repo=str(repo)), report=told.append)
    assert told == ["the license stays mit, as the README.md there says"]
