"""Facts of a store for people, finished or not."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lorsa.errors import StoreError
from lorsa.store.care.info import format_bytes, store_info
from lorsa.store.care.repair import verify_store
from small import create, edit_manifest, fill, make_manifest

MakeStore = Callable[..., Path]


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (2304, "2.3 kB"),
        (999_700, "1 MB"),
        (469e6, "469 MB"),
        (5.2e12, "5.2 TB"),
    ],
)
def test_bytes_for_people(n_bytes: float, text: str) -> None:
    assert format_bytes(n_bytes) == text


def test_a_finished_store_has_nothing_to_do(make_store: MakeStore) -> None:
    info = store_info(make_store())
    assert info["complete"]
    assert info["next"] is None
    assert (info["n_tokens"], info["n_missing_tokens"]) == (22 * 6, 0)
    assert sum(layer["n_bytes"] for layer in info["layers"].values()) < info["n_bytes"]


def test_an_unfinished_store_says_what_is_there_and_how_to_go_on(tmp_path: Path) -> None:
    root = tmp_path / "my acts"
    request = {"model": "tiny", "n_ctx": 6, "text_column": "text", "tokens": None}
    request |= {"force": False, "keep_nonfinite": True}
    with create(root, make_manifest(request=request)) as writer:
        fill(writer, [0, 5])
        info = store_info(root)  # also while it is being written
    assert not info["complete"]
    assert (info["n_shards"], info["n_missing_shards"]) == (6, 4)
    assert info["n_missing_tokens"] == 16 * 6
    assert info["layers"]["3"]["n_bytes"] > 0
    assert shlex.split(info["next"]) == [
        *("lorsa", "harvest", "--model", "tiny", "--layers", "0,3", "--store", str(root)),
    ]  # the other settings are as the store has them


def test_a_store_that_lost_a_file_is_not_complete(make_store: MakeStore) -> None:
    root = make_store()
    (root / "layers/3/attn_in/c/1/0/0").unlink()
    info = store_info(root)
    assert not info["complete"]
    assert info["n_missing_shards"] == 1
    assert info["next"].startswith("lorsa harvest ")
    edit_manifest(root, request={"merged": 5, 7: None})
    (root / "journal/plan.json").unlink()
    assert verify_store(root)["next"] == f"lorsa store verify {root} --repair"
    assert store_info(root)["next"] is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {}},
        {"corpus": {}},
        {
            "modules": {
                "0.attention": {"weights": ["W_Q"], "geometry": {"n_heads": 3}},
                "3.attention": {"weights": []},
            }
        },
        {"modules": {"0.attention": {"weights": ["W_Q"], "geometry": [1]}}},
    ],
)
def test_facts_that_are_not_there_are_one_line(
    make_store: MakeStore, changes: dict[str, Any]
) -> None:
    root = make_store()
    edit_manifest(root, **changes)
    with pytest.raises(
        StoreError,
        match="lacks facts of|geometry of the module is",
    ):
        store_info(root)


def test_a_folder_that_is_no_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is no activation store"):
        store_info(tmp_path)
    with pytest.raises(StoreError, match="does not exist; make a store with: lorsa harvest"):
        store_info(tmp_path / "nowhere")
