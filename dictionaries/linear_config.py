"""Shapes of SAEs and transcoders, whose features read one site by a linear map."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Self

from ..sites import Ports, parse_site_names
from .choices import ports_of
from .config import DictionaryConfig, Shapes


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig(DictionaryConfig):
    """What SAEs and transcoders have in common."""

    n_features: int = field()
    """Features: one read direction, bias and write direction each."""
    prefixes: tuple[float, ...] | None = None
    """Nested parts of the features, each of which was trained to explain what all do, as shares of
    n_features that ascend and end at 1 (Matryoshka: Bussmann et al. 2025, arXiv:2503.17547)."""

    def _check_shape(self) -> None:
        if self.prefixes is not None:
            _check_prefixes(self.prefixes, self.n_features)

    @property
    def prefix_sizes(self) -> tuple[int, ...]:
        """Features in each prefix, ascending; the last has all."""
        return tuple(round(share * self.n_features) for share in self.prefixes or (1.0,))

    def token_bytes(self) -> int:
        """Return about how many bytes a token takes in a step, besides the parameters."""
        n_prefixes = len(self.prefix_sizes)
        # x, what is read, y and its gradient; y_hat, its gradient and acts of every prefix
        width = 4 * self.d_model + n_prefixes * (3 * self.d_model + 2 * self.n_slots)
        return 4 * (width + 8 * self.n_slots)

    def weight_shapes(self) -> Shapes:
        """Return the shape of every parameter but the thresholds, by name."""
        return {
            "W_E": (self.n_features, self.d_model),
            "b_E": (self.n_features,),
            "W_O": (self.n_features, self.d_model),
            "b_O": (self.d_model,),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Read what `to_dict` wrote; TypeError names a field that is missing or unknown."""
        prefixes = data.get("prefixes")
        return cls(**{**data, "prefixes": tuple(prefixes) if type(prefixes) is list else prefixes})


@dataclass(frozen=True, kw_only=True, slots=True)
class SaeConfig(LinearConfig):
    """All that decides what a sparse autoencoder computes but its weights, and where it is from."""

    kind: ClassVar[str] = "sae"
    title: ClassVar[str] = "an SAE"
    noun: ClassVar[str] = "SAE"

    site: str
    """Site of the layer that it reads and writes, one of SITE_NAMES."""

    def ports_at(self, layer: int) -> Ports:
        """Return its site of a layer, read and written."""
        return ports_of(self.kind, layer, self.site)

    def _check_shape(self) -> None:
        LinearConfig._check_shape(self)
        if parse_site_names(self.site) != (self.site,):
            raise ValueError(f"site is {self.site!r}, which is several; an SAE has one")


@dataclass(frozen=True, kw_only=True, slots=True)
class TranscoderConfig(LinearConfig):
    """All that decides what a transcoder computes but its weights, and where it came from."""

    kind: ClassVar[str] = "transcoder"
    title: ClassVar[str] = "a transcoder"
    noun: ClassVar[str] = "transcoder"

    skip: bool = False
    """Whether its input reaches the output by a linear map besides, W_skip."""

    def weight_shapes(self) -> Shapes:
        """Return the shape of every parameter but the thresholds, by name."""
        shapes = LinearConfig.weight_shapes(self)
        return shapes | ({"W_skip": (self.d_model, self.d_model)} if self.skip else {})


def _check_prefixes(prefixes: tuple[float, ...], n_features: int) -> None:
    """Raise ValueError unless shares of the features ascend to 1, and each has some of its own."""
    numbers = all(type(share) in (int, float) and 0 < share <= 1 for share in prefixes)
    sizes = [0, *(round(share * n_features) for share in prefixes)] if numbers else []
    ascend = all(a < b for a, b in pairwise(sizes))
    if not (numbers and ascend and prefixes and prefixes[-1] == 1):
        raise ValueError(
            f"prefixes are {','.join(map(str, prefixes)):.80}; allowed: shares of the {n_features} "
            "features that ascend and end at 1, as 0.06,0.25,1"
        )
