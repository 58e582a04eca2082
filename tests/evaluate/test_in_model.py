"""The language model with layers replaced, against plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lorsa.evaluate.in_model import run_variants, token_figures
from lorsa.language.blocks import attention_sites
from lorsa.language.capture import Capture
from lorsa.language.edit import attention_gap
from tiny import make_model, some_tokens
from torch import Tensor


def test_a_perfect_stand_in_changes_nothing() -> None:
    model = make_model("llama-gqa")
    (site,) = attention_sites(model, [1])
    tokens = some_tokens()
    with Capture(model, [site]) as capture:
        y = capture.calls(tokens)[1].y
    gap = attention_gap(site)
    variants = {"same": [(gap, lambda _x: y)], "zero": [(gap, torch.zeros_like)]}
    original, found = run_variants(model, tokens, variants)
    assert torch.allclose(found["same"].loss, original.loss, rtol=1e-5)
    assert found["same"].kl.abs().max() < 1e-6
    assert found["same"].agrees.all()
    assert not torch.allclose(found["zero"].loss, original.loss, rtol=1e-4)
    assert (found["zero"].kl > 0.01).any()


def test_the_loss_is_torchs_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorsa.evaluate import in_model

    model = make_model("qwen2")
    tokens = torch.randint(0, 400, (9, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    monkeypatch.setattr(in_model, "FORWARD_TOKENS", 25)
    told: list[int] = []
    found, _none = run_variants(model, tokens, {}, told.append)
    assert found.loss.shape == (9, 11)
    assert torch.allclose(found.loss, expected.double(), rtol=1e-4)
    assert told == [24, 48, 72, 96, 108]


def test_kl_and_agreement_are_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 2, 600, 31, generator=generator)  # more tokens than one block
    targets = torch.randint(0, 31, (2, 600), generator=generator)
    found = token_figures(q, p, targets)
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    assert torch.allclose(found.kl, kl.double(), atol=1e-5)
    assert torch.equal(found.agrees, p.argmax(-1) == q.argmax(-1))
    loss = F.cross_entropy(q.transpose(1, 2), targets, reduction="none")
    assert torch.allclose(found.loss, loss.double(), atol=1e-5)


def test_two_layers_are_replaced_at_once() -> None:
    model = make_model("llama-gqa")
    sites = attention_sites(model, [0, 2])
    tokens = some_tokens()
    both: list[tuple[Any, Callable[[Tensor], Tensor]]] = [
        (attention_gap(site), torch.zeros_like) for site in sites
    ]
    _original, found = run_variants(model, tokens, {"both": both})
    with torch.no_grad():
        for site in sites:
            site.module.o_proj.weight.zero_()
    edited, _none = run_variants(model, tokens, {})
    assert torch.allclose(found["both"].loss, edited.loss, rtol=1e-5)
