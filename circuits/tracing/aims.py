"""Aims of a trace, which it explains: logits, one logit, a difference of two, or a feature."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import AnalyzeError
from .config import LOGITS, FeatureTarget
from .frozen import Frozen, Goal
from .goals import difference, likeliest, logit
from .nodes import FEATURE, LOGIT, Nodes
from .opened import Opened


class Aims(NamedTuple):
    """What a trace explains, each with its weight."""

    goals: tuple[Goal, ...]
    """Logits, by position and token; none where a feature is explained"""
    tokens: tuple[tuple[int, int | None], ...]
    """Token of each goal, and the one that is taken off"""
    texts: dict[int, str | None]
    """Texts of these tokens"""
    feature: tuple[int, int, int] | None = None
    """Run, feature and position of a feature that is explained"""

    def weights(self, nodes: Nodes) -> Tensor:
        """Return the weights of the targets among a trace's nodes, which add up to 1, [n]."""
        found = torch.zeros(len(nodes), dtype=torch.float64)
        if self.feature is None:
            (at,) = torch.where(nodes.kind == LOGIT)
            found[at] = torch.tensor([goal.probability for goal in self.goals]).double()
        else:
            run, feature, position = self.feature
            same = (nodes.run == run) & (nodes.feature == feature) & (nodes.position == position)
            found[same & (nodes.kind == FEATURE)] = 1.0
        return found / found.sum()

    def facts(self, nodes: Nodes, number: Tensor) -> list[dict[str, Any]]:
        """Return the targets as trace.json has them.

        Args:
            nodes: of the whole graph.
            number: of each of them in what is written, [n].
        """
        weights = self.weights(nodes)
        found: list[dict[str, Any]] = []
        for i, at in enumerate(weights.nonzero()[:, 0].tolist()):
            target: dict[str, Any] = {"node": int(number[at]), "weight": float(weights[at])}
            if self.feature is None:
                token, less = self.tokens[i]
                target |= self._spelled(token)
                target["less"] = None if less is None else self._spelled(less)
                target["probability"] = None if less is not None else self.goals[i].probability
                target["value"] = self.goals[i].value
            else:
                target |= {"token": None, "text": None, "less": None, "probability": None}
                target["value"] = float(nodes.value[at])
            found.append(target)
        return found

    def _spelled(self, token: int) -> dict[str, Any]:
        return {"token": token, "text": self.texts[token]}


def find_aims(request: Opened, frozen: Frozen) -> Aims:
    """Return what a request explains.

    Raises:
        AnalyzeError: its target is no token, or a feature that is not there or does not fire.
    """
    config = request.config
    if (feature := config.target_feature) is not None:
        return Aims((), (), {}, _feature(request, frozen, feature))
    if config.target == LOGITS:
        found = likeliest(frozen, n=config.max_logits, mass=config.logit_prob)
        goals = sorted(found, key=lambda goal: goal.token)
        tokens: list[tuple[int, int | None]] = [(goal.token, None) for goal in goals]
    else:
        token = request.token(config.target)
        if config.less is None:
            goals, tokens = [logit(frozen, token)], [(token, None)]
        else:
            other = request.token(config.less)
            if other == token:
                raise AnalyzeError(f"target and less are both {config.less!r}: nothing is left")
            goals, tokens = [difference(frozen, token, other)], [(token, other)]
    ids = {i for pair in tokens for i in pair if i is not None}
    return Aims(tuple(goals), tuple(tokens), {i: request.spell(i) for i in ids})


def _feature(request: Opened, frozen: Frozen, wanted: FeatureTarget) -> tuple[int, int, int]:
    """Return run, feature and position of a feature that is to be explained."""
    places = [dictionary.config.place for dictionary in request.dictionaries]
    if wanted.place not in places:
        raise AnalyzeError(f"no run is of {wanted.place}; the runs are of {', '.join(places)}")
    run = places.index(wanted.place)
    n = request.dictionaries[run].config.n_features
    if wanted.feature >= n:
        raise AnalyzeError(f"feature {wanted.feature} is outside {wanted.place}; it has 0-{n - 1}")
    module = next(module for module in frozen.modules if module.run == run)
    assert module.code is not None
    acts, ids = module.code
    fires = ((ids == wanted.feature) & (acts != 0)).any(dim=1).nonzero()[:, 0].tolist()
    at = f"feature {wanted.feature} of {wanted.place}"
    if not fires:
        raise AnalyzeError(f"{at} does not fire on this prompt, so there is nothing to explain")
    if wanted.position is None:
        strength = (acts.abs() * (ids == wanted.feature)).amax(dim=1)
        return run, wanted.feature, int(strength.argmax())
    if wanted.position not in fires:
        where = ", ".join(map(str, fires[:10]))
        raise AnalyzeError(f"{at} does not fire at token {wanted.position}; it fires at {where}")
    return run, wanted.feature, wanted.position
