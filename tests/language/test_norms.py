"""What is around a layer, in every family of models: against the models themselves."""

import gc
from typing import Any

import pytest
import torch
from lorsa.analyze.attention import successors
from lorsa.analyze.attention.successors import ordinal_tokens, successor_scores
from lorsa.analyze.effects import effects
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.module import Lorsa
from lorsa.language.blocks import attention_sites
from lorsa.language.norms import Language, Norm, norm_modules, surroundings
from tiny import FAMILIES, make_model, make_tokenizer, some_tokens

LAYER = 2
"""The last: what it adds goes straight to the last norm, but for an MLP."""


def nudged(model: Any, tokens: torch.Tensor, vector: torch.Tensor, scale: float) -> torch.Tensor:
    """Return logits with a vector added to the layer's output, the MLP after it cut off."""
    site = attention_sites(model, [LAYER])[0]

    def add(module: Any, args: Any, output: Any) -> Any:
        y = (output[0] if isinstance(output, tuple) else output) + scale * vector
        return (y, *output[1:]) if isinstance(output, tuple) else y

    block = model.get_submodule(site.name.rpartition(".")[0])
    mlps = [m for name, m in block.named_modules() if name.endswith(("mlp", "fc2"))]
    handles = [site.module.register_forward_hook(add)]
    for mlp in mlps:
        handles.append(mlp.register_forward_hook(lambda m, a, out: torch.zeros_like(out)))
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits.double()


def around(model: Any) -> Language:
    found = surroundings(model, attention_sites(model, [LAYER])[0], some_tokens())
    assert found is not None
    return found


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gemma", "gemma2", "olmo2", "phi3"])
def test_effects_are_the_change_of_the_logits(family: str) -> None:
    """The direction of a small push, averaged over tokens, is that of `to_logits`."""
    model = make_model(family)
    language = around(model)
    torch.manual_seed(0)
    vector = torch.randn(model.config.hidden_size)
    pushed = nudged(model, some_tokens(8), vector, 1e-3) - nudged(model, some_tokens(8), vector, 0)
    mean = pushed.flatten(0, 1).mean(dim=0)
    mean -= mean.mean()
    found = language.to_logits(vector[None])[0].double()
    assert torch.cosine_similarity(mean, found, dim=0) > 0.9


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read(family: str) -> None:
    model = make_model(family)
    site = attention_sites(model, [1])[0]
    found = surroundings(model, site, some_tokens())
    assert found is not None
    x = found.embedded()
    assert x.shape == found.embedding.shape
    assert x.isfinite().all()
    assert found.before is not None or family.startswith(("olmo", "opt"))
    assert (found.after is not None) == family.startswith(("gemma2", "gemma3", "olmo2", "olmo3"))


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "gemma2", "olmo2", "neox-partial"])
@torch.no_grad()
def test_a_norm_is_what_its_module_computes(family: str) -> None:
    model = make_model(family)
    modules = norm_modules(model, attention_sites(model, [1])[0])
    h = 100 * torch.randn(2, 5, model.config.hidden_size)
    for module in modules:
        if module is not None:
            norm = Norm.read(module, model.config.hidden_size)
            found = norm.apply(h).double() + norm.bias
            torch.testing.assert_close(found, module(h).double(), rtol=1e-4, atol=1e-4)
            for size in (1e-4, 1.0, 1e4):  # where eps is most of it, and where it is nothing
                torch.testing.assert_close(
                    norm.output(size * h), module(size * h), rtol=1e-4, atol=1e-4
                )


def _alive() -> dict[int, int]:
    """Return the bytes of every tensor's memory, by its address."""
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    return {t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_no_norm_is_kept_for_the_whole_text() -> None:
    """Input and output of every norm were kept for all tokens, and logits made, in gigabytes."""
    model = make_model("gemma2")
    n_norms = sum("Norm" in type(m).__name__ for m in model.modules())
    tokens = torch.arange(8 * 64).view(8, 64) % 400
    one = tokens.numel() * model.config.hidden_size * 4
    before, kept = _alive(), []

    def count(module: Any, args: Any) -> None:
        kept.append(sum(size for at, size in _alive().items() if at not in before))

    (site,) = attention_sites(model, [1])
    model.get_output_embeddings().register_forward_pre_hook(count)
    model.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("logits were made"))
    assert surroundings(model, site, tokens) is not None
    assert n_norms == 13
    assert max(kept) < 2 * one  # what the unembedding is given, and masks


def test_tokens_are_listed_by_their_effect() -> None:
    model = make_model("llama-gqa")
    language = around(model)
    lorsa = _lorsa(model.config.hidden_size)
    found = effects(lorsa, language, torch.tensor([2.0, float("nan"), 1.0, 1.0]), 300)
    logits = language.to_logits(2 * lorsa.W_O[:1])[0, :300]
    assert found.promoted[0][0].tolist() == logits.topk(10).indices.tolist()
    assert found.suppressed[0][0].tolist() == (-logits).topk(10).indices.tolist()
    read = language.embedded()[:300] @ lorsa.W_V[3]
    assert found.reads_embedding[0][3].tolist() == read.topk(10).indices.tolist()


def test_a_head_that_turns_a_word_into_the_next_is_a_successor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(successors, "LEAST_WORDS", 1)
    monkeypatch.setattr(successors, "LEAST_CLASSES", 1)
    model = make_model("llama-gqa")
    language = around(model)
    lorsa = _lorsa(model.config.hidden_size)
    ids = [50, 60, 70, 80]
    xs = torch.eye(4, model.config.hidden_size)
    with torch.no_grad():
        lorsa.b_V.zero_()
        lorsa.W_V.zero_()
        lorsa.W_V[:, 1] = 1.0  # reads the second word
        unembed = language.unembedding[ids] * language.last.norm.weight.float()
        targets = torch.eye(4)[[2, 1, 3, 0]] * 10  # writes the third, second, fourth, first
        lorsa.W_O.copy_(targets @ torch.linalg.pinv(unembed).T)
    found = successor_scores(lorsa, language, [ids], [xs], torch.ones(4))
    assert found.score.tolist() == [1, 0, 0, 0]
    barely = successor_scores(lorsa, language, [ids], [xs], torch.tensor([2.0, 1, 1, torch.nan]))
    assert barely.score.isnan().tolist() == [True, False, False, True]


def test_ordinal_words_are_looked_up() -> None:
    classes = ordinal_tokens(make_tokenizer())
    letters = make_tokenizer()("ABC")["input_ids"]
    assert letters in [ids[:3] for ids in classes]


def _lorsa(d_model: int) -> Lorsa:
    torch.manual_seed(1)
    config = LorsaConfig(
        d_model=d_model, n_qk_heads=2, d_qk_head=4, n_ov_heads=4, top_k=2, scale=0.5
    )
    lorsa = Lorsa(config)
    with torch.no_grad():
        for parameter in lorsa.parameters():
            parameter.normal_()
    return lorsa
