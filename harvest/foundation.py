"""What a store holds before any shard: text, weights, geometry and checks of layers."""

import uuid
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import HarvestError
from ..language.capture import Call, Capture
from ..language.causal import require_causal
from ..language.families import is_supported
from ..language.selfcheck import SelfCheck, require_derivable, require_understood, understand
from ..language.tokenizer import tokenizer_facts
from ..sites import Site
from ..store.arrays import itemsize
from ..store.layered import pair_facts
from ..store.manifest import Manifest, held_out_shards
from ..store.site_facts import SiteFacts
from ..store.write.writer import StoreWriter
from ..version import __version__
from .config import HarvestConfig
from .corpus.corpus import open_corpus
from .corpus.packing import Packed, fingerprint, first_text, pack
from .events import HarvestReport
from .loop import Pass, sites_of
from .plan import n_sites, shard_seqs
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
    model: Any,
    run: Pass,
    *,
    tokens: Tensor,
) -> Foundation:
    """Read the geometry and the weights of some layers and recompute the first sequences with them.

    Args:
        config: the request.
        model: language model of transformers.
        run: pass with hooks on those layers; its report is called with the `SelfCheck`.
        tokens: the first sequences, [n, n_ctx].

    Raises:
        HarvestError: a layer is not understood and has to be, or its activations are not finite.
    """
    calls, sample = run.batch.fitting(lambda n: _first_look(run.capture, tokens, n), run.report)
    keep = config.keep_nonfinite and config.outputs == "store"  # y is derived from checked layers
    found = {
        site.layer: understand(model, site, calls[site.layer], keep_nonfinite=keep)
        for site in run.capture.attention
    }
    if config.dtype == "float16":
        _require_float16(sample)
    check = SelfCheck({layer: each.check for layer, each in found.items()})
    run.report(check)
    if config.selfcheck and is_supported(model.config):
        require_understood(check)
    if config.outputs == "derive":
        require_derivable(check)
    unknown = [n for n, one in check.layers.items() if one.finite and not one.passed]
    require_causal(run.capture, tokens[0], unknown)
    sites: dict[Site, SiteFacts] = {}
    for layer in found:
        width = sample[Site(layer, "attn_in")].shape[-1]
        sites |= pair_facts(layer, width, config.outputs)
    return Foundation(
        sites=sites,
        facts={f"{layer}.attention": each.facts() for layer, each in found.items()},
        weights={f"{layer}.attention": each.weights for layer, each in found.items()},
        sample=sample,
    )


def _first_look(
    capture: Capture, tokens: Tensor, n_seqs: int
) -> tuple[dict[int, Call], dict[Site, Tensor]]:
    """Run batches of n_seqs sequences; return the first one's calls, and sites of all tokens."""
    first, *rest = tokens.split(n_seqs)
    calls = capture.calls(first)
    sample = sites_of(calls)
    if rest:
        parts = [sample, *(sites_of(capture.calls(some)) for some in rest)]
        sample = {site: torch.cat([part.pop(site) for part in parts]) for site in list(sample)}
    return calls, sample


def _require_float16(sample: dict[Site, Tensor]) -> None:
    """Raise HarvestError if the first activations do not fit float16; later ones may still not."""
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
    n_arrays = n_sites(config.outputs) * len({site.layer for site in foundation.sites})
    n_shard_seqs = shard_seqs(n_seq, seq_bytes=seq_bytes, n_arrays=n_arrays)
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
