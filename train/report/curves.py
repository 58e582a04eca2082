"""Pictures of metrics: the curves of a run, and FVU against L0 of many runs.

matplotlib is loaded when a picture is drawn, and draws into a file without a screen.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ...errors import TrainError
from ...seal import read_summed, unsummed
from ...whole import whole
from ..recipe import by_place

CURVES = "curves.png"
COLOURS = ("#2f6fb0", "#d1622b", "#2e8b57", "#8757a8", "#b8860b", "#c23b60", "#4aa3a3", "#6b6b6b")
DPI = 130
MARKERS = "osD^vPX*"
WIDE = 10
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""

Line = dict[str, Any]
Row = Mapping[str, Any]


def draw_curves(run: Path, result: Row | None = None) -> Path:
    """Draw loss, held-out FVU, dead features, learning rate and top_k of a run over its tokens.

    Args:
        run: run folder, with run.json and metrics.jsonl.
        result: of a run whose run.json does not have it yet.

    Returns:
        The picture, RUN/curves.png.

    Raises:
        TrainError: run.json or metrics.jsonl cannot be read.
    """
    lines, title = _read(run, result)
    steps = [line for line in lines if "loss" in line]
    evals = [{**line["held_out"], "tokens": line["tokens"]} for line in lines if "held_out" in line]
    figure = _figure(9.5, 6.4)
    figure.subplots_adjust(left=0.07, right=0.94, bottom=0.08, top=0.88, wspace=0.2, hspace=0.2)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    loss, fvu, dead, schedule = figure.subplots(2, 2, sharex=True).flat
    _curve(loss, steps, "loss", "loss of the last step", COLOURS[0], log=True)
    _dress(loss, "loss")
    _draw_fvu(fvu, evals)
    _draw_dead(dead, steps, evals)
    _draw_schedule(schedule, steps)
    schedule.set_xlim(0, max([1, *(line["tokens"] for line in (*steps, *evals))]) * 1.02)
    for axes in (dead, schedule):
        axes.set_xlabel("training tokens")
        axes.xaxis.set_major_formatter(_tokens)
    return _save(figure, run / CURVES)


def _draw_fvu(axes: Any, evals: Sequence[Row]) -> None:
    masked = any(each.get("masked_fraction") for each in evals)
    _curve(axes, evals, "fvu", "tokens that count" if masked else "FVU", COLOURS[1], marker="o")
    if masked:
        _curve(axes, evals, "fvu_all", "all tokens", COLOURS[3], marker="o")
    _last_value(axes, evals)
    _dress(axes, "FVU on held-out tokens")


def _draw_dead(axes: Any, steps: Sequence[Row], evals: Sequence[Row]) -> None:
    _curve(axes, steps, "dead_fraction", "in the last tokens, in training", COLOURS[2])
    _curve(axes, evals, "dead_fraction", "silent in an eval", COLOURS[7], marker="o", style=":")
    _dress(axes, "dead features")
    axes.yaxis.set_major_formatter(_percent)
    axes.set_ylim(bottom=0)


def _draw_schedule(axes: Any, steps: Sequence[Row]) -> None:
    """Draw learning rate and top_k, each on an axis in the colour of its curve."""
    _curve(axes, steps, "lr", "learning rate", COLOURS[0])
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    _dress(axes, "learning rate and top_k")
    axes.tick_params(axis="y", colors=COLOURS[0])
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    _curve(right, steps, "top_k", "top_k", COLOURS[1])
    right.set_ylim(bottom=0)
    right.tick_params(labelsize=8, colors=COLOURS[1])
    right.spines["top"].set_visible(False)
    if drawn := [*axes.lines, *right.lines]:
        names = [line.get_label() for line in drawn]
        axes.legend(drawn, names, loc="lower left", frameon=False, fontsize=8)


def draw_pareto(rows: Sequence[Row], path: Path) -> Path:
    """Draw FVU against L0: a point for every run, a line for runs that differ in top_k alone.

    Args:
        rows: a row per run: the settings that differ, then "fvu", "l0" and others; rows without
            either are left out.
        path: file of the picture.

    Returns:
        The picture, `path`.
    """
    settings = _settings(rows)
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if _is_number(row.get("fvu")) and _is_number(row.get("l0")):
            named = [f"{name} {_short(row[name])}" for name in settings if name != "top_k"]
            lines.setdefault(", ".join(named), []).append(row)
    figure = _figure(7.6, 5.0, layout="constrained")
    axes = figure.subplots()
    for place in by_place(row for some in lines.values() for row in some):
        _front(axes, place)
    for i, (name, some) in enumerate(lines.items()):
        some = sorted(some, key=lambda row: float(row["l0"]))
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]
        x, y = [row["l0"] for row in some], [row["fvu"] for row in some]
        axes.plot(
            x, y, marker=marker, color=colour, markersize=5, linewidth=1.5, label=name or None
        )
    if "top_k" in settings:
        _name_top_k(axes, [row for some in lines.values() for row in some])
    _dress(axes, "FVU against L0", legend=False)
    axes.set_xlabel("L0: features that fire per held-out token")
    axes.set_ylabel("FVU on held-out tokens")
    if not lines:
        _nothing(axes)
    elif any(lines):
        outside = len(lines) > 6
        where = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)} if outside else {"loc": "best"}
        axes.legend(frameon=False, fontsize=8, ncols=1 + (len(lines) > 20), **where)
    return _save(figure, path)


def _read(run: Path, result: Row | None) -> tuple[list[Line], str]:
    """Return the lines of metrics.jsonl and the title of the run's picture."""
    try:
        header = read_summed(run / "run.json")
        text = (run / "metrics.jsonl").read_text("utf-8")
        lines = [unsummed(line) for line in text.splitlines()]
    except FileNotFoundError as error:
        if error.filename is None or not str(error.filename).endswith("metrics.jsonl"):
            raise TrainError(f"{run} is no run folder: it has no run.json") from None
        lines = []
    except (OSError, ValueError) as error:
        raise TrainError(f"{run} cannot be drawn ({error})") from None
    config, result = header.get("config", {}), result or header.get("result") or {}
    facts = {**config, **{name: value for name, value in result.items() if value is not None}}
    parts = [f"{run.name}: layer {facts.get('layer')}"]
    counts = {"n_ov_heads": "OV heads", "n_qk_heads": "QK heads"}
    if not facts.get("n_ov_heads"):
        counts = {"n_features": "features"}
    parts += [f"{facts[name]:,} {words}" for name, words in counts.items() if facts.get(name)]
    return lines, ", ".join([*parts, f"top_k {facts.get('top_k')}"])


def _figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Any:
    """Return an empty figure; the layout "constrained" makes room for labels of any size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _curve(
    axes: Any,
    lines: Sequence[Row],
    name: str,
    label: str,
    colour: str,
    *,
    log: bool = False,
    marker: str | None = None,
    style: str = "-",
) -> None:
    """Draw one number over tokens; points that are not numbers are left out."""
    points = [(line["tokens"], line[name]) for line in lines if _is_number(line.get(name))]
    if not points:
        return
    x, y = zip(*points, strict=True)
    marker = marker or ("o" if len(points) == 1 else None)
    axes.plot(x, y, style, color=colour, label=label, marker=marker, markersize=3.5, linewidth=1.4)
    if log and min(y) > 0 and max(y) > WIDE * min(y):
        axes.set_yscale("log")


def _last_value(axes: Any, evals: Sequence[Row]) -> None:
    """Write the last FVU at its point; a first one that is far above makes the axis logarithmic."""
    points = [(each["tokens"], each["fvu"]) for each in evals if _is_number(each.get("fvu"))]
    if not points:
        return
    axes.annotate(
        f"{points[-1][1]:.4f}",
        points[-1],
        xytext=(0, -5),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=9,
        color=COLOURS[1],
    )
    axes.margins(y=0.1)
    values = [value for _, value in points]
    if min(values) > 0 and max(values) > WIDE * min(values):
        axes.set_yscale("log")


def _dress(axes: Any, title: str, *, legend: bool = True) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if not axes.lines:
        _nothing(axes)
    elif legend and len(axes.lines) > 1:
        axes.legend(frameon=False, fontsize=8)


def _nothing(axes: Any) -> None:
    axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center", color="#888888")


def _front(axes: Any, rows: Sequence[Row]) -> None:
    """Underlay the runs that no other run beats in both FVU and L0."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["l0"], row["fvu"])):
        if not best or row["fvu"] < best[-1]["fvu"]:
            best.append(row)
    if len(best) > 1 and len(best) < len(rows):
        x, y = [row["l0"] for row in best], [row["fvu"] for row in best]
        label = None if axes.lines else "best"  # of several places, the first is named
        axes.plot(x, y, color="#c9c9c9", linewidth=7, solid_capstyle="round", label=label)


def _name_top_k(axes: Any, rows: Sequence[Row]) -> None:
    """Write every top_k once, under its point of lowest FVU."""
    lowest: dict[Any, Row] = {}
    for row in rows:
        if row["top_k"] not in lowest or row["fvu"] < lowest[row["top_k"]]["fvu"]:
            lowest[row["top_k"]] = row
    for top_k, row in lowest.items():
        place = {"xytext": (0, -12), "textcoords": "offset points", "ha": "center"}
        axes.annotate(
            f"top_k {top_k}", (row["l0"], row["fvu"]), fontsize=8, color="#555555", **place
        )
    axes.margins(y=0.12)


def _settings(rows: Sequence[Row]) -> list[str]:
    """Return the names of the settings that differ: those that stand before "fvu" in the rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return names[: names.index("fvu")] if "fvu" in names else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _percent(value: float, _place: int) -> str:
    return f"{100 * value:.3g} %"


def _tokens(value: float, _place: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


def _save(figure: Any, path: Path) -> Path:
    with whole(path) as partial:
        figure.savefig(partial, format="png")
    return path
