"""The ways to a store: create it, finish it, add layers to it, or see what it would take."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import HarvestError
from ..language.same import require_same_weights
from ..sites import Site
from ..store.layered import pair_facts
from ..store.manifest import Manifest
from ..store.read.reader import ActivationStore
from ..store.rooms import own_folders
from ..store.spelling import spell_sites
from ..store.write.writer import StoreWriter
from .config import HarvestConfig
from .events import HarvestReport
from .forward import BatchSize
from .foundation import Text, add_to_store, create_from_sample, look_into, read_text, sample_seqs
from .hooks import Hooks, find_hooks
from .loop import Pass, write_shards
from .plan import TOKEN_BYTES, Plan, Sizes, cost
from .target import Target, find_target


def harvest_new(config: HarvestConfig, report: HarvestReport) -> float:
    """Create a store and fill it; return tokens per second."""
    target, sizes, max_tokens = _find(config, report)
    text, _plan = _read(config, target, sizes, max_tokens, report)
    model = _load(target, target.layers, config.model_dtype, report)
    hooks, batch = find_hooks(config, model, target.sites), _batch_size(config, target)
    tokens = text.packed.tokens[: sample_seqs(config.n_ctx)]
    foundation = look_into(config, hooks, batch, tokens=tokens, report=report)
    with create_from_sample(config, target, model, text, foundation) as writer:
        del foundation, text  # the sample, on the model's device, and the token ids
        return _write(config, writer, hooks, batch, report)


def harvest_more(
    config: HarvestConfig, plan: Manifest, sites: list[Site], report: HarvestReport
) -> float:
    """Add sites to a finished store; return tokens per second."""
    store = ActivationStore.open(config.store)
    target = _same_target(config, plan, sites, report)
    if not target.sites:
        report(f"{config.store} has all of them that the model has")
        return 0.0
    report(f"adding {spell_sites(target.sites)} to {config.store}, of the tokens that it has")
    _report_plan(config, plan, target, report)
    known = [int(name.partition(".")[0]) for name, m in plan.modules.items() if m["weights"]][:1]
    model = _load(target, [*known, *target.layers], plan.model["dtype"], report)
    require_same_weights(model, known, config.store, plan)
    hooks = find_hooks(config, model, target.sites, plan.sites)
    batch = _batch_size(config, target)
    tokens = store.tokens(range(min(plan.n_seq, sample_seqs(plan.n_ctx))))
    foundation = look_into(config, hooks, batch, tokens=tokens, report=report, there=plan.sites)
    with add_to_store(config, foundation) as writer:
        del foundation
        return _write(config, writer, hooks, batch, report)


def harvest_rest(config: HarvestConfig, report: HarvestReport) -> float:
    """Finish a store that was created earlier; return tokens per second."""
    with StoreWriter.resume(config.store, buffer_bytes=config.buffer_bytes) as writer:
        plan = writer.manifest
        if not writer.sites_to_write:  # others have done it
            writer.finish()
            return 0.0
        n_missing = len(writer.missing_shards())
        report(f"going on: {plan.n_shards - n_missing} of {plan.n_shards} shards are there")
        target = _same_target(config, plan, writer.sites_to_write, report)
        _report_plan(config, plan, target, report)
        model = _load(target, target.layers, plan.model["dtype"], report)
        require_same_weights(model, target.layers, config.store, plan)
        hooks = find_hooks(config, model, target.sites, plan.sites)
        return _write(config, writer, hooks, _batch_size(config, target), report)


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
    hooks, batch = find_hooks(config, model, target.sites), _batch_size(config, target)
    tokens = text.packed.tokens
    look_into(config, hooks, batch, tokens=tokens[: sample_seqs(config.n_ctx)], report=report)
    with hooks.capture() as capture:
        run = Pass(capture, batch, config.keep_nonfinite, report)
        return replace(plan, estimate=run.estimate(tokens, plan.n_tokens))


def preview_more(
    config: HarvestConfig, manifest: Manifest, sites: Sequence[Site], report: HarvestReport
) -> Plan:
    """Return what `harvest_rest` or `harvest_more` would write of some sites, without its time."""
    target = _same_target(config, manifest, sites, report)
    return _report_plan(config, manifest, target, report)


def _find(config: HarvestConfig, report: HarvestReport) -> tuple[Target, Sizes, int]:
    """Find the model; return it, the sizes of a store of it, and how many tokens to take."""
    report(f"looking at {config.model}")
    target = find_target(config, report=report)
    sizes = _sizes(config, target)
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


def _sizes(config: HarvestConfig, target: Target, **there: Any) -> Sizes:
    subject = target.subject
    named, d_mlp = target.named(), subject.d_mlp
    return Sizes(config, named, subject.d_model, sites=target.sites, d_mlp=d_mlp, **there)


def _same_target(
    config: HarvestConfig, manifest: Manifest, sites: Sequence[Site], report: HarvestReport
) -> Target:
    """Find the model that a store was created with, as the target of some sites.

    Args:
        config: the request.
        manifest: manifest of the store, or its plan.
        sites: sites of which something is missing, whichever the request names.
        report: is called with lines.
    """
    report(f"looking at {config.model}")
    return find_target(config, store=manifest, sites=sites, report=report)


def _report_plan(
    config: HarvestConfig, manifest: Manifest, target: Target, report: HarvestReport
) -> Plan:
    """Report the plan of sites of a store that is there; HarvestError if the disk is too small."""
    there = own_folders(config.store, manifest, target.sites)
    known = {site: about for site, about in manifest.sites.items() if site not in target.sites}
    sizes = _sizes(config, target, there=there, known=known)
    n_tokens = manifest.n_seq * manifest.n_ctx
    sizes.require_room(n_tokens, changeable=False)
    plan = sizes.plan(target.subject.id, n_tokens, device=target.devices[0])
    report(plan)
    return plan


def _load(target: Target, layers: Sequence[int], dtype: str, report: HarvestReport) -> Any:
    report(f"loading {target.subject.id} on {target.devices[0]}")
    return target.load(layers, dtype=dtype)


def _write(
    config: HarvestConfig,
    writer: StoreWriter,
    hooks: Hooks,
    batch: BatchSize,
    report: HarvestReport,
) -> float:
    """Write all shards that are missing; return tokens per second."""
    with hooks.capture() as capture:
        return write_shards(writer, Pass(capture, batch, config.keep_nonfinite, report))


def _batch_size(config: HarvestConfig, target: Target) -> BatchSize:
    """Return how many sequences are in a forward pass.

    Raises:
        HarvestError: they are more than the buffer of the writer takes.
    """
    facts = pair_facts(0, target.subject.d_model, config.outputs)
    token_bytes = cost(facts, dtype=config.dtype, d_mlp=0).token_bytes
    seq_bytes = config.n_ctx * (token_bytes - TOKEN_BYTES)  # of a layer's attention
    most = config.buffer_bytes // (seq_bytes if config.compression == "none" else 2 * seq_bytes)
    if most < (config.batch_seqs or 1):
        raise HarvestError(
            f"a layer's activations of {config.batch_seqs or 1} sequences are more than the "
            f"buffer of {config.buffer_gb:.3g} GB takes: use a larger --buffer-gb"
            + ("" if most < 1 else f", or --batch-size {most} or less")
        )
    device = target.devices[0]
    return BatchSize(config.batch_seqs, n_ctx=config.n_ctx, device=device, most=most)
