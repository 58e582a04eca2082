"""`lorsa analyze`: from a run and its store to an analysis folder."""

import json
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..dictionaries.checkpoint import weights_path
from ..evaluate.opened import (
    LanguageModel,
    Opened,
    device_for,
    load_store_model,
    load_store_tokenizer,
    open_run,
)
from ..language.aliases import resolve
from ..language.norms import surroundings
from ..progress import Measured, Report
from ..stop import Stop, stop_when_whole
from ..store.read.reader import ActivationStore
from . import tables
from .attention.columns import at_words, parents_of, where_from
from .attention.kinds import Reading
from .attention.probes import probe, probe_tokens
from .collect import BATCH_TOKENS, Collected, choose
from .config import N_SAMPLE, AnalyzeConfig
from .effects import Effects, effects, ordinal_tokens, successor_scores
from .folder import earlier_facts, keep, locked, put_away_explanations, taken_up
from .result import write_analysis
from .schema import FACTS, PARTIAL, TYPES, VERSION

DEFAULT_TOKENS = 1_000_000
SAVE_EVERY_S = 60.0


def analyze_run(config: AnalyzeConfig, *, report: Report = lambda event: None) -> dict[str, Any]:
    """Analyse a trained Lorsa: what fires each of its heads, what it reads, what it writes.

    A stopped analysis goes on where it was; a finished one of the same request is returned.

    Args:
        config: the request.
        report: is told, in words, what is being done, and how far it is.

    Returns:
        What is in analysis.json, and heads of each type.

    Raises:
        CheckpointError: the run holds no Lorsa.
        StoreError: the store cannot be read.
        AnalyzeError: the Lorsa does not belong to the store, or the folder cannot be written.
        HarvestError: the language model cannot be had, or is not the store's.
        KeyboardInterrupt: it was asked to stop; what is collected is kept.
    """
    started = time.perf_counter()
    device = device_for(config.device)
    opened = open_run(config.run, ActivationStore.open(config.store), device)
    seqs = _sequences(opened.store, config.tokens)
    request = _request(config, opened, len(seqs))
    facts = earlier_facts(config.folder)
    if facts.get("request") == request:
        report(f"{config.folder} is finished already")
        return facts
    if (config.folder / FACTS).exists():
        report(f"{config.folder} holds another analysis, which is replaced when this one is done")
    with locked(config.folder):
        made = _made(config, opened, seqs, request, report)
        facts = {**_facts(config, opened, len(seqs)), "request": request}
        facts |= {"types": made.pop("types"), "seconds": time.perf_counter() - started}
        put_away_explanations(config.folder, request)
        write_analysis(config.folder, facts, made)
        (config.folder / PARTIAL).unlink(missing_ok=True)
    return facts


def _made(
    config: AnalyzeConfig, opened: Opened, seqs: list[int], request: dict[str, Any], report: Report
) -> dict[str, Any]:
    """Collect what there is to know and return it as tables."""
    subject = None
    if config.model is not None:
        subject = load_store_model(
            opened.store, config.model, [opened.layer], opened.lorsa.W_V.device.type, report
        )
    with stop_when_whole(tell=lambda: report("stopping")) as stop:
        found = _collect(config, opened, seqs, request, stop, report)
        keep(config.folder / PARTIAL, found, len(seqs), request)

        def told(step: str | Measured) -> None:
            if stop.asked:
                raise KeyboardInterrupt
            report(step)

        return _write_up(config, opened, subject, seqs, found, told)


def _sequences(store: ActivationStore, tokens: int | None) -> list[int]:
    """Return the first sequences of the store; a harvest has shuffled them."""
    n_ctx = store.manifest.n_ctx
    asked = min(tokens or DEFAULT_TOKENS, store.manifest.n_seq * n_ctx)
    return list(range(max(1, asked // n_ctx)))


def _request(config: AnalyzeConfig, opened: Opened, n_seqs: int) -> dict[str, Any]:
    """Return all that the result depends on."""
    return {
        "version": VERSION,
        "weights_crc32": _crc32(weights_path(config.run)),
        "store_uuid": opened.store.manifest.uuid,
        "n_seqs": n_seqs,
        "n_top": config.n_top,
        "n_samples": config.n_samples,
        "model": None if config.model is None else resolve(config.model).id,
    }


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            crc = zlib.crc32(part, crc)
    return crc


def _facts(config: AnalyzeConfig, opened: Opened, n_seqs: int) -> dict[str, Any]:
    c, manifest = opened.lorsa.config, opened.store.manifest
    result = _run_result(config.run)
    return {
        "run": str(config.run),
        "analysis": str(config.folder),
        "layer": opened.layer,
        "model": manifest.model["id"],
        "store": str(config.store),
        "store_uuid": manifest.uuid,
        "corpus": manifest.corpus["data"],
        "n_tokens": n_seqs * manifest.n_ctx,
        "n_ctx": manifest.n_ctx,
        "n_ov_heads": c.n_ov_heads,
        "n_qk_heads": c.n_qk_heads,
        "top_k": c.top_k,
        "d_model": c.d_model,
        "with_model": config.model is not None,
        "fvu": result.get("fvu"),
        "l0": result.get("l0"),
    }


def _run_result(run: Path) -> dict[str, Any]:
    """Return what training measured; nothing of a folder that is no run."""
    try:
        return json.loads((run / "run.json").read_text("utf-8")).get("result") or {}
    except (OSError, ValueError, AttributeError):
        return {}


def _collect(
    config: AnalyzeConfig,
    opened: Opened,
    seqs: list[int],
    request: dict[str, Any],
    stop: Stop,
    report: Report,
) -> Collected:
    """Go through the store once, or from where an earlier call was stopped."""
    lorsa, store = opened.lorsa, opened.store
    n_ctx = store.manifest.n_ctx
    partial = config.folder / PARTIAL
    found, done = taken_up(partial, request)
    if found is None:
        found = Collected.nothing(lorsa.config.n_ov_heads, n_top=config.n_top, n_sample=N_SAMPLE)
    else:
        report(f"going on after {done * n_ctx:,} tokens")
    step = max(1, BATCH_TOKENS // n_ctx)
    began, before, saved = time.perf_counter(), done, time.perf_counter()
    while done < len(seqs):
        batch = seqs[done : done + step]
        x = store.inputs(opened.layer, batch).to(lorsa.W_V.device).float()
        found.add(lorsa, x, store.tokens(batch).long(), done * n_ctx)
        done += len(batch)
        rate = (done - before) * n_ctx / (time.perf_counter() - began)
        report(Measured(done * n_ctx, len(seqs) * n_ctx, "reading heads", rate))
        if stop.asked or time.perf_counter() - saved > SAVE_EVERY_S:
            keep(partial, found, done, request)
            saved = time.perf_counter()
        if stop.asked:
            raise KeyboardInterrupt
    return found


def _write_up(
    config: AnalyzeConfig,
    opened: Opened,
    subject: LanguageModel | None,
    seqs: list[int],
    found: Collected,
    report: Report,
) -> dict[str, Any]:
    """Return the tables, and how many heads are of each type."""
    lorsa, store = opened.lorsa, opened.store
    n_ctx = store.manifest.n_ctx
    chosen, ascending = choose(found, config.n_samples)
    sources, shown, tokens, documents = where_from(opened, seqs, chosen, report)
    parents = parents_of(opened, seqs, report)
    tokenizer = load_store_tokenizer(store, subject, report)
    on_probe, written, successor = None, None, None
    if subject is not None:
        mean_acts = found.sum_act / found.reading.n_fired
        on_probe, written, successor = _in_the_model(opened, subject, tokenizer, mean_acts, report)
    report("writing")
    heads = tables.heads_table(
        lorsa,
        found,
        tables.quantiles_of(ascending),
        len(seqs) * n_ctx,
        reads=tables.source_tokens(chosen, sources, shown, tokens, lorsa.config.n_ov_heads),
        parents=parents,
        probe=on_probe,
        effects=written,
        successor=successor,
    )
    sequences = tables.sequences_table(shown, tokens)
    types = Counter(heads["type"].to_pylist())
    return {
        "heads": heads,
        "examples": tables.examples_table(
            chosen, sources, shown, tokens, documents, store.document_names()
        ),
        "sequences": sequences,
        "tokens": tables.tokens_table([heads, sequences], tokenizer),
        "types": {name: types[name] for name in TYPES if name in types},
    }


def _in_the_model(
    opened: Opened, subject: LanguageModel, tokenizer: Any, mean_acts: Tensor, report: Report
) -> tuple[Reading, Effects | None, Tensor | None]:
    """Return what needs the language model: probes, effects on logits, successor scores."""
    lorsa, store, site = opened.lorsa, opened.store, subject.sites[opened.layer]
    manifest = store.manifest
    report("probing with repeated random tokens")
    some = store.tokens(np.arange(min(256, manifest.n_seq))).numpy()
    usable = np.setdiff1d(some, manifest.tokenizer.get("special_token_ids") or [])
    bos = manifest.tokenizer.get("bos_token_id") if manifest.corpus.get("bos") else None
    text = probe_tokens(usable.astype(np.int64), n_ctx=manifest.n_ctx, bos=bos)
    on_probe = probe(lorsa, subject.model, site, text)
    around = surroundings(subject.model, site, store.tokens(np.arange(min(4, manifest.n_seq))))
    if around is None:
        report("the model's last norm cannot be read: no effects on logits")
        return on_probe, None, None
    report("effects on the logits")
    n_vocab = len(around.unembedding) if tokenizer is None else len(tokenizer)
    n_vocab = min(n_vocab, len(around.unembedding), len(around.embedding))
    written = effects(lorsa, around, mean_acts, n_vocab)
    if tokenizer is None or not (classes := ordinal_tokens(tokenizer)):
        return on_probe, written, None
    xs = [at_words(subject.model, site, ids, bos) for ids in classes]
    return on_probe, written, successor_scores(lorsa, around, classes, xs, mean_acts)
