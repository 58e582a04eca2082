"""The causal check of types: who is ablated, the others beside them, what is verified."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lorsa.analyze.attention.families import (
    LEAST_EFFECT,
    N_DRAWS,
    _alike,
    _family,
    _groups,
    _look,
    _loss_without,
    verify_families,
)
from lorsa.analyze.attention.probes import probe_tokens
from lorsa.circuits.intervene import intervene
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.evaluate.in_model import logits_of
from lorsa.language.blocks import attention_sites
from lorsa.language.subject import Subject
from lorsa.train.train import train
from runs import config
from torch.nn.functional import cross_entropy

LAYER = 1


@pytest.fixture(scope="module")
def parts(
    store_folder: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Lorsa, Any, Any, torch.Tensor]:
    out = tmp_path_factory.mktemp("families") / "run"
    train(config(store_folder, out, {}))
    model = Subject.find(str(model_folder)).load(devices=["cpu"])
    (site,) = attention_sites(model, [LAYER])
    return Lorsa.from_pretrained(out), model, site, probe_tokens(np.arange(20), n_ctx=15, bos=3)


def test_the_loss_is_that_of_the_model_without_the_heads(parts: Any) -> None:
    lorsa, model, site, tokens = parts
    probed = _look(lorsa, model, site, tokens)
    heads = np.argsort(-probed.written)[:5].tolist()
    half = tokens.shape[1] // 2
    for ablated in ([], heads):
        with torch.no_grad(), intervene(model, lorsa, LAYER, dict.fromkeys(ablated, 0.0)):
            logits = logits_of(model, tokens)
        expected = [
            float(cross_entropy(row[-half:-1], ids[-half + 1 :]))
            for row, ids in zip(logits, tokens, strict=True)
        ]
        found = _loss_without(lorsa, model, site, probed, ablated)
        assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_what_heads_write_is_counted_where_they_fire(parts: Any) -> None:
    lorsa, model, site, tokens = parts
    probed = _look(lorsa, model, site, tokens)
    z = torch.zeros(*tokens.shape, lorsa.config.n_ov_heads)
    z.scatter_add_(2, probed.code.ids.long(), probed.code.acts)
    expected = z.abs().sum(dim=(0, 1)) * lorsa.W_O.norm(dim=1)
    assert probed.written.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_others_write_as_much_and_are_of_no_family() -> None:
    rng = np.random.default_rng(0)
    written = np.exp(rng.normal(0, 2, 4000))
    written[::10] = 0
    family = np.argsort(-written)[5:400:4].tolist()
    family = [head for head in family if written[head] > 0]
    alike = [*family, *range(3000, 3200)]
    groups = _groups(written, family, alike)
    assert len(groups) == 1 + N_DRAWS
    assert groups[0] == family
    for drawn in groups[1:]:
        assert len(set(drawn)) == len(family)
        assert not set(drawn) & set(alike)
        assert written[drawn].min() > 0
        assert written[drawn].sum() == pytest.approx(written[family].sum(), rel=0.1)
    assert groups[1] != groups[2]
    drawn = _alike(written, family[50:51], np.flatnonzero(written > 0), rng)
    assert np.log(written[drawn[0]] / written[family[50]]) == pytest.approx(0, abs=0.5)


def test_a_family_without_enough_others_is_not_told() -> None:
    written = np.ones(10)
    assert _groups(written, list(range(6)), list(range(6))) == []
    assert _groups(written, [1, 2], list(range(9))) == []
    assert _groups(written, [], []) == []
    assert _groups(np.zeros(10), [1, 2], [1, 2]) == []


@pytest.mark.parametrize(
    ("effect", "null", "written", "verified"),
    [
        (0.47, [0.0, 0.01, -0.01, 0.0, 0.01, 0.0], 1.0, True),
        (0.47, [0.5, -0.4, 0.3, -0.5, 0.1, 0.2], 1.0, False),
        (LEAST_EFFECT / 2, [0.0] * 6, 1.0, False),
        (-0.1, [0.0] * 6, 1.0, False),
        (0.47, [0.01] * 6, 0.4, False),
        (0.47, [0.01] * 6, 0.6, True),
        (0.47, [0.3] * 6, 0.6, False),
    ],
)
def test_a_family_is_verified_above_the_others_only(
    effect: float, null: list[float], written: float, verified: bool
) -> None:
    noise = 0.001 * torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    effects = torch.tensor([effect, *null], dtype=torch.float64)[:, None] + noise
    found = _family(5, effects, [2.0, *[2.0 * written] * 6])
    assert found.verified == verified
    assert found.low < found.effect - np.mean(found.null) + 1e-9
    assert found.writes == pytest.approx(written)


def test_only_types_of_which_probes_can_tell_are_checked(parts: Any) -> None:
    lorsa, model, site, tokens = parts
    told: list[Any] = []
    families = {"induction": [0, 1, 2], "local": [3, 4], "first_token": [5]}
    families |= {"previous_token": [], "duplicate_token": []}
    found = verify_families(lorsa, model, site, tokens, families, families, told.append)
    assert set(found) <= {"induction"}
    assert told[-1].done == told[-1].total
