"""Flipped bits: a small store, runs, analyses and a pushed folder, and what users do with each.

Every case is a folder, and the uses that read it. A bit of one of its files is flipped; then each
use must give what it gave before, or a line that names the file. Uses run in processes forked from
one that has loaded torch and computed nothing.
"""

import hashlib
import json
import os
import random
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import transformers.models.llama.modeling_llama  # noqa: F401 - or each child loads it
from lorsa.analyze import features
from lorsa.analyze.config import AnalyzeConfig
from lorsa.analyze.explain.config import ExplainConfig
from lorsa.analyze.explain.explain import estimate
from lorsa.analyze.explanations import Record
from lorsa.analyze.features import analyze_run
from lorsa.analyze.find import find_heads
from lorsa.analyze.result import Analysis
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.errors import LorsaError
from lorsa.evaluate.config import EvalConfig
from lorsa.evaluate.evaluate import evaluate_run
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.publish.config import PushConfig
from lorsa.publish.push import push
from lorsa.store.care.info import store_info
from lorsa.store.read.reader import ActivationStore
from lorsa.train import group
from lorsa.train.config import TrainConfig
from lorsa.train.report import reporting
from lorsa.train.report.events import StepReport
from lorsa.train.train import train
from lorsa.view.build import build_page
from runs import no_picture
from tiny import N_CTX, TEXT, make_model, make_tokenizer

STEP = 4 * N_CTX
VARYING = {
    "seconds",
    "tokens_per_second",
    "data_wait_fraction",
    "created",
    "run",
    "analysis",
    "n_bytes",
    "crc32c",
}
"""What differs from one time to the next."""
Report = Callable[[Any], None]


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


def prepare(root: Path) -> None:
    """Write all folders that cases damage, below one."""
    root.mkdir(exist_ok=True, parents=True)
    make_model("llama-gqa").save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    (root / "text").mkdir()
    for i in range(6):
        words = TEXT.split()
        turned = " ".join(words[i * 7 :] + words[: i * 7])
        (root / f"text/doc{i}.txt").write_text(turned, "utf-8")
    with quick():
        harvest(harvest_config(root))
        for layer in (1, 2):
            run = root / f"runs/layer-{layer}"
            train(train_config(root, run, layer))
            evaluate_run(eval_config(root, run))
            push(PushConfig(runs=(run,), repo=str(root / "shared"), license="mit"))
        analyze_run(analyze_config(root, root / "runs/layer-1"))
        explain_some(root / "runs/layer-1")
        build_page(root / "runs/layer-1")
        in_child(lambda: _half_a_run(root))
        shutil.copytree(root / "runs/layer-2", root / "analysed/layer-2")
        in_child(lambda: _half_an_analysis(root))


def harvest_config(root: Path, **changes: Any) -> HarvestConfig:
    settings = {
        "model": str(root / "model"),
        "layers": "1,2",
        "store": root / "acts",
        "data": str(root / "text"),
        "n_ctx": N_CTX,
        "tokens": 72 * N_CTX,
        "device": "cpu",
        "dtype": "float32",
    }
    return HarvestConfig(**settings | changes)


def train_config(root: Path, out: Path, layer: int = 1, **changes: Any) -> TrainConfig:
    settings = {
        "store": root / "acts",
        "layer": layer,
        "n_ov_heads": 24,
        "n_qk_heads": 4,
        "top_k": 4,
        "batch_tokens": STEP,
        "train_tokens": 8 * STEP,
        "eval_tokens": 4 * N_CTX,
        "init_tokens": 8 * N_CTX,
        "device": "cpu",
    }
    return TrainConfig(**settings | changes, out=out)


def eval_config(root: Path, run: Path, *, model: bool = True) -> EvalConfig:
    where = str(root / "model") if model else None
    return EvalConfig(run=run, store=root / "acts", model=where, ce_tokens=2 * N_CTX, device="cpu")


def analyze_config(root: Path, run: Path) -> AnalyzeConfig:
    where = str(root / "model")
    return AnalyzeConfig(run=run, store=root / "acts", model=where, tokens=16 * N_CTX, device="cpu")


def explain_config(run: Path, endpoint: str = "http://127.0.0.1:9/v1") -> ExplainConfig:
    return ExplainConfig(run=run, endpoint=endpoint, model="m", top=4, concurrency=1)


def explain_some(run: Path) -> None:
    """Write explanations as a language model would give them."""
    with Record(run / "analysis/explanations.jsonl") as record:
        for head in range(4):
            record.add({"head": head, "text": f"reads head {head}", "model": "m"})
            record.add({"head": head, "score": 0.5 + head / 8, "n_scored": 8, "scorer": "m"})


def _half_a_run(root: Path) -> None:
    """Train until the fifth step and end as if killed."""

    def until(event: object) -> None:
        if isinstance(event, StepReport) and event.step == 5:
            os._exit(0)

    config = train_config(root, root / "half/layer-1", checkpoint_every_tokens=2 * STEP)
    train(config, report=until)


def _half_an_analysis(root: Path) -> None:
    """Read half of the text and end as if killed."""
    n = [0]

    def until(event: object) -> None:
        n[0] += "reading heads" in str(event)
        if n[0] == 5:
            os._exit(0)

    features.SAVE_EVERY_S = 0.0
    analyze_run(analyze_config(root, root / "analysed/layer-2"), report=until)


@contextmanager
def quick() -> Iterator[None]:
    """Let runs draw nothing, tell of every step, and analyses read in small parts."""
    kept = reporting.draw_curves, group.LOG_EVERY_STEPS, features.READ_TOKENS
    reporting.draw_curves, group.LOG_EVERY_STEPS = no_picture, 1
    features.READ_TOKENS = 2 * N_CTX
    try:
        yield
    finally:
        reporting.draw_curves, group.LOG_EVERY_STEPS, features.READ_TOKENS = kept


def in_child(work: Callable[[], Any]) -> Any:
    """Do some work in a forked process; return its JSON-able result, None if it died."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            content = json.dumps(work())
        except BaseException:
            content = json.dumps({"crash": traceback.format_exc()})
        with os.fdopen(writer, "w") as file:
            file.write(content)
            file.flush()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        content = file.read()
    os.waitpid(child, 0)
    return json.loads(content) if content else None


# ---- uses


def _train(root: Path, run: Path, report: Report) -> Any:
    result = asdict(train(train_config(root, run), report=report))
    return [result, _weights(run)]


def _go_on(root: Path, run: Path, report: Report) -> Any:
    config = train_config(root, run, checkpoint_every_tokens=2 * STEP)
    result = asdict(train(config, report=report))
    return [result, _weights(run), json.loads((run / "run.json").read_text())]


def _weights(run: Path) -> Any:
    state = Lorsa.from_pretrained(run).state_dict()
    return {name: _sha(t.numpy().tobytes()) for name, t in state.items()}


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
        return [asdict(train(config, report=report)), _weights(out)]
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
        stored = opened.stored(layer, seqs)
        arrays += [opened.inputs(layer, seqs), *opened.weights(layer).values()]
        arrays += [t for t in stored if hasattr(t, "numpy")]
    return [_sha(a.float().numpy().tobytes()) for a in arrays] + opened.document_names()


def _load(root: Path, shared: Path, report: Report) -> Any:
    return [_weights(shared / f"layer-{layer}") for layer in (1, 2)]


def _push_more(root: Path, shared: Path, report: Report) -> Any:
    push(PushConfig(runs=(root / "runs/layer-1",), repo=str(shared)), report=report)
    return [(shared / "README.md").read_text(), folder_digest(shared / "layer-1")]


CASES = {
    "a store": Case(
        "acts",
        "**/*",
        {"info": _info, "read": _read_store, "train": _train_on, "analyze": _analyze_on},
    ),
    "a run": Case(
        "runs/layer-1",
        "*",
        {"train": _train, "eval": _eval, "push": _push, "analyze": _analyze, "view": _view},
    ),
    "an analysis": Case(
        "runs/layer-1",
        "analysis/*",
        {"read": _read, "find": _find, "view": _view, "explain": _estimate, "analyze": _analyze},
    ),
    "a pushed folder": Case("shared", "**/*", {"load": _load, "push": _push_more}),
    "half a run": Case("half/layer-1", "**/*", {"train": _go_on}),
    "half an analysis": Case(
        "analysed/layer-2", "analysis/*", {"analyze": _analyze, "read": _read}
    ),
}


# ---- digests


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def tables(folder: Path) -> dict[str, str]:
    """Return a digest of each table of an analysis, as its readers see them."""
    analysis = Analysis.open(folder)
    found = {"heads": analysis.heads, "examples": analysis.examples_of(range(1 << 30))}
    seqs = sorted(set(found["examples"]["seq"].to_pylist()))
    digests = {name: _sha(str(table.to_pydict()).encode()) for name, table in found.items()}
    texts = [analysis.text(analysis.tokens(seq)) for seq in seqs]
    return digests | {"texts": _sha(str([texts, analysis.vocabulary]).encode())}


def folder_digest(folder: Path) -> dict[str, str]:
    """Return a digest of each file of a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): _sha(p.read_bytes()) for p in paths}


def steady(content: Any, copy: Path) -> Any:
    """Return JSON-able data without what differs from one time to the next."""
    if isinstance(content, dict):
        return {str(k): steady(v, copy) for k, v in content.items() if k not in VARYING}
    if isinstance(content, list | tuple):
        return [steady(value, copy) for value in content]
    return content.replace(str(copy.parent), "@") if isinstance(content, str) else content


# ---- flips


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
    order = ("same", "told", "unnamed", "silent", "bug")
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
        worst = max(worst, verdict, key=order.index)
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
