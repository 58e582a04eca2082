"""Columns that the tables of Lorsas have besides firings: sources, types, parents, probes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...dictionaries.code import Code
from ...evaluate.opened import LanguageModel, Opened
from ...language.attention import LayerWeights
from ...language.geometry import AttentionGeometry
from ...language.norms import Language
from ...language.stored import site_reader
from ...progress import Report
from ...sites import Site
from ..choices import LABEL_FROM, LEAST_FIRED, LOWER, PROBE_SCORES, STORE_SCORES
from ..collect import Chosen, Tensors, tensors_of
from ..tables import Shown, lists, nullable, structs
from .families import Family, verify_families
from .kinds import Attended
from .parents import Parents, find_parents
from .probes import probe, probe_tokens
from .sources import find_sources, source_columns, source_tokens
from .successors import inputs_at, ordinal_tokens, successor_scores
from .types import Types, types_of

PARENT_TOKENS = 4096
"""Tokens on which attention patterns are compared."""


class AttentionColumns:
    """Columns of a Lorsa's heads and of their examples."""

    def __init__(self, opened: Opened) -> None:
        """Start with no token."""
        self._opened = opened
        self._attended = Attended.none(opened.lorsa.config.n_ov_heads)
        self._probed: Attended | None = None
        self.families: dict[str, Family] = {}
        """Results of the causal check, by type; none without a language model."""

    def add(self, x: Tensor, tokens: Tensor) -> Code:
        """Add sequences of the pass over the store, and return what fires in them.

        Args:
            x: the layer's input, on the Lorsa's device, [batch, seq, d_model].
            tokens: ids, [batch, seq].
        """
        return self._attended.add(self._opened.lorsa, x, tokens)

    def tensors(self) -> Tensors:
        """Return the tensors themselves, by name: a copy into them restores a pass."""
        return tensors_of(reading=self._attended)

    def finish(
        self, chosen: Chosen, shown: Shown, n_seqs: int, report: Report
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return columns of heads.parquet, and of examples.parquet.

        Args:
            chosen: the firings that are shown.
            shown: their sequences.
            n_seqs: sequences of the pass.
            report: called with a line of text, or with `Measured`.
        """
        c = self._opened.lorsa.config
        sources = find_sources(self._opened, chosen, report)
        reads, reads_z = source_tokens(chosen, sources, shown, c.n_ov_heads)
        heads: dict[str, Any] = {
            "qk_head": np.arange(c.n_ov_heads) // (c.n_ov_heads // c.n_qk_heads),
            "reads": reads,
            "reads_z": reads_z,
            **_attended_columns(self._attended),
        }
        if (parents := self._parents(n_seqs, report)) is not None:
            heads["parents"] = structs(**parents._asdict())
        return heads, source_columns(chosen, sources)

    def in_model(
        self,
        subject: LanguageModel,
        language: Language | None,
        tokenizer: Any,
        mean_acts: Tensor,
        report: Report,
    ) -> dict[str, Any]:
        """Return the columns of heads.parquet that take the language model.

        Args:
            subject: the language model.
            language: what is around the layer in it, if that is known.
            tokenizer: its tokenizer, if that is at hand.
            mean_acts: of each head where it fires on text, NaN where it does not, [n_ov_heads].
            report: called with lines of text.
        """
        lorsa, store, layer = self._opened.lorsa, self._opened.store, self._opened.layer
        site, manifest = subject.sites[layer], store.manifest
        report("probing with repeated random tokens")
        some = store.tokens(np.arange(min(256, manifest.n_seq))).numpy()
        usable = np.setdiff1d(some, manifest.tokenizer.get("special_token_ids") or [])
        bos = manifest.tokenizer.get("bos_token_id") if manifest.corpus.get("bos") else None
        text = probe_tokens(usable.astype(np.int64), n_ctx=manifest.n_ctx, bos=bos)
        self._probed = probe(lorsa, subject.model, site, text)
        columns = _probe_columns(self._probed)
        self.families = verify_families(
            lorsa, subject.model, site, text, *self._families(self._probed), report
        )
        classes = [] if language is None or tokenizer is None else ordinal_tokens(tokenizer)
        if language is not None and classes:
            xs = [inputs_at(subject.model, site, ids, bos) for ids in classes]
            found = successor_scores(lorsa, language, classes, xs, mean_acts)
            columns["successor"] = nullable(found.score)
            columns[LOWER["successor"]] = nullable(found.low)
            columns["successor_words"] = found.n_words.int().numpy()
            columns["successor_chance"] = nullable(found.chance)
        return columns

    def types(self) -> dict[str, Any]:
        """Return the columns of heads.parquet that are types, and by what they are given."""
        found = self._types()
        return {"type": found.type, "type_by": found.by}

    def _types(self) -> Types:
        text, probed = self._attended, self._probed
        return types_of(text.n_fired, text.bounds(), None if probed is None else probed.bounds())

    def _families(self, probed: Attended) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
        """Return the heads of each type that text and probes both give, and those that either may.

        The latter read half of the kind, sure or not.
        """
        text, probes = self._attended.shares(), probed.shares()
        called = self._types()
        families = {
            name: [
                head
                for head, each in enumerate(zip(called.type, called.by, strict=True))
                if each == (name, "both")
            ]
            for name in STORE_SCORES
        }
        half = {n: (text[n] >= LABEL_FROM) | (probes[n] >= LABEL_FROM) for n in STORE_SCORES}
        alike = {name: may_be.nonzero()[:, 0].tolist() for name, may_be in half.items()}
        return families, alike

    def _parents(self, n_seqs: int, report: Report) -> Parents | None:
        """Return the parents of all heads; None of a layer whose weights are not known."""
        lorsa, store, layer = self._opened.lorsa, self._opened.store, self._opened.layer
        module, site = f"{layer}.attention", Site(layer, "attn_in")
        facts, weights = store.manifest.modules[module].get("geometry"), store.weights(module)
        if not facts or not {"W_Q", "W_K", "W_V", "W_O"} <= weights.keys():
            return None
        report("comparing with the layer's own heads")
        device = lorsa.W_V.device
        n_read = min(n_seqs, max(1, PARENT_TOKENS // store.manifest.n_ctx))
        read = site_reader(store, site, device)
        xs = (read([seq]) for seq in range(n_read))
        own = LayerWeights(**weights).to(device, torch.float32)
        return find_parents(lorsa, own, AttentionGeometry.from_dict(facts), xs)


def _attended_columns(attended: Attended) -> dict[str, Any]:
    """Return the columns of heads.parquet that are of reading in the stored text."""
    shares, amount = attended.shares(), attended.amount
    return {
        "distance": nullable(attended.distance / amount),
        "entropy": nullable(attended.entropy / amount),
        "by_distance": lists((attended.by_distance / amount[:, None]).numpy()),
        **{name: nullable(shares[name]) for name in STORE_SCORES},
        **_bound_columns(attended, STORE_SCORES),
    }


def _probe_columns(attended: Attended) -> dict[str, Any]:
    """Return the columns of heads.parquet that are of reading in probe sequences."""
    shares, often = attended.shares(), attended.n_fired >= LEAST_FIRED
    columns: dict[str, Any] = {"probe_fired": attended.n_fired.long().numpy()}
    for name, share in zip(PROBE_SCORES, STORE_SCORES, strict=True):
        columns[name] = nullable(torch.where(often, shares[share], torch.nan))
    return columns | _bound_columns(attended, PROBE_SCORES)


def _bound_columns(attended: Attended, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the columns with the lower bounds of scores."""
    bounds = attended.bounds().unbind(dim=1)
    return {LOWER[name]: nullable(bound) for name, bound in zip(names, bounds, strict=True)}
