"""Watch over a harvest: layers are recomputed where their inputs are the largest.

The self-check sees the first sequences. What acts on few tokens alone shows where activations are
large. So at the end of a shard the sequence with the largest one is recomputed, as the self-check
does it, if it is larger than any before, or if as many as EVERY_SEQS have passed since the last.
A model that computes in float32 gave the exact outputs itself.
"""

import math
from typing import Any, NamedTuple

import torch

from ..errors import LanguageModelError
from .attention import Reading
from .blocks import AttentionSite
from .capture import Call
from .selfcheck import in_float32, largest_tokens, reading_error

LIMIT = 1e-3
"""Largest error; ten times that of the first sequences, for large inputs are exact to less."""
EVERY_SEQS = 64
"""Sequences after which the largest of them is recomputed, though larger ones were before."""


class _Largest(NamedTuple):
    size: float
    """Norm of the largest token"""
    seq: int
    """Number of its sequence in the store"""
    call: Call
    """Call of the layer, of that sequence alone"""


class Watch:
    """Sequences with the largest inputs of some layers in the text so far."""

    def __init__(self, model: Any, sites: list[AttentionSite], known: dict[int, Reading]) -> None:
        """Watch layers.

        Args:
            model: the language model.
            sites: its layers that are harvested.
            known: what is known of them, by layer; others are not watched.
        """
        self._model = model
        self._sites = {site.layer: site for site in sites if site.layer in known}
        self._known = known
        self._largest: dict[int, _Largest] = {}
        """Sequences since the last comparison"""
        self._compared: dict[int, float] = {}
        """Largest input that was ever compared"""
        self._n_passed = 0

    @torch.no_grad()
    def see(self, calls: dict[int, Call], first_seq: int) -> None:
        """Take note of a batch.

        Args:
            calls: calls of the layers.
            first_seq: number of the batch's first sequence in the store.
        """
        for layer in self._sites:
            call = calls[layer]
            size, row = largest_tokens(call.x).max(dim=0)
            if layer not in self._largest or float(size) > self._largest[layer].size:
                one = call.of([int(row)])
                self._largest[layer] = _Largest(float(size), first_seq + int(row), one)
        self._n_passed += len(next(iter(calls.values())).x) if calls else 0

    @torch.no_grad()
    def check(self) -> None:
        """Recompute the sequence of the largest input, where it is larger than any before or due.

        Raises:
            LanguageModelError: a layer computes something else than what was read of it.
        """
        is_due = self._n_passed >= EVERY_SEQS
        for layer in sorted(self._largest):
            if is_due or self._largest[layer].size > self._compared.get(layer, -math.inf):
                self._compare(layer, self._largest.pop(layer))
        self._n_passed = 0 if is_due else self._n_passed

    def _compare(self, layer: int, noted: _Largest) -> None:
        size, seq, call = noted
        self._compared[layer] = max(size, self._compared.get(layer, size))
        device = next(self._sites[layer].module.parameters()).device
        x, exact = call.x.to(device, torch.float32), call.y.to(device)
        if call.x.dtype != torch.float32 or call.y.dtype != torch.float32:
            exact = in_float32(self._model, self._sites[layer], call, x)
        geometry, weights = self._known[layer]
        error = reading_error(Reading(geometry, weights.to(device)), x, exact)
        if size >= 0 and exact.isfinite().all() and not error <= LIMIT:
            raise LanguageModelError(
                f"layer {layer}: its attention in sequence {seq} is not the one that was read "
                f"of the model: it differs by {error:.1e} (allowed {LIMIT:.0e}), which the "
                "first sequences did not show; delete the store and leave the layer out"
            )
