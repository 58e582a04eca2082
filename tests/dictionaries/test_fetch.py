"""Lorsas from folders of several and from the Hub, which is a stub on loopback."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stub import READER, Hub, do
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.errors import CheckpointError
from safetensors.torch import load_file

CONFIG = LorsaConfig(
    d_model=8, n_qk_heads=2, d_qk_head=4, n_ov_heads=6, top_k=3, scale=0.5, layer=3
)


def _save(folder: Path, layer: int = 3) -> Lorsa:
    lorsa = Lorsa(dataclasses.replace(CONFIG, layer=layer))
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.normal_()
    lorsa.save_pretrained(folder)
    return lorsa


def _files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two layers, with files beside that nobody is to fetch."""
    folder = tmp_path_factory.mktemp("several")
    for layer in (12, 3):
        _save(folder / f"layer-{layer}", layer)
        (folder / f"layer-{layer}/final.pth").write_bytes(b"pickled")
        (folder / f"layer-{layer}/code.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    return folder


@pytest.fixture(scope="module")
def hub(several: Path) -> Iterator[Hub]:
    with Hub() as server:
        server.put("me/several", _files(several))
        server.put("me/one", {f"layer-3/{n}": d for n, d in _files(several / "layer-3").items()})
        draft = {n: (d, True) for n, d in _files(several / "layer-12").items()}
        server.repos["me/one"].commit("draft", draft, "draft")
        server.put("me/gated", _files(several / "layer-3"), gated=True)
        server.put("me/private", _files(several / "layer-3"), private=True)
        server.put("me/empty", {"README.md": b"nothing yet"})
        server.down, server.gone = {"me/down"}, {"me/gone"}
        yield server


def test_a_folder_of_one_subfolder_is_that_lorsa(tmp_path: Path) -> None:
    _save(tmp_path / "runs/layer-3")
    _save(tmp_path / "runs/layer-4.partial")
    assert Lorsa.from_pretrained(tmp_path / "runs").config.layer == 3
    assert Lorsa.from_pretrained(str(tmp_path / "runs")).config.layer == 3


def test_a_subfolder_is_chosen(several: Path) -> None:
    assert Lorsa.from_pretrained(several, subfolder="layer-12").config.layer == 12
    with pytest.raises(CheckpointError, match="has no folder layer-5; it holds layer-3, layer-12$"):
        Lorsa.from_pretrained(several, subfolder="layer-5")


def test_a_folder_of_several_names_them_in_order(several: Path) -> None:
    message = rf"{several} holds several dictionaries, layer-3, layer-12: give .*{several}/layer-3$"
    with pytest.raises(CheckpointError, match=message):
        Lorsa.from_pretrained(several)


@pytest.mark.parametrize("subfolder", ["../secret", "/etc", "layer-*", "a/../b", "", "."])
def test_a_subfolder_is_inside(several: Path, subfolder: str) -> None:
    with pytest.raises(ValueError, match="allowed: a folder inside"):
        Lorsa.from_pretrained(several, subfolder=subfolder)


def test_a_folder_has_no_revision(several: Path) -> None:
    with pytest.raises(ValueError, match="revision is 'main'; .* is a folder"):
        Lorsa.from_pretrained(str(several), revision="main")


def test_a_path_is_never_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands take paths: a slip of the pen is to be said at once."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="^runs/layer-3 holds no dictionary .*no such folder"):
        Lorsa.from_pretrained(Path("runs/layer-3"))


def test_a_repository_gives_the_same_bits_and_nothing_else_is_fetched(
    hub: Hub, several: Path, tmp_path: Path
) -> None:
    hub.requests.clear()
    step = {"load": "me/several", "subfolder": "layer-12", "save": tmp_path / "got"}
    assert do([step], url=hub.url, home=tmp_path / "home") == [{"layer": 12}]
    assert hub.fetched() == ["layer-12/config.json", "layer-12/lorsa.safetensors"]
    pushed = load_file(several / "layer-12/lorsa.safetensors")
    got = load_file(tmp_path / "got/lorsa.safetensors")
    assert got.keys() == pushed.keys()
    assert all(torch.equal(got[name], pushed[name]) for name in pushed)


def test_what_a_repository_holds_decides(hub: Hub, tmp_path: Path) -> None:
    main = hub.repos["me/one"].branches["main"][-1]
    steps: list[dict[str, Any]] = [
        {"load": "me/private", "token": READER},  # before they are in the cache
        {"load": "me/one", "token": "hf_wrong"},
        {"load": "me/one"},
        {"load": "me/one", "revision": "draft"},
        {"load": "me/one", "revision": main},
        {"load": "me/private"},
        {"load": "me/several"},
        {"load": "me/several", "subfolder": "layer-7"},
        {"load": "me/empty"},
        {"load": "me/one", "revision": "v9"},
        {"load": "me/missing"},
        {"load": "me/gated"},
        {"load": "me/down"},
        {"load": "me/gone"},
    ]
    told = do(steps, url=hub.url, home=tmp_path / "home")
    assert [step.get("layer") for step in told[2:6]] == [3, 12, 3, 3]
    errors = [step["error"] for step in told[6:] + told[:2]]
    assert not any("\n" in error for error in errors)
    assert errors[0] == (
        "me/several holds several dictionaries, layer-3, layer-12: choose one, as subfolder layer-3"
    )
    assert errors[1] == (
        "me/several holds no dictionary in layer-7 (layer-7/config.json is missing); "
        "look at its files on the Hub"
    )
    assert errors[2] == (
        "me/empty holds no dictionary (config.json is missing); look at its files on the Hub"
    )
    assert errors[3] == (
        "me/one is no folder here; me/one has no revision v9; give a branch, tag or commit of it"
    )
    missing = "is not on the Hub, or is private: check the spelling, or run: hf auth login"
    assert errors[4] == f"me/missing is no folder here; me/missing {missing}"
    assert errors[5].endswith(
        "me/gated is gated; accept its terms on the Hub and run: hf auth login"
    )
    assert "me/down: the Hub answered " in errors[6]
    assert "503" in errors[6]
    assert errors[7].endswith("me/gone: the Hub cannot be reached; connect and try again")
    assert errors[8] == f"me/private is no folder here; me/private {missing}"
    assert errors[9] == (
        "me/one is no folder here; me/one: the Hub does not accept the token; "
        "run: hf auth login, or correct HF_TOKEN"
    )


def test_what_was_fetched_is_there_without_a_network(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert do([{"load": "me/one"}], url=hub.url, home=home) == [{"layer": 3}]
    steps: list[dict[str, Any]] = [{"load": "me/one"}, {"load": "me/several", "subfolder": "a"}]
    nowhere = "http://127.0.0.1:9"
    there, gone = do(steps, url=nowhere, home=home)
    assert there == {"layer": 3}
    assert gone["error"].endswith("me/several: the Hub cannot be reached; connect and try again")
    there, gone = do(steps, url=nowhere, home=home, HF_HUB_OFFLINE="1")
    assert there == {"layer": 3}
    assert "HF_HUB_OFFLINE forbids to ask the Hub" in gone["error"]


def test_convert_fetches_one_of_several(hub: Hub, several: Path, tmp_path: Path) -> None:
    out = tmp_path / "ours"
    words = ["convert", "me/several", out]
    steps: list[dict[str, Any]] = [
        {"lorsa": words},
        {"lorsa": [*words, "--subfolder", "layer-12"]},
        {"lorsa": ["convert", "me/one", tmp_path / "draft", "--revision", "draft"]},
    ]
    none, one, draft = do(steps, url=hub.url, home=tmp_path / "home")
    assert none["code"] == 1
    assert none["err"].endswith("layer-3, layer-12: choose one, as subfolder layer-3\n")
    assert (one["code"], draft["code"]) == (0, 0), (one, draft)
    for folder in (out, tmp_path / "draft"):
        found, whole = (
            load_file(path / "lorsa.safetensors") for path in (folder, several / "layer-12")
        )
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in whole)
