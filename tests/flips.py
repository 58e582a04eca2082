"""Flipped bits: what users do with a damaged folder must give the same, or name the file.

Every case is a folder, and the uses that read it. A bit of one of its files is flipped; then each
use must give what it gave before, or a line that names the file.
"""

import json
import random
import shutil
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from drills import (
    N_CTX,
    STEP,
    Report,
    analyze_config,
    eval_config,
    explain_config,
    folder_digest,
    in_child,
    quick,
    sha,
    steady,
    tables,
    train_config,
    weights_of,
)
from lorsa.analyze.config import AnalyzeConfig
from lorsa.analyze.explain.explain import estimate
from lorsa.analyze.features import analyze_run
from lorsa.analyze.find import find_heads
from lorsa.analyze.result import Analysis
from lorsa.errors import LorsaError
from lorsa.evaluate.evaluate import evaluate_run
from lorsa.publish.config import PushConfig
from lorsa.publish.push import push
from lorsa.sites import Site, attention_ports
from lorsa.store.care.info import store_info
from lorsa.store.read.reader import ActivationStore
from lorsa.train.train import train
from lorsa.verify import verify_paths
from lorsa.view.build import build_page

ORDER = ("same", "told", "unnamed", "silent", "bug")
"""Verdicts, the worst last: "told" names the file, "unnamed" is a line that does not."""


class Case(NamedTuple):
    """A folder that is damaged, and how it is used."""

    folder: str
    """Below the prepared folder; all of it is copied for a flip"""
    files: str
    """Pattern of the files in it that are damaged"""
    uses: dict[str, Callable[[Path, Path, Report], Any]]
    """What users do with a copy, by name: from the prepared folder, the copy and a report"""


class Flip(NamedTuple):
    """A bit of a file."""

    file: str
    byte: int
    bit: int


class Outcome(NamedTuple):
    """What came of a flip."""

    flip: Flip
    verdict: str
    """same, told, unnamed, silent or bug"""
    details: dict[str, str]
    """What each use that was not the same said"""


def _train(root: Path, run: Path, report: Report) -> Any:
    result = asdict(train(train_config(root, run), report=report))
    return [result, weights_of(run)]


def _go_on(root: Path, run: Path, report: Report) -> Any:
    config = train_config(root, run, checkpoint_every_tokens=2 * STEP)
    result = asdict(train(config, report=report))
    return [result, weights_of(run), json.loads((run / "run.json").read_text())]


def _eval(root: Path, run: Path, report: Report) -> Any:
    found = evaluate_run(eval_config(root, run, model=False), report=report).to_dict()
    return [found, json.loads((run / "eval.json").read_text())]


def _push(root: Path, run: Path, report: Report) -> Any:
    out = run.parent / "pushed"
    try:
        push(PushConfig(runs=(run,), repo=str(out)), report=report)
        return folder_digest(out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _analyze(root: Path, run: Path, report: Report) -> Any:
    facts = analyze_run(analyze_config(root, run), report=report)
    return [facts, tables(run / "analysis")]


def _find(root: Path, run: Path, report: Report) -> Any:
    return [asdict(head) for head in find_heads("induction", runs=[run], n=4)]


def _view(root: Path, run: Path, report: Report) -> Any:
    page = build_page(run, run.parent / "page")
    (folder,) = page.file.parent.glob("page-*")
    found = folder_digest(folder)
    shutil.rmtree(page.file.parent)
    return found


def _view_again(root: Path, run: Path, report: Report) -> Any:
    """Build the page where it is there: a damaged one is made anew."""
    page = build_page(run)
    found = folder_digest(page.file.parent)
    return [found, page.file.read_text().count("src=")]


def _read(root: Path, run: Path, report: Report) -> Any:
    analysis = Analysis.open(run)
    return [analysis.facts, tables(run / "analysis"), analysis.explanations()]


def _estimate(root: Path, run: Path, report: Report) -> Any:
    return asdict(estimate(explain_config(run)))


def _info(root: Path, store: Path, report: Report) -> Any:
    return store_info(store)


def _train_on(root: Path, store: Path, report: Report) -> Any:
    out = store.parent / "run"
    try:
        config = train_config(root, out, store=store, train_tokens=2 * STEP)
        return [asdict(train(config, report=report)), weights_of(out)]
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _analyze_on(root: Path, store: Path, report: Report) -> Any:
    out = store.parent / "analysis"
    run = root / "runs/layer-1"
    config = AnalyzeConfig(run=run, store=store, out=out, tokens=72 * N_CTX, device="cpu")
    try:
        return [analyze_run(config, report=report), tables(out)]
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _read_store(root: Path, store: Path, report: Report) -> Any:
    """Read all that a store holds, as those do who train and analyse with it."""
    opened = ActivationStore.open(store)
    seqs = list(range(opened.manifest.n_seq))
    arrays = [opened.tokens(seqs), opened.documents(seqs)]
    for layer in opened.layers:
        stored = opened.stored(attention_ports(layer), seqs)
        arrays += [
            opened.values(Site(layer, "attn_in"), seqs),
            *opened.weights(f"{layer}.attention").values(),
        ]
        arrays += stored.tensors()
    return [sha(a.float().numpy().tobytes()) for a in arrays] + opened.document_names()


def _load(root: Path, shared: Path, report: Report) -> Any:
    return [weights_of(shared / f"layer-{layer}") for layer in (1, 2)]


def _push_more(root: Path, shared: Path, report: Report) -> Any:
    push(PushConfig(runs=(root / "runs/layer-1",), repo=str(shared)), report=report)
    return [(shared / "README.md").read_text(), folder_digest(shared / "layer-1")]


def _verify(root: Path, folder: Path, report: Report) -> Any:
    """Return what is wrong; of bits that change nothing, as spaces in JSON, that may be nothing."""
    found = verify_paths([folder], full=True)
    for problem in found["problems"]:
        report(problem)
    return found["ok"]


VERIFY = {"verify": _verify}
CASES = {
    "a store": Case(
        "acts",
        "**/*",
        {
            "info": _info,
            "read": _read_store,
            "train": _train_on,
            "analyze": _analyze_on,
            "verify": _verify,
        },
    ),
    "a run": Case(
        "runs/layer-1",
        "*",
        {
            "train": _train,
            "eval": _eval,
            "push": _push,
            "analyze": _analyze,
            "view": _view,
            "verify": _verify,
        },
    ),
    "an analysis": Case(
        "runs/layer-1",
        "analysis/*",
        {"read": _read, "find": _find, "view": _view, "explain": _estimate, "analyze": _analyze},
    ),
    "a pushed folder": Case("shared", "**/*", {"load": _load, "push": _push_more} | VERIFY),
    "a page": Case("runs/layer-1", "page/**/*", {"view": _view_again} | VERIFY),
    "half a run": Case("half/layer-1", "**/*", {"train": _go_on}),
    "half an analysis": Case(
        "analysed/layer-2", "analysis/*", {"analyze": _analyze, "read": _read}
    ),
}


def choose(folder: Path, pattern: str, chance: random.Random) -> Flip:
    """Return a bit of some files of a folder: half the time of any file, else of any byte."""
    sizes = {p: p.stat().st_size for p in sorted(folder.glob(pattern)) if p.is_file()}
    paths = [path for path, size in sizes.items() if size and path.name != "curves.png"]
    weights = [sizes[path] for path in paths] if chance.random() < 0.5 else [1 for _ in paths]
    (path,) = chance.choices(paths, weights)
    return Flip(str(path.relative_to(folder)), chance.randrange(sizes[path]), chance.randrange(8))


def use(root: Path, case: Case, copy: Path, name: str) -> dict[str, Any]:
    """Use a copy in one way; return what came of it and what was said."""
    said: list[str] = []

    def report(event: object) -> None:
        if isinstance(event, str):
            said.append(event)

    try:
        with quick():
            result = case.uses[name](root, copy, report)
    except LorsaError as error:
        return {"error": str(error), "said": said}
    except OSError as error:
        if error.strerror:
            return {"error": str(error), "said": said}
        return {"bug": traceback.format_exc(), "said": said}
    except Exception:
        return {"bug": traceback.format_exc(), "said": said}
    return {"result": steady(json.loads(json.dumps(result)), copy), "said": said}


def use_all(root: Path, case: Case, scratch: Path, flip: Flip | None) -> dict[str, dict[str, Any]]:
    """Use a copy of a case's folder in all ways, damaged or not."""
    scratch.mkdir(parents=True)
    copy = scratch / Path(case.folder).name
    shutil.copytree(root / case.folder, copy, symlinks=True)
    if flip is not None:
        path = copy / flip.file
        data = bytearray(path.read_bytes())
        data[flip.byte] ^= 1 << flip.bit
        path.write_bytes(data)
    try:
        return {name: use(root, case, copy, name) for name in case.uses}
    finally:
        shutil.rmtree(scratch)


def judge(
    flip: Flip, found: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]
) -> Outcome:
    """Compare what the uses gave with what they give of an undamaged folder."""
    name = Path(flip.file).name
    worst, details = "same", {}
    for use_name, each in found.items():
        if "bug" in each:
            verdict, text = "bug", each["bug"]
        elif "error" in each:
            verdict, text = "told" if name in each["error"] else "unnamed", each["error"]
        elif each["result"] == expected[use_name]["result"]:
            continue
        else:
            verdict = "told" if any(name in line for line in each["said"]) else "silent"
            text = _difference(each["result"], expected[use_name]["result"])
        details[use_name] = text
        worst = max(worst, verdict, key=ORDER.index)
    return Outcome(flip, worst, details)


def _difference(found: Any, expected: Any, where: str = "") -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in sorted({*found, *expected}):
            if found.get(name) != expected.get(name):
                return _difference(found.get(name), expected.get(name), f"{where}.{name}")
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            if a != b:
                return _difference(a, b, f"{where}[{i}]")
    return f"{where}: {found!r:.80} in place of {expected!r:.80}"


def drill(root: Path, scratch: Path, name: str, n: int, seed: int) -> list[Outcome]:
    """Flip bits of a case's folder, one after the other; return what came of each."""
    case, chance = CASES[name], random.Random(f"{seed} {name}")
    expected = in_child(lambda: use_all(root, case, scratch, None))
    assert all("result" in each for each in expected.values()), expected
    outcomes = []
    for _ in range(n):
        flip = choose(root / case.folder, case.files, chance)
        found = in_child(lambda flip=flip: use_all(root, case, scratch, flip))
        if found is None or "crash" in found:
            outcomes.append(Outcome(flip, "bug", {"process": str(found)}))
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            outcomes.append(judge(flip, found, expected))
    return outcomes
