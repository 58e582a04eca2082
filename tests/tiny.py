"""Tiny language models of real transformers classes with random weights, and a tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from lorsa.dictionaries.lorsa.config import LorsaConfig
from lorsa.dictionaries.lorsa.start import scored_as
from lorsa.language.attention import Reading
from lorsa.language.blocks import attention_sites
from lorsa.language.capture import Capture
from lorsa.language.geometry import AttentionGeometry
from lorsa.language.selfcheck import understand
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

N_CTX = 32
NEW = int(transformers.__version__.split(".")[0]) >= 5
TEXT = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on. "
    "A store keeps what a model saw; a head reads one thing and writes another. "
) * 12

SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
GQA = {"num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}

LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 16,
}
SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
"""For classes whose usual ids lie beyond a small vocabulary."""
LAYER_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA2 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 4,
    "attn_logit_softcapping": 2.0,
    "sliding_window": 7,
    "layer_types": LAYER_TYPES,
}
GEMMA3 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 7,
    "layer_types": LAYER_TYPES,
}
LLAMA4 = {
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
    "attention_chunk_size": 9,
    "floor_scale": 5,
    "attn_scale": 0.4,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 3,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GPT2 = {
    "vocab_size": 400,
    "n_positions": 128,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "initializer_range": 0.3,
}

FAMILIES: dict[str, Any] = {
    "llama-mha": lambda: transformers.LlamaConfig(**SIZES),
    "llama-gqa": lambda: transformers.LlamaConfig(**SIZES, **GQA),
    "llama-mqa-bias": lambda: transformers.LlamaConfig(
        **SIZES, num_key_value_heads=1, attention_bias=True
    ),
    "llama-wide-heads": lambda: transformers.LlamaConfig(**SIZES, **GQA, head_dim=16),
    "llama-llama3-rope": lambda: transformers.LlamaConfig(**SIZES, **GQA, **_rope(LLAMA3_ROPE)),
    "llama-yarn-rope": lambda: transformers.LlamaConfig(**SIZES, **GQA, **_rope(YARN_ROPE)),
    "llama4": lambda: transformers.Llama4TextConfig(
        **SPECIAL,
        **SIZES,
        **GQA,
        **LLAMA4,
        head_dim=8,
        no_rope_layers=[1, 0, 1],
    ),
    "llama4-no-norm": lambda: transformers.Llama4TextConfig(
        **SPECIAL,
        **SIZES,
        **GQA,
        **LLAMA4,
        head_dim=8,
        no_rope_layers=[0, 1, 0],
        use_qk_norm=False,
    ),
    "mistral": lambda: transformers.MistralConfig(**SIZES, **GQA, sliding_window=None),
    "mistral-window": lambda: transformers.MistralConfig(**SIZES, **GQA, sliding_window=7),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, **GQA),
    "qwen2-window": lambda: transformers.Qwen2Config(
        **SIZES, **GQA, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, **GQA, head_dim=8),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES, **GQA, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16
    ),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, **GQA, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **SIZES, **GQA, num_local_experts=2, num_experts_per_tok=1
    ),
    "smollm3": lambda: transformers.SmolLM3Config(
        **SPECIAL, **SIZES, **GQA, no_rope_layers=[1, 0, 1]
    ),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, **GQA, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, **GQA, **GEMMA2),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, **GQA, **GEMMA3),
    "gemma3-multimodal": lambda: transformers.Gemma3Config(
        text_config={**SIZES, **GQA, **GEMMA3}, vision_config=VISION
    ),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt2-by-layer": lambda: transformers.GPT2Config(
        **GPT2, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True
    ),
    "gpt-neo": lambda: transformers.GPTNeoConfig(
        vocab_size=400,
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        attention_types=[[["global", "local", "global"], 1]],
        window_size=6,
        max_position_embeddings=128,
        initializer_range=0.2,
    ),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **SPECIAL, **SIZES, **LATENT, n_routed_experts=2, n_group=1, topk_group=1
    ),
    "deepseek-v3-yarn": lambda: transformers.DeepseekV3Config(
        **SPECIAL,
        **SIZES,
        **{**LATENT, "q_lora_rank": None},
        n_routed_experts=2,
        n_group=1,
        topk_group=1,
        **_rope({**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 1.0}),
    ),
    "deepseek-v2": lambda: transformers.DeepseekV2Config(
        **SPECIAL, **SIZES, **LATENT, n_routed_experts=2, n_group=1, topk_group=1
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SPECIAL,
        **{**SIZES, "num_hidden_layers": 3},
        **GQA,
        head_dim=8,
        sliding_window=6,
        layer_types=LAYER_TYPES,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
    "qwen3-next": lambda: transformers.Qwen3NextConfig(
        **SPECIAL,
        **SIZES,
        **GQA,
        head_dim=16,
        layer_types=["full_attention"] * 3,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "qwen3-5": lambda: transformers.Qwen3_5TextConfig(
        **SPECIAL,
        **SIZES,
        **GQA,
        head_dim=16,
        attention_bias=True,
        layer_types=["full_attention"] * 3,
    ),
    "phi": lambda: transformers.PhiConfig(**SIZES, **GQA, partial_rotary_factor=0.5),
    "phi-norm": lambda: transformers.PhiConfig(
        **SIZES, **GQA, partial_rotary_factor=0.5, qk_layernorm=True
    ),
    "phi3": lambda: transformers.Phi3Config(**SPECIAL, **SIZES, **GQA, sliding_window=9),
    "phi3-longrope": lambda: transformers.Phi3Config(
        **SPECIAL,
        **(SIZES | {"max_position_embeddings": 64}),
        **GQA,
        original_max_position_embeddings=16,
        **_rope(LONG_ROPE),
    ),
    "olmo": lambda: transformers.OlmoConfig(**SPECIAL, **SIZES, **GQA, clip_qkv=1.0),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES, **GQA),
    "olmo3": lambda: transformers.Olmo3Config(
        **SIZES, **GQA, sliding_window=6, layer_types=LAYER_TYPES
    ),
    "stablelm": lambda: transformers.StableLmConfig(**SIZES, **GQA, use_qkv_bias=True),
    "stablelm-norm": lambda: transformers.StableLmConfig(
        **SIZES, **GQA, qk_layernorm=True, use_parallel_residual=True
    ),
    "starcoder2": lambda: transformers.Starcoder2Config(**SIZES, **GQA, sliding_window=8),
    "granite": lambda: transformers.GraniteConfig(**SIZES, **GQA, attention_multiplier=0.2),
    "cohere": lambda: transformers.CohereConfig(**SIZES, **GQA, use_qk_norm=True),
    "cohere2": lambda: transformers.Cohere2Config(
        **SIZES, **GQA, sliding_window=6, layer_types=LAYER_TYPES
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=400,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        init_std=0.3,
    ),
    "falcon": lambda: transformers.FalconConfig(
        **SIZES, multi_query=True, new_decoder_architecture=False
    ),
    "falcon-new": lambda: transformers.FalconConfig(
        **SIZES, new_decoder_architecture=True, num_kv_heads=2
    ),
    "falcon-alibi": lambda: transformers.FalconConfig(
        **SIZES, alibi=True, new_decoder_architecture=False
    ),
    "falcon-alibi-rounded": lambda: transformers.FalconConfig(
        **{**SIZES, "num_attention_heads": 16},
        alibi=True,
        multi_query=False,
        new_decoder_architecture=False,
    ),
    "mpt": lambda: transformers.MptConfig(
        vocab_size=400, d_model=32, n_heads=4, n_layers=3, max_seq_len=128, initializer_range=0.3
    ),
    "neox-partial": lambda: transformers.GPTNeoXConfig(**SIZES, rotary_pct=0.25),
    "neox-full": lambda: transformers.GPTNeoXConfig(
        **SIZES, rotary_pct=1.0, use_parallel_residual=False
    ),
}
LATENTS = ("deepseek-v2", "deepseek-v3", "deepseek-v3-yarn")
"""Families whose queries, keys and values are not linear in x, as those of a Lorsa are."""
NOT_EXACT = ("olmo", *LATENTS)
"""Families whose values alone are not, besides those."""
OTHERS: dict[str, Any] = {
    "gptj": lambda: transformers.GPTJConfig(
        vocab_size=400,
        n_positions=128,
        n_embd=32,
        n_layer=3,
        n_head=4,
        rotary_dim=4,
        initializer_range=0.3,
    ),
    "bloom": lambda: transformers.BloomConfig(
        **SPECIAL, vocab_size=400, hidden_size=32, n_head=4, n_layer=3, initializer_range=0.3
    ),
    "bitnet": lambda: transformers.BitNetConfig(**SPECIAL, **SIZES, **GQA),
    "codegen": lambda: transformers.CodeGenConfig(
        **SPECIAL,
        vocab_size=400,
        n_positions=128,
        n_embd=32,
        n_layer=3,
        n_head=4,
        rotary_dim=4,
        initializer_range=0.3,
    ),
}
"""Models that are not called supported: GPT-J is understood all the same, the others are not."""

if not NEW:
    del FAMILIES["stablelm-norm"]  # transformers 4 cannot make one at random
if not hasattr(transformers, "Qwen3_5TextConfig"):
    del FAMILIES["qwen3-5"]


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Spell rotary settings as this version of transformers takes them."""
    if NEW:
        return {"rope_parameters": parameters}
    scaling = {k: v for k, v in parameters.items() if k != "rope_theta"}
    if parameters["rope_type"] == "longrope":
        scaling = {k: v for k, v in scaling.items() if k.endswith("_factor")} | {"type": "longrope"}
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": scaling}


def make_model(family: str, seed: int = 0, *, eager: bool = False) -> Any:
    """Return a tiny model with random weights; biases and norms random too.

    eager: whether it uses transformers' plain attention, which gives its patterns.
    """
    torch.manual_seed(seed)
    config = (FAMILIES | OTHERS)[family]()
    capped = family == "gemma2"  # softcap, which others than eager leave out
    settings = {"attn_implementation": "eager"} if eager or capped else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif name.endswith("sinks"):
                parameter.normal_()
            elif "norm" in name or "ln_" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def some_tokens(n: int = 2, seed: int = 1) -> Tensor:
    """Return random token ids, [n, N_CTX]."""
    return torch.randint(0, 400, (n, N_CTX), generator=torch.Generator().manual_seed(seed))


def read_layer(
    model: Any, layer: int, tokens: Tensor | None = None
) -> tuple[Reading, Tensor, Tensor]:
    """Return how a layer is read, with its x and y on some tokens, [n, N_CTX, d_model]."""
    site = attention_sites(model, [layer])[0]
    with Capture(model, [site]) as capture:
        call = capture.calls(some_tokens() if tokens is None else tokens)[layer]
    reading = understand(model, site, call).reading
    assert reading is not None
    return reading, call.x.clone(), call.y.clone()


def config_like(geometry: AttentionGeometry, **settings: Any) -> LorsaConfig:
    """Return the config of a Lorsa whose heads attend as a layer's; unless set, as many of them."""
    sizes = {"d_model": geometry.d_model, "d_qk_head": geometry.d_head}
    n_qk_heads = settings.get("n_qk_heads", geometry.n_heads)
    alike = scored_as(geometry, n_qk_heads)
    return LorsaConfig(**{**sizes, "n_qk_heads": n_qk_heads, **alike, **settings})


def make_tokenizer() -> Any:
    """Return a byte-level tokenizer of 400 tokens with an end-of-text token and no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>"
    )


def write_gguf(path: Path, model: Any, tokenizer: Any) -> None:
    """Write a tiny Llama and its tokenizer as llama.cpp keeps them, in float32."""
    import gguf  # the rest of this file needs what lorsa itself needs

    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(content["vocab"], key=content["vocab"].get))
    writer.add_token_merges([" ".join(merge) for merge in content["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if not NEW:  # transformers 4 cannot read a file without one
        writer.add_bos_token_id(tokenizer.eos_token_id)
        writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbouring channels
            heads = len(weight) // model.config.head_dim
            halves = weight.view(heads, 2, -1, weight.shape[1])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        stem, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
