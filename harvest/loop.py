"""Stage 1: run the language model once and write a store."""

import math
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from .. import __version__
from ..model import choose_device
from ..store import (
    DTYPES,
    MANIFEST,
    ActivationStore,
    Manifest,
    StoreError,
    StoreWriter,
    choose_layers,
    held_out_shards,
    is_begun,
    is_complete,
    mending,
    read_manifest,
    require_free,
)
from .aliases import ModelPath, resolve
from .capture import Capture
from .config import HarvestConfig
from .corpus import documents
from .errors import HarvestError
from .models import LanguageModel, load_config, load_model, load_tokenizer, tokenizer_facts
from .packing import Packed, fingerprint, pack
from .plan import Plan, Sizes, n_sites, require_same_request, shard_seqs
from .selfcheck import SelfCheck, check_geometry, require_passed, require_same_weights
from .sites import attention_sites, family_of, read_geometry, read_weights, site_name


class Progress(NamedTuple):
    """Where a harvest stands."""

    tokens: int
    """Tokens in the store so far"""
    n_tokens: int
    """Tokens of the whole store"""
    tokens_per_second: float
    """Since the model began to run"""


@dataclass(frozen=True, kw_only=True, slots=True)
class HarvestResult:
    """What a harvest made."""

    store: str
    """Its folder."""
    model: str
    """Id of the language model."""
    layers: list[int]
    """Layers in the store."""
    n_seq: int
    """Sequences in the store."""
    n_tokens: int
    """Tokens in the store."""
    n_bytes: int
    """Bytes of its shards."""
    nonfinite_layers: list[int]
    """Layers that hold NaN or Inf, which cannot be trained on."""
    seconds: float
    """From the call to the end."""
    tokens_per_second: float
    """While the model ran; 0 if it did not have to."""


Event = str | Plan | SelfCheck | Progress
Report = Callable[[Event], None]


class _Target(NamedTuple):
    """What to run, known without loading any weights."""

    path: ModelPath
    model_config: Any
    layers: dict[int, str]
    """Layers with the names of their attention modules"""
    d_model: int
    device: str


class _Text(NamedTuple):
    """What the model is to read."""

    packed: Packed
    tokenizer_facts: dict[str, Any]
    first_tokens: str


def harvest(config: HarvestConfig, *, report: Report = lambda event: None) -> HarvestResult:
    """Write the inputs and outputs of a language model's attention layers to a store.

    The same call goes on where an earlier one was stopped, shard by shard.

    Args:
        config: the request.
        report: is told what happens: a line of text, the `Plan`, the `SelfCheck`, the `Progress`.

    Raises:
        HarvestError: the model, the text or the request cannot be harvested.
        StoreError: the store cannot be written, or its folder holds something else.
    """
    started = time.perf_counter()
    rate = 0.0
    if is_complete(config.store):
        rate = _repair(config, report)
    elif is_begun(config.store):
        rate = _go_on(config, report)
    else:
        require_free(config.store)
        rate = _begin(config, report)
    store = ActivationStore.open(config.store)
    _tell_of_outliers(store, report)
    return HarvestResult(
        store=str(config.store),
        model=store.manifest.model["id"],
        layers=store.layers,
        n_seq=store.manifest.n_seq,
        n_tokens=store.manifest.n_seq * store.manifest.n_ctx,
        n_bytes=sum(entry.n_bytes for entry in store.entries),
        nonfinite_layers=[layer for layer in store.layers if store.n_nonfinite(layer)],
        seconds=time.perf_counter() - started,
        tokens_per_second=rate,
    )


def _tell_of_outliers(store: ActivationStore, report: Report) -> None:
    """Say what int8 lost most by and what was kept that is not finite."""
    scales = {site: found for layer in store.layers for site, found in store.scales(layer).items()}
    if scales:
        site = max(scales, key=lambda name: scales[name].largest / (scales[name].mean or 1))
        mean, largest = scales[site]
        report(
            f"int8: the largest scale is {largest:.3g}, {largest / (mean or 1):.3g} times the mean "
            f"({site}); a token's values are rounded to whole multiples of its scale"
        )
    if n_bad := sum(store.n_nonfinite(layer) for layer in store.layers):
        report(f"{n_bad:,} tokens with NaN or Inf were kept; their layers cannot be trained on")


def _begin(config: HarvestConfig, report: Report) -> float:
    """Make a store from nothing; return tokens per second."""
    target = _look(config, report)
    sizes = Sizes(config, target.layers, target.d_model)
    text = _read_text(config, target, sizes.max_tokens(), report)
    n_tokens = text.packed.tokens.numel()
    if config.tokens is not None and n_tokens < sizes.max_tokens():
        report(f"the text has {n_tokens:,} tokens; {config.tokens:,} were asked for")
    report(sizes.plan(target.path.id, n_tokens, text.first_tokens, len(text.packed.names)))
    loaded = _load(target, config.model_dtype, report)
    with Capture(loaded.model, attention_sites(loaded.model, list(target.layers))) as capture:
        with _create(config, target, loaded, text, capture, report) as writer:
            return _write_shards(config, writer, capture, report)


def _repair(config: HarvestConfig, report: Report) -> float:
    """Write what is missing of a complete store, which is nothing as a rule."""
    _require_same(config, read_manifest(config.store / MANIFEST))
    try:
        ActivationStore.open(config.store)
    except StoreError as error:
        if not is_begun(config.store):
            raise StoreError(
                f"{error}; but its plan is gone too, so first: {mending(config.store)}"
            ) from None
        report(str(error))
        return _go_on(config, report)
    report(f"{config.store} is already complete")
    return 0.0


def _go_on(config: HarvestConfig, report: Report) -> float:
    """Finish a store that was begun; return tokens per second."""
    with StoreWriter.resume(config.store, buffer_bytes=_buffer_bytes(config)) as writer:
        manifest = writer.manifest
        _require_same(config, manifest)
        n_missing = len(writer.missing_shards())
        report(f"going on: {manifest.n_shards - n_missing} of {manifest.n_shards} shards are there")
        target = _look(config, report, revision=manifest.model["revision"])
        sizes = Sizes(config, target.layers, target.d_model)
        n_tokens = manifest.n_seq * manifest.n_ctx
        sizes.require_room(n_tokens)
        report(sizes.plan(target.path.id, n_tokens))
        loaded = _load(target, manifest.model["dtype"], report)
        sites = attention_sites(loaded.model, list(target.layers))
        require_same_weights(loaded.model, sites, config.store, manifest)
        lacking = [site for site in sites if site.layer in writer.layers_to_write] or sites
        with Capture(loaded.model, lacking) as capture:
            return _write_shards(config, writer, capture, report)


def _require_same(config: HarvestConfig, manifest: Manifest) -> None:
    """Raise HarvestError unless a store was begun with this request."""
    n_layers = manifest.model["n_layers"]
    layers = _choose(config.layers, n_layers, where=manifest.model["id"])
    asked = config.request() | {"layers": layers}
    begun = manifest.request | {"layers": sorted(manifest.layers)}
    require_same_request(config.store, begun, asked)


def _choose(text: str, n_layers: int, *, where: str) -> list[int]:
    try:
        return choose_layers(text, range(n_layers), where=where)
    except ValueError as error:
        raise HarvestError(str(error)) from None


def _look(config: HarvestConfig, report: Report, *, revision: str | None = None) -> _Target:
    """Find the model, at a revision if one is given, and check the request against it."""
    try:
        device = choose_device(config.device)
    except ValueError as error:
        raise HarvestError(str(error)) from None
    path = resolve(config.model)
    if revision is not None:
        path = path._replace(revision=revision)
    report(f"looking at {path.id}")
    model_config = load_config(path)
    family = family_of(model_config)
    facts = model_config.get_text_config()
    longest = getattr(facts, "max_position_embeddings", None)
    if longest is not None and config.n_ctx > longest:
        raise HarvestError(f"n_ctx is {config.n_ctx}; {path.id} reads at most {longest} tokens")
    layers = _choose(config.layers, facts.num_hidden_layers, where=path.id)
    names = {layer: site_name(family, layer) for layer in layers}
    return _Target(path, model_config, names, facts.hidden_size, device)


def _read_text(config: HarvestConfig, target: _Target, max_tokens: int, report: Report) -> _Text:
    report(f"tokenising text of {config.data}")
    tokenizer = load_tokenizer(target.path)
    packed = pack(
        documents(config.data, text_column=config.text_column, seed=config.seed),
        tokenizer,
        n_ctx=config.n_ctx,
        max_tokens=max_tokens,
        bos=config.bos,
        seed=config.seed,
    )
    first = tokenizer.decode(packed.tokens[0, :20].tolist())
    return _Text(packed, tokenizer_facts(tokenizer), first)


def _load(target: _Target, dtype: str, report: Report) -> LanguageModel:
    report(f"loading {target.path.id} on {target.device}")
    return load_model(target.path, target.model_config, dtype=dtype, device=target.device)


def _create(
    config: HarvestConfig,
    target: _Target,
    loaded: LanguageModel,
    text: _Text,
    capture: Capture,
    report: Report,
) -> StoreWriter:
    """Check the geometry on the first sequences, then lay down the store."""
    model = loaded.model
    sites = attention_sites(model, list(target.layers))
    calls = capture.calls(text.packed.tokens[: config.batch_seqs])
    geometries = {site.layer: read_geometry(model, site) for site in sites}
    weights = {site.layer: read_weights(model, site) for site in sites}
    keep = config.keep_nonfinite and config.outputs == "store"  # y is derived of what was checked
    check = check_geometry(model, sites, calls, weights, geometries, keep_nonfinite=keep)
    report(check)
    if config.selfcheck:
        require_passed(check)
    sample = {layer: (call.x, call.y) for layer, call in calls.items()}
    facts = {
        layer: {
            "geometry": geometries[layer].to_dict(),
            "weights": sorted(weights[layer].present()),
            "self_check": {
                "passed": check.passed(layer),
                "error": _finite(check.layers[layer].error),
                "noise": _finite(check.layers[layer].noise),
            },
        }
        for layer in target.layers
    }
    return StoreWriter.create(
        config.store,
        _manifest(config, target, loaded, text, facts),
        tokens=text.packed.tokens,
        documents=text.packed.documents,
        document_names=text.packed.names,
        weights={layer: weights[layer].present() for layer in target.layers},
        sample=sample,
        buffer_bytes=_buffer_bytes(config),
    )


def _buffer_bytes(config: HarvestConfig) -> int:
    return int(config.buffer_gb * 1e9)


def _finite(value: float) -> float | None:
    """Return a number that JSON knows."""
    return value if math.isfinite(value) else None


def _manifest(
    config: HarvestConfig,
    target: _Target,
    loaded: LanguageModel,
    text: _Text,
    layers: dict[int, dict[str, Any]],
) -> Manifest:
    n_seq, n_ctx = text.packed.tokens.shape
    seq_bytes = n_ctx * target.d_model * DTYPES[config.dtype].itemsize
    n_shard_seqs = shard_seqs(n_seq, seq_bytes=seq_bytes, n_arrays=n_sites(config) * len(layers))
    return Manifest(
        uuid=str(uuid.uuid4()),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        lorsa_version=__version__,
        model=loaded.facts,
        tokenizer=text.tokenizer_facts,
        corpus={
            "data": config.data,
            "packing": "pack",
            "bos": text.packed.bos,
            "n_documents": len(text.packed.names),
            "tokens_sha256": fingerprint(text.packed.tokens),
        },
        request=config.request(),
        n_seq=n_seq,
        n_ctx=n_ctx,
        d_model=target.d_model,
        shard_seqs=n_shard_seqs,
        dtype=config.dtype,
        compression=config.compression,
        outputs=config.outputs,
        layers=layers,
        held_out_shards=held_out_shards(n_seq, n_shard_seqs),
    )


def _write_shards(
    config: HarvestConfig, writer: StoreWriter, capture: Capture, report: Report
) -> float:
    """Run the model over the missing shards and finish the store; return tokens per second."""
    manifest = writer.manifest
    missing = writer.missing_shards()
    n_missing = sum(len(manifest.shard_rows(shard)) for shard in missing) * manifest.n_ctx
    n_tokens = manifest.n_seq * manifest.n_ctx
    started, n_done = time.perf_counter(), 0
    report(Progress(n_tokens - n_missing, n_tokens, 0.0))
    for shard in writer.claimed_shards():
        with writer.shard(shard, keep_nonfinite=config.keep_nonfinite) as session:
            for rows in _split(manifest.shard_rows(shard), config.batch_seqs):
                session.append(capture.run(writer.tokens(rows)))
                n_done += len(rows) * manifest.n_ctx
                rate = n_done / (time.perf_counter() - started)
                report(Progress(n_tokens - n_missing + n_done, n_tokens, rate))
    writer.finish()
    return n_done / max(time.perf_counter() - started, 1e-9)


def _split(rows: range, size: int) -> Iterator[range]:
    for first in range(rows.start, rows.stop, size):
        yield range(first, min(first + size, rows.stop))
