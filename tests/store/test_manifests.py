"""Manifests of format 2 from strangers: what cannot be is refused in one line as it is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lorsa.errors import StoreError
from lorsa.store.manifest import MANIFEST, read_manifest
from sited import with_sites
from unseal import change_json

ORIGIN = {"from": ["1.mlp_in"], "by": "1.mlp"}


@pytest.fixture(scope="module")
def sited(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_sites(store_folder, tmp_path_factory.mktemp("sited") / "acts")


def _put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_put("sites", "../x", value={"width": 3, "derived": None}), r"'\.\./x' is no site"),
        (_put("sites", "1.mlp_in", "width", value=True), "width of 1.mlp_in is True"),
        (_put("sites", "1.mlp_in", "norms", value="pair"), "norms of 1.mlp_in are in no pair"),
        (_put("sites", "1.mlp_in", "derived", value=ORIGIN), "from 1.mlp_in, which is not stored"),
        (_put("sites", "1.mlp_out", "derived", value=ORIGIN | {"by": "9.mlp"}), "which is not"),
        (_put("sites", "5.mlp_in", value={"width": 3, "derived": None}), "5.mlp, which is not"),
        (_put("modules", "../../1.mlp", value={"weights": []}), "is no module"),
        (_put("modules", "1.mlp", "weights", value=["../../x"]), "has weights"),
        (_put("modules", "1.mlp", "weights", value=[True]), "has weights"),
        (_put("modules", "1.block", "parts", value=[["a"]]), "parts"),
        (_put("modules", "1.block", "lacks", value="resid_mid"), "lacks of the module"),
        (_put("model", "n_layers", value="3"), "n_layers of the model"),
        (_put("sites", value=[]), "list"),
    ],
)
def test_what_cannot_be_is_refused(
    sited: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    content = json.loads((sited / MANIFEST).read_text())
    change(content)
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    change_json(tmp_path / MANIFEST)
    with pytest.raises(StoreError, match=f"does not describe a store .*{message}") as error:
        read_manifest(tmp_path / MANIFEST)
    assert len(str(error.value).splitlines()) == 1
