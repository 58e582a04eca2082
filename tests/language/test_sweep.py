"""A sample of benchmarks/sweep_models.py: architectures end with exact sites or in one line."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "sweep_models.py"

EXACT = {
    "bamba": [1, 3],
    "dbrx": [0, 1, 2, 3],
    "gemma3n_text": [0, 1, 2, 3],
    "gpt_oss": [0, 1, 2, 3],
}
REFUSED = {
    "bloom": "is not what the layer adds",
    "rwkv": "no attention that lorsa can find",
    "zamba2": "is not what the layer adds",
}


@pytest.fixture(scope="module")
def sweep() -> Any:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("sweep_models", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", EXACT)
def test_sites_are_exact(sweep: Any, kind: str) -> None:
    """Hybrids and models that are made for their depth ended in a traceback, or not at all."""
    found = sweep.sweep(kind)
    assert {case: end.kind for case, end in found.items()} == {
        "all": "exact",
        "one": "exact",
        "headless": "exact",
        "adapter": "refused",
    }
    assert [*map(int, json.loads(found["all"].what))] == EXACT[kind]
    assert [*map(int, json.loads(found["one"].what))] == EXACT[kind][-1:]
    assert "adapter" in found["adapter"].what


@pytest.mark.parametrize("kind", REFUSED)
def test_others_end_in_a_line(sweep: Any, kind: str) -> None:
    for end in sweep.sweep(kind).values():
        assert end.kind == "refused"
        assert REFUSED[kind] in end.what or "adapter" in end.what


def test_a_fault_is_told_from_a_refusal(sweep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep itself must be able to fail."""

    def broken(config: Any) -> None:
        raise KeyError(config.layers)

    monkeypatch.setattr(sweep, "harvest", broken)
    assert [end.kind for end in sweep.sweep("gpt_oss").values()] == ["fault"] * 4
