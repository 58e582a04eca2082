"""What the drills of damage work on: a small store, runs, analyses, a page and a shared folder.

Work is done in processes forked from this one, which has loaded torch: a new one takes seconds.
"""

import csv
import hashlib
import json
import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import transformers.models.llama.modeling_llama  # noqa: F401 - or each child loads it
from lorsa.analyze import features
from lorsa.analyze.config import AnalyzeConfig
from lorsa.analyze.explain.config import ExplainConfig
from lorsa.analyze.explanations import Record
from lorsa.analyze.features import analyze_run
from lorsa.analyze.result import Analysis
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.evaluate.config import EvalConfig
from lorsa.evaluate.evaluate import evaluate_run
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.publish.config import PushConfig
from lorsa.publish.push import push
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
    "bytes_read",
    "n_groups",
    "uuid",
}
"""What differs from one time to the next."""
Report = Callable[[Any], None]


def prepare_model(root: Path) -> None:
    """Write a tiny language model and two texts."""
    root.mkdir(exist_ok=True, parents=True)
    make_model("llama-gqa").save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    for name, start in (("text", 0), ("text-b", 3)):
        (root / name).mkdir()
        for i in range(6):
            words = TEXT.split()[:: -1 if start else 1]
            turned = " ".join(words[start + i * 7 :] + words[: start + i * 7])
            (root / f"{name}/doc{i}.txt").write_text(turned, "utf-8")


def prepare(root: Path) -> None:
    """Write all folders that cases damage, below one."""
    prepare_model(root)
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
        harvest(harvest_config(root, store=root / "acts-b", seed=1, data=str(root / "text-b")))
    _damage(root)


def _damage(root: Path) -> None:
    """Write a store with a shard that is damaged."""
    shutil.copytree(root / "acts", root / "acts-damaged")
    path = root / "acts-damaged/layers/1/attn_in/c/0/0/0"
    data = bytearray(path.read_bytes())
    data[7] ^= 4
    path.write_bytes(data)


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


def weights_of(run: Path) -> dict[str, str]:
    """Return a digest of each tensor of a Lorsa."""
    state = Lorsa.from_pretrained(run).state_dict()
    return {name: sha(t.numpy().tobytes()) for name, t in state.items()}


def sha(data: bytes) -> str:
    """Return the first digits of a SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def tables(folder: Path) -> dict[str, str]:
    """Return a digest of each table of an analysis, as its readers see them."""
    analysis = Analysis.open(folder)
    found = {"heads": analysis.heads, "examples": analysis.examples_of(range(1 << 30))}
    seqs = sorted(set(found["examples"]["seq"].to_pylist()))
    digests = {name: sha(str(table.to_pydict()).encode()) for name, table in found.items()}
    texts = [analysis.text(analysis.tokens(seq)) for seq in seqs]
    return digests | {"texts": sha(str([texts, analysis.vocabulary]).encode())}


def folder_digest(folder: Path) -> dict[str, Any]:
    """Return what is in each file of a folder, without what differs from one time to the next."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {re.sub("page-[0-9a-f]{8}", "page", str(p.relative_to(folder))): p for p in paths}
    return {name: _content(path, folder) for name, path in found.items()}


def _content(path: Path, folder: Path) -> Any:
    if path.name in ("seal.json", "made.json", "index.html") or path.suffix == ".png":
        return "there"  # checksums and times of what is compared itself
    if path.suffix == ".json":
        return steady(json.loads(path.read_bytes()), folder)
    if path.suffix == ".jsonl":
        return [steady(json.loads(line), folder) for line in path.read_text().splitlines()]
    if path.suffix == ".csv":
        rows = csv.DictReader(path.read_text().splitlines())
        return [steady(row, folder) for row in rows]
    if path.suffix == ".parquet":
        return sha(str(pq.read_table(path).to_pydict()).encode())
    if path.suffix == ".safetensors":  # its metadata are in any order
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        return [steady(header, folder), sha(data[end:])]
    return sha(path.read_bytes())


def steady(content: Any, folder: Path) -> Any:
    """Return JSON-able data without what differs from one time to the next."""
    if isinstance(content, dict):
        return {str(k): steady(v, folder) for k, v in content.items() if k not in VARYING}
    if isinstance(content, list | tuple):
        return [steady(value, folder) for value in content]
    return content.replace(str(folder.parent), "@") if isinstance(content, str) else content
