"""Geometry that the first sequences do not show: read, or found where it acts."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lorsa.errors import LanguageModelError
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.harvest import harvest
from lorsa.language import selfcheck
from lorsa.language.attention import layer_attention
from lorsa.language.blocks import attention_sites
from lorsa.language.capture import Capture
from lorsa.language.geometry import AttentionGeometry, Stretch
from lorsa.language.selfcheck import Understood, understand
from lorsa.language.stored import deriver
from lorsa.language.watch import EVERY_SEQS, Watch
from lorsa.sites import attention_ports
from lorsa.store.read.reader import ActivationStore
from tiny import GQA, N_CTX, SIZES, SPECIAL, make_model, make_tokenizer, read_layer, some_tokens
from torch import Tensor

CLIPPED: dict[str, Callable[[float], Any]] = {
    "olmo": lambda clip: transformers.OlmoConfig(**SIZES, **SPECIAL, **GQA, clip_qkv=clip),
    "olmoe": lambda clip: transformers.OlmoeConfig(
        **SIZES, **SPECIAL, **GQA, clip_qkv=clip, num_experts=2, num_experts_per_tok=1
    ),
    "mpt": lambda clip: transformers.MptConfig(
        vocab_size=400,
        d_model=32,
        n_heads=4,
        n_layers=3,
        max_seq_len=128,
        initializer_range=0.3,
        attn_config={"clip_qkv": clip, "alibi": False},
    ),
}
FAR, NEAR = 60.0, 0.5
"""Limits that no token of the first sequences reaches, and that most do"""


def _model(family: str, clip: float) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CLIPPED[family](clip)).eval()


def _understood(model: Any, tokens: Tensor | None = None) -> Understood:
    (site,) = attention_sites(model, [1])
    with Capture(model, [site]) as capture:
        return understand(
            model, site, capture.calls(some_tokens() if tokens is None else tokens)[1]
        )


@pytest.mark.parametrize("clip", [FAR, NEAR])
@pytest.mark.parametrize("family", ["olmo", "olmoe"])
def test_limits_of_queries_keys_and_values_are_read(family: str, clip: float) -> None:
    """`clip_qkv` was never read: where the first sequences stayed below it, y was wrong later."""
    model = _model(family, clip)
    (geometry, weights), x, y = read_layer(model, 1)
    assert geometry.clip == clip
    assert AttentionGeometry.from_dict(geometry.to_dict()) == geometry
    again = layer_attention(x, weights, geometry)
    assert (again - y).norm() / y.norm() < 1e-5
    without = layer_attention(x, weights, dataclasses.replace(geometry, clip=None))
    assert ((without - y).norm() / y.norm() > 0.1) == (clip == NEAR)


def test_a_geometry_without_limits_is_written_as_before() -> None:
    """Earlier versions read it too."""
    geometry = read_layer(make_model("llama-gqa"), 1)[0].geometry
    assert "clip" not in geometry.to_dict()
    assert AttentionGeometry.from_dict(geometry.to_dict()) == geometry


@pytest.mark.skipif(not hasattr(transformers, "Ministral3Config"), reason="no Ministral 3")
def test_queries_of_ministral_grow_beyond_the_length_it_was_trained_at() -> None:
    """The first positions, as many, show nothing of it."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    rope |= {"original_max_position_embeddings": 9, "llama_4_scaling_beta": 0.5}
    torch.manual_seed(0)
    config = transformers.Ministral3Config(
        **SIZES, **GQA, head_dim=8, sliding_window=None, rope_parameters=rope
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    (geometry, weights), x, y = read_layer(model, 1)
    assert geometry.stretch == Stretch(gain=0.5, every=9)
    again = layer_attention(x, weights, geometry)
    assert (again - y).norm() / y.norm() < 1e-5


def _limited(side: str) -> Callable[[Any], None]:
    def change(attention: Any) -> None:
        getattr(attention, side).register_forward_hook(lambda _m, _a, y: y.clamp(-FAR, FAR))

    return change


def _bent(attention: Any) -> None:
    attention.o_proj.register_forward_hook(lambda _m, _a, y: 1e4 * torch.tanh(y / 1e4))


def _below(attention: Any) -> None:
    attention.v_proj.register_forward_hook(
        lambda _m, _a, y: torch.where(y.abs().amax() < 2, torch.zeros_like(y), y)
    )


@pytest.mark.parametrize(
    "change",
    [_limited("q_proj"), _limited("k_proj"), _limited("v_proj"), _limited("o_proj"), _bent, _below],
    ids=["q", "k", "v", "y", "tanh", "small"],
)
def test_what_acts_on_no_token_of_the_first_sequences_is_found(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule that nothing in the model's attributes tells of."""
    model = make_model("llama-gqa")
    attention = model.model.layers[1].self_attn
    attention.v_proj.weight.data.mul_(4)
    change(attention)
    found = _understood(model)
    assert found.reading is None
    assert found.check.reason is not None
    assert "times the input of a sequence" in found.check.reason
    monkeypatch.setattr(selfcheck, "PROBES", ())
    assert _understood(model).reading is not None  # the first sequences do not show it


def test_the_largest_sequences_of_the_sample_are_compared() -> None:
    """Only the first two were."""
    model = make_model("llama-gqa")
    norm = model.model.layers[1].input_layernorm
    norm.weight.data[0] = 3.0  # a token along this direction is large, whatever came before
    model.model.embed_tokens.weight.data[399] = 0
    model.model.embed_tokens.weight.data[399, 0] = 500.0

    def odd(_module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        x = kwargs["hidden_states"]
        along = x[..., :1].abs() > 0.99 * x.norm(dim=-1, keepdim=True)
        return (torch.where(along, 2 * output[0], output[0]), *output[1:])

    tokens = some_tokens(5).clamp(max=398)
    attention = model.model.layers[1].self_attn

    class Odd(type(attention)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return odd(self, args, kwargs, super().forward(*args, **kwargs))

    attention.__class__ = Odd
    assert _understood(model, tokens).reading is not None
    tokens[3, 7] = 399
    assert _understood(model, tokens).reading is None


def _fail(*_: object) -> float:
    raise AssertionError("recomputed")


def test_the_largest_sequences_of_every_shard_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sample did not show was found by nobody."""
    model = _model("olmo", 3.0)
    (site,) = attention_sites(model, [1])
    tokens = some_tokens(6)
    with Capture(model, [site]) as capture:
        calls = capture.calls(tokens)
        reading = understand(model, site, calls[1]).reading
        assert reading is not None
        watch = Watch(model, [site], {1: reading})
        watch.see({1: calls[1].of([0, 1, 2])}, 40)
        watch.see({1: calls[1].of([3, 4, 5])}, 43)
        watch.check()
        size = calls[1].x.norm(dim=-1).amax(dim=1)
        wrong = reading._replace(geometry=dataclasses.replace(reading.geometry, clip=None))
        watch = Watch(model, [site], {1: wrong})
        watch.see(calls, 40)
        with pytest.raises(
            LanguageModelError,
            match=rf"layer 1: its attention in sequence {40 + int(size.argmax())} is not the one",
        ):
            watch.check()
        watch = Watch(model, [site], {1: reading})
        watch.see(calls, 40)
        watch.check()
        monkeypatch.setattr("lorsa.language.watch.reading_error", _fail)
        smallest = {1: calls[1].of([int(size.argmin())])}
        watch.see(smallest, 46)  # not larger than what was compared
        watch.check()
        with pytest.raises(AssertionError, match="recomputed"):
            for seq in range(47, 47 + EVERY_SEQS):
                watch.see(smallest, seq)
                watch.check()
        others = Watch(model, [site], {})  # of unknown geometry
        others.see(calls, 40)
        others.check()


def test_a_harvest_watches_every_shard(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _model("olmo", NEAR).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    settings: dict[str, Any] = {"model": str(tmp_path / "model"), "data": str(text_folder)}
    settings |= {"layers": "1", "n_ctx": N_CTX, "tokens": 40 * N_CTX, "device": "cpu"}
    settings |= {"dtype": "float32", "outputs": "derive"}
    harvest(HarvestConfig(**settings, store=tmp_path / "acts"))
    store = ActivationStore.open(tmp_path / "acts")
    facts = store.manifest.modules["1.attention"]["geometry"]
    assert facts["clip"] == NEAR
    store.activations(attention_ports(1), range(40), deriver(store, "cpu"))
    read = AttentionGeometry.from_dict
    monkeypatch.setattr(AttentionGeometry, "from_dict", lambda data: read({**data, "clip": None}))
    with pytest.raises(LanguageModelError, match=r"layer 1: its attention in sequence \d+ is not"):
        harvest(HarvestConfig(**settings, store=tmp_path / "again"))
