"""Building the page of an analysis.

page = build_page("runs/layer-12")
page.file       # runs/layer-12/page/index.html
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..analyze.choices import PROBE_SCORES, STORE_SCORES
from ..analyze.result import Analysis
from ..analyze.schema import DISTANCES, QUANTILES, TYPES
from ..analyze.trust import Start, said_by, starts, trusted_types
from .columns import details, index_columns, named_tokens, rounded, searched
from .contexts import contexts
from .files import INDEX, data_file, new_page, require_ours
from .made import current_folder, keep_origin, origin_of

HEADS_PER_FILE = 48
"""Heads whose contexts share a file: about 250 kB, read in a few hundredths of a second."""
SHOWN = ("layer", "model", "n_tokens", "n_ctx", "n_qk_heads", "top_k", "fvu", "l0", "with_model",
         "families")  # fmt: skip
"""Facts of the analysis that a page shows: no paths, for it may be given away."""
PAGE = "page"
"""Folder of the page inside a run's."""


class Page(NamedTuple):
    """A page that was built."""

    file: Path
    """File to open."""
    n_heads: int
    """Heads on the page."""
    n_files: int
    """Files of the page."""
    n_bytes: int
    """Size of all its files."""
    is_new: bool
    """Whether it was written now; one that was up to date stays."""


def build_page(
    run: str | Path,
    out: str | Path | None = None,
    *,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Page:
    """Write the page of a run's analysis, unless the one there is of the same analysis.

    An earlier page in the folder is replaced when the new one is whole; other files stay.

    Args:
        run: the run's folder, or the folder of its analysis.
        out: the page's folder; RUN/page by default.
        report: is called with the number of heads written, and of all heads.

    Raises:
        AnalyzeError: there is no whole analysis, or `out` holds another page.
    """
    analysis = Analysis.open(run)
    out = Path(run) / PAGE if out is None else Path(out)
    require_ours(out)
    origin = origin_of(analysis.root)
    if (current := current_folder(out, origin)) is not None:
        return _page(analysis, out, current, is_new=False)
    report(0, analysis.heads.num_rows)
    with new_page(out) as folder:
        _write_data(analysis, folder, report)
        keep_origin(folder, origin)
    return _page(analysis, out, out / folder.with_suffix("").name, is_new=True)


def _page(analysis: Analysis, out: Path, folder: Path, *, is_new: bool) -> Page:
    sizes = [path.stat().st_size for path in (*folder.iterdir(), out / INDEX)]
    return Page(
        file=out / INDEX,
        n_heads=analysis.heads.num_rows,
        n_files=len(sizes),
        n_bytes=sum(sizes),
        is_new=is_new,
    )


def _write_data(analysis: Analysis, folder: Path, report: Callable[[int, int], None]) -> None:
    n_heads = analysis.heads.num_rows
    firing: list[list[int]] = []
    fires: list[list[int]] = []
    explanations = analysis.explanations()

    def write(name: str, content: Any) -> None:
        (folder / f"data-{name}.js").write_bytes(data_file(name, content))

    for number, start in enumerate(range(0, n_heads, HEADS_PER_FILE)):
        heads = range(start, min(n_heads, start + HEADS_PER_FILE))
        found = contexts(analysis, heads)
        facts = details(analysis.heads.slice(start, len(heads)))
        explained = [{"explained": explanations.get(head)} for head in heads]
        parts = zip(facts, found, explained, strict=True)
        write(f"heads-{number}", [{**a, **b, **c} for a, b, c in parts])
        firing += [[context["token"] for context in head["top"]] for head in found]
        fires += [named_tokens(head["top"]) for head in found]
        report(heads.stop, n_heads)
    write("index", _index(analysis, fires))
    ids, texts = analysis.vocabulary
    write("tokens", {"ids": ids, "texts": texts})
    write("search", searched(analysis.heads, firing, explanations))


def _index(analysis: Analysis, fires: list[list[int]]) -> dict[str, Any]:
    return {
        "facts": _facts(analysis),
        "n_heads": analysis.heads.num_rows,
        "heads_per_file": HEADS_PER_FILE,
        "types": TYPES,
        "scores": STORE_SCORES,
        "probes": PROBE_SCORES,
        "quantiles": QUANTILES,
        "distances": DISTANCES,
        "starts": [_start(start) for start in starts(analysis)],
        "columns": {
            **index_columns(analysis.heads),
            "type_by": said_by(analysis),
            "trust": rounded(trusted_types(analysis)),
            "fires": fires,
        },
    }


def _start(start: Start) -> dict[str, Any]:
    (best,) = rounded([start.best])
    return {**start._asdict(), "scores": rounded(start.scores), "best": best}


def _facts(analysis: Analysis) -> dict[str, Any]:
    """Return the facts that the page shows; a model on this disk by its name alone."""
    facts = {name: analysis.facts.get(name) for name in SHOWN}
    model = str(facts["model"])
    return {**facts, "model": Path(model).name if Path(model).is_absolute() else model}
