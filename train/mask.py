"""Loss mask: which tokens count in the loss and the metrics.

Tokens that do not count stay in their sequences, where others attend to them: attention is that of
the language model. The rule reads the id and the norms of tokens, which every store has, so a run
may choose any.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import TrainError
from ..sites import Site
from ..store.read.reader import ActivationStore
from ..store.read.rows import Seqs
from .mask_rule import Rule, parse_rule

Bits = npt.NDArray[np.uint8]


class TokenMask:
    """Mask of tokens at some sites by a rule: the same on every process."""

    def __init__(
        self,
        rule: Rule,
        store: ActivationStore,
        *,
        token_ids: Sequence[int] = (),
        largest: Mapping[Site, float] | None = None,
    ) -> None:
        """Use `of`.

        Args:
            rule: what does not count.
            store: the store of the tokens.
            token_ids: ids that do not count.
            largest: norm at each site above which a token does not count; None for any.
        """
        self.rule = rule
        self.token_ids = tuple(token_ids)
        self.largest = dict(largest or {})
        self._store = store
        self._shards: dict[int, Bits] = {}

    @classmethod
    def of(cls, rule: str, store: ActivationStore, sites: Iterable[Site]) -> "TokenMask":
        """Return the mask of tokens that count at all of some sites, by a rule.

        Raises:
            ValueError: the rule cannot be read.
            TrainError: the rule names tokens that the store's tokenizer does not have.
            StoreError: the store cannot be read, or has no such site.
        """
        asked = parse_rule(rule)
        ids = _token_ids(asked, store)
        norm = asked.norm
        largest = {} if norm is None else {s: norm * store.median_norm(s) for s in sites}
        return cls(asked, store, token_ids=ids, largest=largest)

    def __call__(self, seqs: Seqs) -> Tensor:
        """Return which tokens of some sequences count, bool, [n, n_ctx].

        A shard is read once, when the first of its sequences is asked for, and kept as bits.
        """
        n_ctx, shard_seqs = self._store.manifest.n_ctx, self._store.manifest.shard_seqs
        numbers = np.asarray(seqs, dtype=np.int64)
        counted = np.ones((len(numbers), n_ctx), dtype=np.bool_)
        if self.rule.masks:
            for shard in np.unique(numbers // shard_seqs).tolist():
                here = numbers // shard_seqs == shard
                bits = self._bits(shard)[numbers[here] - shard * shard_seqs]
                counted[here] = np.unpackbits(bits, axis=1, count=n_ctx)
        return torch.from_numpy(counted)

    def read(self, seqs: Seqs) -> None:
        """Read the mask of some sequences ahead, so that nothing is read later.

        Raises:
            StoreError: the store cannot be read.
        """
        if self.rule.masks:
            for shard in np.unique(np.asarray(seqs) // self._store.manifest.shard_seqs).tolist():
                self._bits(shard)

    def n_counted(self, seqs: Seqs) -> int:
        """Return how many tokens of some sequences count."""
        return int(self(seqs).sum())

    def _bits(self, shard: int) -> Bits:
        """Return which tokens of a shard count, eight to a byte, [n_seqs, ceil(n_ctx / 8)]."""
        if shard not in self._shards:
            seqs = np.array(self._store.manifest.shard_rows(shard))
            self._shards[shard] = np.packbits(self._counted(seqs), axis=1)
        return self._shards[shard]

    def _counted(self, seqs: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        counted = np.ones((len(seqs), self._store.manifest.n_ctx), dtype=np.bool_)
        if "first" in self.rule.kinds:
            counted[:, 0] = False
        if self.token_ids:
            counted &= ~np.isin(self._store.tokens(seqs).numpy(), self.token_ids)
        for site, largest in self.largest.items():
            counted &= self._store.norms(site, seqs).numpy() <= np.float32(largest)
        return counted


def _token_ids(rule: Rule, store: ActivationStore) -> tuple[int, ...]:
    """Return the ids that a rule names.

    Raises:
        TrainError: the store's tokenizer has no such token.
    """
    facts, ids = store.manifest.tokenizer, set[int]()
    for kind, name in (("bos", "bos_token_id"), ("special", "special_token_ids")):
        if kind not in rule.kinds:
            continue
        if name not in facts:
            raise TrainError(
                f"loss_mask has {kind}, and {store.root} does not say which tokens these are (no "
                f"{name} in its manifest); leave {kind} out, or harvest again"
            )
        if facts[name] in (None, []):
            raise TrainError(
                f"loss_mask has {kind}, and the tokenizer of {store.root} has no such token; "
                f"leave {kind} out" + ("; first takes position 0" if kind == "bos" else "")
            )
        ids |= {facts[name]} if kind == "bos" else set(facts[name])
    return tuple(sorted(ids))
