"""What a store holds before any shard: text, weights, geometry and checks of layers."""

import uuid
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import HarvestError
from ..language.blockcheck import (
    BlockChecks,
    KnownBlock,
    KnownMlp,
    require_derivation,
    require_residual,
    understand_block,
)
from ..language.capture import Capture, Seen
from ..language.causal import require_causal
from ..language.families import is_supported
from ..language.selfcheck import (
    LayerCheck,
    SelfCheck,
    Understood,
    require_derivable,
    require_understood,
    understand,
)
from ..language.tokenizer import tokenizer_facts
from ..sites import Site
from ..store.arrays import itemsize
from ..store.manifest import Manifest, held_out_shards
from ..store.site_facts import OWNER, SiteFacts, module_place, needed_modules
from ..store.write.writer import StoreWriter
from ..version import __version__
from .chosen import deriving, facts_of, parallel_in
from .config import HarvestConfig
from .corpus.corpus import open_corpus
from .corpus.packing import Packed, fingerprint, first_text, pack
from .events import HarvestReport
from .forward import BatchSize
from .hooks import Hooks
from .plan import n_arrays, shard_seqs
from .target import Target

SAMPLE_TOKENS = 4096
"""Tokens that the self-check and the scales of int8's channels are taken from. They are always the
first ones, so that a store comes out the same however it is harvested."""


class Text(NamedTuple):
    """What the model is to read."""

    packed: Packed
    corpus_facts: dict[str, Any]
    tokenizer_facts: dict[str, Any]
    first_tokens: str


class Foundation(NamedTuple):
    """What a store keeps of some sites besides their activations."""

    sites: dict[Site, SiteFacts]
    """Sites of the manifest"""
    facts: dict[str, dict[str, Any]]
    """Facts of their modules, such as 12.attention"""
    weights: dict[str, dict[str, Tensor]]
    """Parameters by module and name"""
    sample: dict[Site, Tensor]
    """Some activations"""

    def of(self, sites: Collection[Site]) -> "Foundation":
        """Return what is kept of some sites; modules are kept whole."""
        facts = {site: self.sites[site] for site in sites}
        return self._replace(sites=facts, sample={site: self.sample[site] for site in sites})


def read_text(
    config: HarvestConfig, target: Target, max_tokens: int, report: HarvestReport
) -> Text:
    """Tokenise and pack the corpus."""
    corpus = open_corpus(
        config.data,
        text_column=config.text_column,
        tokens_column=config.tokens_column,
        data_config=config.data_config,
        data_split=config.data_split,
        seed=config.seed,
    )
    tokenizer = target.subject.tokenizer(needed=config.tokens_column is None)
    report(f"{'reading' if config.tokens_column else 'tokenising text of'} {config.data}")
    packed = pack(
        corpus.documents(),
        tokenizer,
        n_ctx=config.n_ctx,
        max_tokens=max_tokens,
        bos=config.bos,
        packing=config.packing,
        seed=config.seed,
        n_vocab=target.subject.n_vocab,
        counts=corpus.counts,
    )
    if counts := str(packed.counts):
        report(counts)
    first = first_text(packed, tokenizer)
    return Text(packed, corpus.facts, tokenizer_facts(tokenizer), first)


def sample_seqs(n_ctx: int) -> int:
    """Return how many sequences the sample takes."""
    return max(2, SAMPLE_TOKENS // n_ctx)


def look_into(
    config: HarvestConfig,
    hooks: Hooks,
    batch: BatchSize,
    *,
    tokens: Tensor,
    report: HarvestReport,
    there: Mapping[Site, SiteFacts] | None = None,
) -> Foundation:
    """Read the geometry and the weights of some layers and recompute the first sequences with them.

    Args:
        config: the request.
        hooks: places of the sites in the model.
        batch: sequences of a forward pass.
        tokens: the first sequences, [n, n_ctx].
        report: is called with the `SelfCheck`, and with the `BlockChecks` if there are any.
        there: sites that the store has already.

    Raises:
        HarvestError: a layer is not understood and has to be, or its activations are not finite.
    """
    with hooks.first_look() as capture:
        seen, sample = batch.fitting(
            lambda n: _first_look(capture, hooks.sites, tokens, n, config.dtype), report
        )
        known = _understand(config, hooks, seen)
        if config.dtype == "float16":
            _require_float16(sample)
        _report_checks(config, hooks, known, report, added=there is not None)
        checks = {layer: known[f"{layer}.attention"].check for layer in seen.attention}
        unknown = [n for n, one in checks.items() if one.finite and not one.passed]
        require_causal(capture, tokens[0], unknown)
    widths = {site: values.shape[-1] for site, values in sample.items()}
    facts = facts_of(hooks.sites, widths, there or {}, config.outputs)
    for module in sorted(deriving(facts, parallel_in(hooks.blocks))):
        check = known[module].check if module in known else None
        require_derivation(module, check, added=there is not None)
    every = {module: about.facts() for module, about in known.items()}
    needed = needed_modules(facts, every)
    return Foundation(
        sites=facts,
        facts={module: every[module] for module in sorted(needed, key=module_place)},
        weights={module: known[module].weights for module in needed},
        sample=sample,
    )


Known = Understood | KnownMlp | KnownBlock
"""What is known of a module."""


def _understand(config: HarvestConfig, hooks: Hooks, seen: Seen) -> dict[str, Known]:
    """Return what is known of the modules of all layers, as 12.attention."""
    keep = config.keep_nonfinite and config.outputs == "store"  # derived by checked layers alone
    known: dict[str, Known] = {}
    for site in hooks.attention:
        found = understand(hooks.model, site, seen.attention[site.layer], keep_nonfinite=keep)
        known[f"{site.layer}.attention"] = found
    for layer, block in hooks.blocks.items():
        mine = {site.name: each for site, each in seen.sites.items() if site.layer == layer}
        call = seen.blocks[layer]
        mlp, sums = understand_block(hooks.model, block, call, mine, keep_nonfinite=keep)
        known |= {} if mlp is None else {f"{layer}.mlp": mlp}
        known[f"{layer}.block"] = sums
    return known


def _report_checks(
    config: HarvestConfig,
    hooks: Hooks,
    known: Mapping[str, Known],
    report: HarvestReport,
    *,
    added: bool,
) -> None:
    """Report the checks; raise HarvestError where a layer is not understood and has to be."""
    checks: dict[str, dict[int, LayerCheck]] = {"attention": {}, "mlp": {}, "block": {}}
    for module, about in known.items():
        layer, _, kind = module.partition(".")
        checks[kind][int(layer)] = about.check
    if checks["attention"]:
        report(SelfCheck(checks["attention"]))
    if config.selfcheck and is_supported(hooks.model.config):
        require_understood(SelfCheck(checks["attention"]))
    if config.outputs == "derive":
        require_derivable(SelfCheck(checks["attention"]), added=added)
    if hooks.blocks:
        with_stream = {site.layer for site in hooks.sites if site.name.startswith("resid")}
        streams = {n: check for n, check in checks["block"].items() if n in with_stream}
        report(BlockChecks(checks["mlp"], streams))
        if config.selfcheck:
            require_residual(streams)


def _first_look(
    capture: Capture, sites: Collection[Site], tokens: Tensor, n_seqs: int, dtype: str
) -> tuple[Seen, dict[Site, Tensor]]:
    """Run batches of n_seqs sequences; return what was seen of the first, and a sample of all."""
    first, *rest = tokens.split(n_seqs)
    seen = capture.see(first)
    parts = [loudest(seen.sites, sites, dtype)]
    parts += (loudest(capture.run(some), sites, dtype) for some in rest)
    return seen, {site: torch.stack([part[site] for part in parts]) for site in sites}


def loudest(
    found: Mapping[Site, Tensor], sites: Collection[Site], dtype: str
) -> dict[Site, Tensor]:
    """Return the largest finite absolute value of every channel, [width], by site.

    Those of all batches give the same scales of int8's channels as the activations themselves. For
    int8 the values are shares of their token, but for attention's: a few first tokens have a
    residual stream a hundred times as long as others', nearly all of it in two channels.
    """
    largest = {}
    for site in sites:
        values = found[site].detach().flatten(0, 1)
        if dtype == "int8" and OWNER[site.name] != "attention":
            values = values / values.norm(dim=-1, keepdim=True, dtype=torch.float32)
        sizes = values.abs()
        largest[site] = torch.where(sizes.isfinite(), sizes, 0).amax(dim=0)
    return largest


def _require_float16(sample: dict[Site, Tensor]) -> None:
    """Raise HarvestError if the first activations do not fit float16; later ones may still not.

    Args:
        sample: sizes of some activations, by site.
    """
    largest = torch.finfo(torch.float16).max
    for site, values in sample.items():
        if (found := float(values.abs().max())) > largest:
            raise HarvestError(
                f"{site} reaches {found:.3g}, and float16 ends at {largest:,.0f}: use --dtype "
                "bfloat16"
            )


def create_from_sample(
    config: HarvestConfig,
    target: Target,
    model: Any,
    text: Text,
    foundation: Foundation,
) -> StoreWriter:
    """Create a store with its text and its first layers."""
    return StoreWriter.create(
        config.store,
        _manifest(config, target, model, text, foundation),
        tokens=text.packed.tokens,
        documents=text.packed.documents,
        document_names=text.packed.names,
        modules=foundation.weights,
        sample=foundation.sample,
        buffer_bytes=config.buffer_bytes,
    )


def add_to_store(config: HarvestConfig, foundation: Foundation) -> StoreWriter:
    """Create new sites of a finished store."""
    return StoreWriter.add_sites(
        config.store,
        foundation.sites,
        foundation.facts,
        modules=foundation.weights,
        sample=foundation.sample,
        buffer_bytes=config.buffer_bytes,
    )


def _manifest(
    config: HarvestConfig,
    target: Target,
    model: Any,
    text: Text,
    foundation: Foundation,
) -> Manifest:
    n_seq, n_ctx = text.packed.tokens.shape
    seq_bytes = n_ctx * target.subject.d_model * itemsize(config.dtype)
    n_shard_seqs = shard_seqs(n_seq, seq_bytes=seq_bytes, n_arrays=n_arrays(foundation.sites))
    return Manifest(
        uuid=str(uuid.uuid4()),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        lorsa_version=__version__,
        model=target.subject.facts(model) | {"attention_layers": sorted(target.subject.attention)},
        tokenizer=text.tokenizer_facts,
        corpus={
            "data": config.data,
            **text.corpus_facts,
            "packing": config.packing,
            "bos": text.packed.bos,
            "counts": text.packed.counts.to_dict(),
            "n_documents": len(text.packed.names),
            "tokens_sha256": fingerprint(text.packed.tokens),
        },
        request=config.request(),
        n_seq=n_seq,
        n_ctx=n_ctx,
        shard_seqs=n_shard_seqs,
        dtype=config.dtype,
        compression=config.compression,
        sites=foundation.sites,
        modules=foundation.facts,
        held_out_shards=held_out_shards(n_seq, n_shard_seqs),
    )
