"""The ways to a store: create it, finish it, add layers to it, or see what it would take."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import HarvestError
from ..language.blocks import attention_sites
from ..language.capture import Capture
from ..language.selfcheck import require_same_weights
from ..sites import Site
from ..store.manifest import Manifest
from ..store.read.reader import ActivationStore
from ..store.rooms import own_folders
from ..store.spelling import layers_of, spell_sites
from ..store.write.writer import StoreWriter
from .config import HarvestConfig
from .events import HarvestReport
from .forward import BatchSize
from .foundation import Text, add_to_store, create_from_sample, look_into, read_text, sample_seqs
from .loop import Pass, write_shards
from .plan import TOKEN_BYTES, Plan, Sizes, cost
from .target import Target, find_target


def harvest_new(config: HarvestConfig, report: HarvestReport) -> float:
    """Create a store and fill it; return tokens per second."""
    target, sizes, max_tokens = _find(config, report)
    text, _plan = _read(config, target, sizes, max_tokens, report)
    model = _load(target, target.layers, config.model_dtype, report)
    with _capture(model, target.layers) as capture:
        run = _run(config, target, capture, report)
        n_seqs = sample_seqs(config.n_ctx)
        foundation = look_into(config, model, run, tokens=text.packed.tokens[:n_seqs])
        with create_from_sample(config, target, model, text, foundation) as writer:
            del foundation, text  # the sample, on the model's device, and the token ids
            return write_shards(writer, run)


def harvest_more(
    config: HarvestConfig, plan: Manifest, sites: list[Site], report: HarvestReport
) -> float:
    """Add sites to a finished store; return tokens per second."""
    report(f"adding {spell_sites(sites)} to {config.store}, of the tokens that it has")
    target, _plan = _same_target(config, plan, sites, report)
    store = ActivationStore.open(config.store)
    known = [n for n in store.layers if f"{n}.attention" in store.manifest.modules][:1]
    model = _load(target, [*known, *layers_of(sites)], plan.model["dtype"], report)
    require_same_weights(model, attention_sites(model, known), config.store, store.manifest)
    with _capture(model, layers_of(sites)) as capture:
        run = _run(config, target, capture, report)
        tokens = store.tokens(range(min(plan.n_seq, sample_seqs(plan.n_ctx))))
        foundation = look_into(config, model, run, tokens=tokens).of(sites)
        with add_to_store(config, foundation) as writer:
            del foundation
            return write_shards(writer, run)


def harvest_rest(config: HarvestConfig, report: HarvestReport) -> float:
    """Finish a store that was created earlier; return tokens per second."""
    with StoreWriter.resume(config.store, buffer_bytes=config.buffer_bytes) as writer:
        plan, layers = writer.manifest, layers_of(writer.sites_to_write)
        if not layers:  # others have done it
            writer.finish()
            return 0.0
        n_missing = len(writer.missing_shards())
        report(f"going on: {plan.n_shards - n_missing} of {plan.n_shards} shards are there")
        target, _plan = _same_target(config, plan, writer.sites_to_write, report)
        model = _load(target, layers, plan.model["dtype"], report)
        sites = attention_sites(model, layers)
        require_same_weights(model, sites, config.store, plan)
        with _capture(model, layers) as capture:
            return write_shards(writer, _run(config, target, capture, report))


def preview(config: HarvestConfig, report: HarvestReport) -> Plan:
    """Return what `harvest_new` would write.

    Its text and time are known as far as tokenizer and weights are on this machine.
    """
    target, sizes, max_tokens = _find(config, report)
    if config.tokens_column is None and not target.subject.has_tokenizer:
        report("the model's tokenizer is not on this machine: no text was read")
        plan = sizes.plan(target.subject.id, max_tokens, device=target.devices[0])
        report(plan)
        return plan
    text, plan = _read(config, target, sizes, max_tokens, report)
    if not target.subject.has_weights:
        report("the model's weights are not on this machine: how long it takes is not known")
        return plan
    model = _load(target, target.layers, config.model_dtype, report)
    with _capture(model, target.layers) as capture:
        run = _run(config, target, capture, report)
        look_into(config, model, run, tokens=text.packed.tokens[: sample_seqs(config.n_ctx)])
        return replace(plan, estimate=run.estimate(text.packed.tokens, plan.n_tokens))


def preview_more(
    config: HarvestConfig, manifest: Manifest, sites: Sequence[Site], report: HarvestReport
) -> Plan:
    """Return what `harvest_rest` or `harvest_more` would write of some sites, without its time."""
    _target, plan = _same_target(config, manifest, sites, report)
    return plan


def _find(config: HarvestConfig, report: HarvestReport) -> tuple[Target, Sizes, int]:
    """Find the model; return it, the sizes of a store of it, and how many tokens to take."""
    report(f"looking at {config.model}")
    target = find_target(config, report=report)
    sizes = Sizes(config, target.named(target.layers), target.subject.d_model)
    n_tokens = sizes.max_tokens()
    if (default := sizes.default()) is not None:
        report(default)
    return target, sizes, n_tokens


def _read(
    config: HarvestConfig, target: Target, sizes: Sizes, max_tokens: int, report: HarvestReport
) -> tuple[Text, Plan]:
    """Read the text and report what will be written of it."""
    text = read_text(config, target, max_tokens, report)
    n_tokens = text.packed.tokens.numel()
    if config.tokens is not None and n_tokens < max_tokens:
        report(f"the text has {n_tokens:,} tokens; {config.tokens:,} were asked for")
    plan = sizes.plan(
        target.subject.id,
        n_tokens,
        device=target.devices[0],
        first_tokens=text.first_tokens,
        n_documents=len(text.packed.names),
        warning=text.packed.counts.warning(),
    )
    report(plan)
    return text, plan


def _same_target(
    config: HarvestConfig, manifest: Manifest, sites: Sequence[Site], report: HarvestReport
) -> tuple[Target, Plan]:
    """Find the model that a store was created with, and check that the disk takes the sites.

    Args:
        config: the request.
        manifest: manifest of the store, or its plan.
        sites: sites of which something is missing.
        report: is called with the `Plan`.
    """
    report(f"looking at {config.model}")
    target = find_target(config, store=manifest, report=report)
    there = own_folders(config.store, manifest, sites)
    sizes = Sizes(config, target.named(layers_of(sites)), target.subject.d_model, there=there)
    n_tokens = manifest.n_seq * manifest.n_ctx
    sizes.require_room(n_tokens, changeable=False)
    plan = sizes.plan(target.subject.id, n_tokens, device=target.devices[0])
    report(plan)
    return target, plan


def _load(target: Target, layers: Sequence[int], dtype: str, report: HarvestReport) -> Any:
    report(f"loading {target.subject.id} on {target.devices[0]}")
    return target.load(layers, dtype=dtype)


def _capture(model: Any, layers: Sequence[int]) -> Capture:
    return Capture(model, attention_sites(model, list(layers)))


def _run(config: HarvestConfig, target: Target, capture: Capture, report: HarvestReport) -> Pass:
    """Return what it takes to harvest a shard.

    Raises:
        HarvestError: a batch is larger than the buffer of the writer.
    """
    token_bytes = cost(
        1, target.subject.d_model, dtype=config.dtype, outputs=config.outputs
    ).token_bytes
    seq_bytes = config.n_ctx * (token_bytes - TOKEN_BYTES)  # of a layer
    most = config.buffer_bytes // (seq_bytes if config.compression == "none" else 2 * seq_bytes)
    if most < (config.batch_seqs or 1):
        raise HarvestError(
            f"a layer's activations of {config.batch_seqs or 1} sequences are more than the "
            f"buffer of {config.buffer_gb:.3g} GB takes: use a larger --buffer-gb"
            + ("" if most < 1 else f", or --batch-size {most} or less")
        )
    device = target.devices[0]
    batch = BatchSize(config.batch_seqs, n_ctx=config.n_ctx, device=device, most=most)
    return Pass(capture, batch, config.keep_nonfinite, report)
