"""Settings of a trace."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ...checks import require_at_least, require_one_of
from ...language.choices import DEVICES
from ...language.spelling import parse_ids

LOGITS = "logits"
_FEATURE = re.compile(
    r"feature:(?P<place>[^/@]+)/(?P<feature>\d{1,18})(?:@(?P<position>\d{1,18}))?"
)
_NAME = re.compile(r"[\w.+-]{1,100}")


class FeatureTarget(NamedTuple):
    """A feature that is traced in place of logits."""

    place: str
    """Place of its dictionary: layer-12 of a Lorsa, 12.mlp of a transcoder"""
    feature: int
    position: int | None
    """Token at which it fires; None takes where it fires most"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceConfig:
    """What a trace of a prompt is asked for."""

    runs: tuple[Path, ...]
    """Run folders of dictionaries, each of another place: Lorsas, transcoders, SAEs."""
    model: str
    """Language model, as for harvest."""
    prompt: str | None = None
    """Text that the model reads, after its BOS if it has one."""
    tokens: str | None = None
    """Token ids in place of a prompt, as they are: 5,17,301."""
    tokens_file: Path | None = None
    """File with token ids in place of a prompt, apart by commas or spaces."""
    target: str = LOGITS
    """What is explained: logits, a token, its id as #17, or feature:12.mlp/301@5. The
    likeliest next tokens are `logits`; the feature is number 301 of the transcoder of layer 12, at
    token 5 of the prompt."""
    less: str | None = None
    """Token, or its id as #17, whose logit is taken off the target's."""
    max_logits: int = 10
    """Next tokens that are explained at most."""
    logit_prob: float = 0.95
    """Probability that they have together, if so many are enough."""
    keep: int = 256
    """Edges that are kept of a node, the largest; the rest is summed up, and counts as error."""
    explore: float = 0.999
    """Share of the influence on a layer that is traced on; the rest counts as error."""
    node_threshold: float = 0.8
    """Share of the influence of errors, and of all other nodes, that those written have."""
    edge_threshold: float = 0.98
    """Share of the influence between these nodes that the edges written have."""
    qk: int = 8
    """QK heads of Lorsas, each at a token, whose choice of a key is taken apart, those with the
    most influence; 0 leaves it out."""
    out: Path = Path("traces")
    """Folder of traces."""
    name: str | None = None
    """Name of the trace in it. None takes the prompt's words and a checksum of the request."""
    device: str = "auto"
    """Device to compute on: auto, cpu or cuda."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(Path(run) for run in self.runs))
        object.__setattr__(self, "out", Path(self.out))
        if self.tokens_file is not None:
            object.__setattr__(self, "tokens_file", Path(self.tokens_file))
        self._check_prompt()
        self._check_target()
        if not self.runs:
            raise ValueError("runs is empty; give at least one run folder")
        if self.name is not None and not (_NAME.fullmatch(self.name) and self.name.strip(".")):
            raise ValueError(f"name is {self.name!r}; allowed: letters, digits, . _ + - up to 100")
        require_at_least(self, 1, "max_logits", "keep")
        require_at_least(self, 0, "qk")
        require_one_of(self, device=DEVICES)
        for field in ("logit_prob", "explore", "node_threshold", "edge_threshold"):
            if not 0 < (value := getattr(self, field)) <= 1:
                raise ValueError(f"{field} is {value}; allowed: above 0, at most 1")

    def _check_prompt(self) -> None:
        given = [self.prompt, self.tokens, self.tokens_file]
        if sum(each is not None for each in given) != 1:
            raise ValueError("give one of --prompt TEXT, --tokens 5,17,301 and --tokens-file FILE")
        if self.prompt == "":
            raise ValueError("prompt is empty; give some text")
        if self.tokens is not None:
            parse_ids("tokens", self.tokens)

    def _check_target(self) -> None:
        if self.target == "" or self.less == "":
            raise ValueError("target is empty; give logits, a token, or feature:12.mlp/301@5")
        if self.target.startswith("feature:") and _FEATURE.fullmatch(self.target) is None:
            raise ValueError(f"target is {self.target!r}; a feature is feature:12.mlp/301@5")
        if self.less is not None and (self.target == LOGITS or self.target_feature is not None):
            raise ValueError("less takes a token off another; give --target TOKEN")

    @property
    def target_feature(self) -> FeatureTarget | None:
        """The feature that is the target; None of logits."""
        found = _FEATURE.fullmatch(self.target)
        if found is None:
            return None
        position = found["position"]
        return FeatureTarget(
            found["place"], int(found["feature"]), None if position is None else int(position)
        )
