"""Analysis of a run: from a Lorsa and its store to a folder of tables."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from ..dictionaries.checkpoint import weights_path
from ..errors import AnalyzeError
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
from ..language.stored import site_reader
from ..progress import Measured, Report, Stages
from ..seal import read_summed
from ..sites import Site
from ..stop import Stop, stop_when_whole
from ..store.read.reader import ActivationStore
from ..whole import file_crc32
from . import tables
from .attention.columns import AttentionColumns
from .attention.families import Family
from .collect import READ_TOKENS, Chosen, Firings, choose_examples
from .config import N_SAMPLE, AnalyzeConfig
from .effects import effects
from .folder import archive_explanations, earlier_facts, load_partial, locked, save_partial
from .result import write_analysis
from .schema import FACTS_FILE, PARTIAL_FILE, TYPES, VERSION

DEFAULT_TOKENS = 1_000_000
"""Stored tokens that are read at most, unless more are asked for."""
SAVE_EVERY_S = 60.0
"""Seconds between files of what is collected."""
STAGES = ("reading heads", "sources of examples", "comparing with the layer's own heads")
IN_THE_MODEL = (
    "probing with repeated random tokens",
    "checking types by ablation",
    "effects on the logits",
)
"""Parts of an analysis as they are reported, without a language model and with one besides."""


def analyze_run(config: AnalyzeConfig, *, report: Report = lambda event: None) -> dict[str, Any]:
    """Analyse a trained Lorsa: what fires each of its heads, what it reads, what it writes.

    A stopped analysis is resumed; of a finished one of the same request the facts are returned.

    Args:
        config: the request.
        report: called with a line of text, or with `Measured`.

    Returns:
        Facts that are in analysis.json, the number of heads of each type among them.

    Raises:
        CheckpointError: the run holds no Lorsa.
        StoreError: the store cannot be read.
        AnalyzeError: the Lorsa does not belong to the store, or the folder cannot be written.
        HarvestError: the language model cannot be had, or is not the store's.
        KeyboardInterrupt: it was asked to stop; what is collected is kept.
    """
    started = time.perf_counter()
    device = device_for(config.device)
    store = ActivationStore.open(config.store)
    opened = open_run(config.run, store, device, needs_lorsa=True)
    n_seqs = _n_sequences(opened.store, config.tokens)
    request, partial = _request(config, opened, n_seqs), config.folder / PARTIAL_FILE
    facts = earlier_facts(config.folder, report)
    if facts.get("request") == request:
        report(f"{config.folder} is finished already")
        if load_partial(partial, request, lambda _: None)[0]:  # killed as it was about to go
            partial.unlink(missing_ok=True)
        return facts
    if (config.folder / FACTS_FILE).exists():
        report(f"{config.folder} holds another analysis, which is replaced when this one is done")
    loading, in_the_model = ((), ()) if config.model is None else (("loading",), IN_THE_MODEL)
    report(Stages((*loading, *STAGES, *in_the_model, "writing")))
    with locked(config.folder):
        made, families = _make_tables(config, opened, n_seqs, request, report)
        facts = {**_facts(config, opened, n_seqs), **_type_counts(made["heads"])}
        facts["families"] = {name: family._asdict() for name, family in families.items()}
        facts["request"] = request
        facts["seconds"] = time.perf_counter() - started
        archive_explanations(config.folder, request)
        write_analysis(config.folder, facts, made)
        partial.unlink(missing_ok=True)
    return facts


def _make_tables(
    config: AnalyzeConfig, opened: Opened, n_seqs: int, request: dict[str, Any], report: Report
) -> tuple[dict[str, pa.Table], dict[str, Family]]:
    """Go through the store and return the tables by name, and the families that were checked."""
    subject = None
    if config.model is not None:
        subject = load_store_model(
            opened.store, config.model, [opened.layer], opened.lorsa.W_V.device.type, report
        )
    with stop_when_whole(on_first=lambda: report("stopping")) as stop:
        by_kind = AttentionColumns(opened)
        found = _collect(config, opened, by_kind, n_seqs, request, stop, report)

        def report_step(step: str | Measured | Stages) -> None:
            if stop.asked:
                raise KeyboardInterrupt
            report(step)

        made = _tables(config, opened, subject, by_kind, found, n_seqs, report_step)
        return made, by_kind.families


def _n_sequences(store: ActivationStore, tokens: int | None) -> int:
    """Return how many sequences to read: the first of the store, which a harvest has shuffled."""
    n_ctx = store.manifest.n_ctx
    asked = min(tokens or DEFAULT_TOKENS, store.manifest.n_seq * n_ctx)
    return max(1, asked // n_ctx)


def _request(config: AnalyzeConfig, opened: Opened, n_seqs: int) -> dict[str, Any]:
    """Return all that the result depends on."""
    return {
        "version": VERSION,
        "weights_crc32": file_crc32(weights_path(config.run)),
        "store_uuid": opened.store.manifest.uuid,
        "n_seqs": n_seqs,
        "n_top": config.n_top,
        "n_samples": config.n_samples,
        "model": None if config.model is None else resolve(config.model).id,
    }


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


def _type_counts(heads: pa.Table) -> dict[str, dict[str, int]]:
    """Return how many heads are of each type, and how many of them by text and probes both."""
    by, types = (heads[name].to_pylist() for name in ("type_by", "type"))
    counts = Counter(types)
    both = Counter(name for name, how in zip(types, by, strict=True) if how == "both")
    return {
        "types": {name: counts[name] for name in TYPES if name in counts},
        "types_by_both": {name: both[name] for name in TYPES if name in both},
    }


def _run_result(run: Path) -> dict[str, Any]:
    """Return what training measured; nothing of a folder that is no run.

    Raises:
        AnalyzeError: it is damaged.
    """
    path = run / "run.json"
    try:
        return read_summed(path).get("result") or {}
    except ValueError as error:
        raise AnalyzeError(f"{path} is damaged ({error}); restore it from a copy") from None
    except (OSError, AttributeError):
        return {}


def _collect(
    config: AnalyzeConfig,
    opened: Opened,
    by_kind: AttentionColumns,
    n_seqs: int,
    request: dict[str, Any],
    stop: Stop,
    report: Report,
) -> Firings:
    """Go through the store once, or from where an earlier call was stopped; add to `by_kind`."""
    lorsa, store = opened.lorsa, opened.store
    n_ctx = store.manifest.n_ctx
    partial = config.folder / PARTIAL_FILE
    found = Firings.none(lorsa.config.n_ov_heads, n_top=config.n_top, n_sample=N_SAMPLE)
    tensors = found.tensors() | by_kind.tensors()
    saved, done = load_partial(partial, request, report)
    if saved.keys() == tensors.keys():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
        report(f"going on after {done * n_ctx:,} tokens")
    else:
        done = 0
        if partial.exists():
            report(f"{partial} is of another request or an earlier version: all is read again")
    step = max(1, READ_TOKENS // n_ctx)
    began, before, saved_at = time.perf_counter(), done, time.perf_counter()
    read = site_reader(store, Site(opened.layer, "attn_in"), lorsa.W_V.device)
    while done < n_seqs:
        batch = list(range(done, min(done + step, n_seqs)))
        x = read(batch)
        found.add(by_kind.add(x, store.tokens(batch).long()), done * n_ctx)
        done += len(batch)
        rate = (done - before) * n_ctx / (time.perf_counter() - began)
        report(Measured(done * n_ctx, n_seqs * n_ctx, "reading heads", rate))
        if stop.asked or time.perf_counter() - saved_at > SAVE_EVERY_S:
            save_partial(partial, tensors, done, request)
            saved_at = time.perf_counter()
        if stop.asked:
            raise KeyboardInterrupt
    save_partial(partial, tensors, done, request)
    return found


def _tables(
    config: AnalyzeConfig,
    opened: Opened,
    subject: LanguageModel | None,
    by_kind: AttentionColumns,
    found: Firings,
    n_seqs: int,
    report: Report,
) -> dict[str, pa.Table]:
    """Return the tables, by name."""
    store = opened.store
    chosen, ascending = choose_examples(found, config.n_samples)
    shown = _shown(store, chosen)
    columns, example_columns = by_kind.finish(chosen, shown, n_seqs, report)
    tokenizer = load_store_tokenizer(store, subject, report)
    if subject is not None:
        columns |= _in_the_model(opened, subject, by_kind, tokenizer, found.mean_acts, report)
    report("writing")
    columns |= by_kind.types()
    quantile_acts = tables.quantiles_of(ascending)
    columns |= tables.firing_columns(found, quantile_acts, n_seqs * store.manifest.n_ctx)
    columns |= tables.direction_columns(opened.lorsa)
    heads, sequences = tables.heads_table(columns), tables.sequences_table(shown)
    names = store.document_names()
    return {
        "heads": heads,
        "examples": tables.examples_table(chosen, shown, names, example_columns),
        "sequences": sequences,
        "tokens": tables.tokens_table([heads, sequences], tokenizer),
    }


def _shown(store: ActivationStore, chosen: Chosen) -> tables.Shown:
    """Return the sequences that the chosen firings lie in."""
    seqs = np.unique(chosen.places.numpy() // store.manifest.n_ctx)
    if len(seqs) == 0:  # no feature fires: one sequence, so that the tables have their shape
        seqs = np.zeros(1, np.int64)
    which = seqs.tolist()
    return tables.Shown(seqs, store.tokens(which).numpy(), store.documents(which).numpy())


def _in_the_model(
    opened: Opened,
    subject: LanguageModel,
    by_kind: AttentionColumns,
    tokenizer: Any,
    mean_acts: Tensor,
    report: Report,
) -> dict[str, Any]:
    """Return the columns of heads.parquet that take the language model."""
    store, site = opened.store, subject.sites[opened.layer]
    some = store.tokens(np.arange(min(4, store.manifest.n_seq)))
    around = surroundings(subject.model, site, some)
    columns = by_kind.in_model(subject, around, tokenizer, mean_acts, report)
    if around is None:
        report("the model's last norm cannot be read: no effects on logits")
        return columns
    report("effects on the logits")
    n_vocab = len(around.unembedding) if tokenizer is None else len(tokenizer)
    n_vocab = min(n_vocab, len(around.unembedding), len(around.embedding))
    return columns | tables.effect_columns(effects(opened.lorsa, around, mean_acts, n_vocab))
