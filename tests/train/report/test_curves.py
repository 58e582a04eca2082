"""Pictures are drawn whatever a run has measured; one that is long, short or torn must not fail."""

import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from lorsa.errors import TrainError
from lorsa.train.report.curves import draw_curves, draw_pareto

STEP = {"loss": 0.3, "lr": 1e-3, "top_k": 64, "dead_fraction": 0.1}
LOOK = {"fvu": 0.3, "fvu_all": 0.31, "dead_fraction": 0.2, "masked_fraction": 0.0}


def _run(root: Path, lines: list[dict[str, Any]]) -> Path:
    root.mkdir()
    header = {"config": {"layer": 3, "top_k": 64, "n_ov_heads": None}, "result": None}
    (root / "run.json").write_text(json.dumps(header))
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def _size(path: Path) -> tuple[int, ...]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def _step(tokens: int, **changes: Any) -> dict[str, Any]:
    return {"step": tokens, "tokens": tokens, **STEP, **changes}


def _look(tokens: int, **changes: Any) -> dict[str, Any]:
    return {"step": tokens, "tokens": tokens, "held_out": {**LOOK, **changes}}


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [_step(10)],
        [_look(0)],
        [_step(10, loss=None), _step(20, loss=0.0), _look(20, fvu=None)],
        [_look(0, masked_fraction=0.1), *(_step(t) for t in range(10, 200, 10)), _look(200)],
        [_step(10, loss=100.0), _step(20, loss=0.01), _look(0, fvu=30.0), _look(20, fvu=0.2)],
    ],
    ids=["nothing", "a-step", "an-eval", "no-numbers", "masked", "wide"],
)
def test_any_run_can_be_drawn(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    path = draw_curves(_run(tmp_path / "layer-3", lines))
    assert path == tmp_path / "layer-3/curves.png"
    assert min(_size(path)) > 500
    assert "matplotlib.pyplot" not in sys.modules  # it would keep every figure, and want a screen


def test_a_run_without_metrics_can_be_drawn(tmp_path: Path) -> None:
    run = _run(tmp_path / "layer-3", [])
    (run / "metrics.jsonl").unlink()
    _size(draw_curves(run))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="is no run folder"):
        draw_curves(tmp_path)
    run = _run(tmp_path / "layer-3", [])
    (run / "metrics.jsonl").write_text("{torn")
    with pytest.raises(TrainError, match="cannot be drawn"):
        draw_curves(run)


@pytest.mark.parametrize("n_rows", [0, 1, 2, 40])
def test_any_rows_can_be_drawn(tmp_path: Path, n_rows: int) -> None:
    rows: list[dict[str, Any]] = [
        {"top_k": 8 << i % 4, "lr": 1e-3 * (1 + i // 4), "fvu": 1 / (i + 2), "l0": 8 << i % 4}
        for i in range(n_rows)
    ]
    rows += [{"top_k": 9, "lr": 1.0, "fvu": None, "error": "too many heads"}]
    rows += [{"top_k": 9, "lr": 1.0, "fvu": math.nan, "l0": 3.0}]
    _size(draw_pareto(rows, tmp_path / "pareto.png"))
    assert [p.name for p in tmp_path.iterdir()] == ["pareto.png"]
