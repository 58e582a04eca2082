"""Tiny language models of real transformers classes with random weights, and a tokenizer."""

import json
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

N_CTX = 32
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

FAMILIES: dict[str, Any] = {
    "llama-mha": lambda: transformers.LlamaConfig(**SIZES),
    "llama-gqa": lambda: transformers.LlamaConfig(**SIZES, **GQA),
    "llama-mqa-bias": lambda: transformers.LlamaConfig(
        **SIZES, num_key_value_heads=1, attention_bias=True
    ),
    "llama-wide-heads": lambda: transformers.LlamaConfig(**SIZES, **GQA, head_dim=16),
    "llama-llama3-rope": lambda: transformers.LlamaConfig(**SIZES, **GQA, **_rope(LLAMA3_ROPE)),
    "llama-yarn-rope": lambda: transformers.LlamaConfig(**SIZES, **GQA, **_rope(YARN_ROPE)),
    "mistral": lambda: transformers.MistralConfig(**SIZES, **GQA, sliding_window=None),
    "mistral-window": lambda: transformers.MistralConfig(**SIZES, **GQA, sliding_window=7),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, **GQA),
    "qwen2-window": lambda: transformers.Qwen2Config(
        **SIZES, **GQA, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, **GQA, head_dim=8),
    "neox-partial": lambda: transformers.GPTNeoXConfig(**SIZES, rotary_pct=0.25),
    "neox-full": lambda: transformers.GPTNeoXConfig(
        **SIZES, rotary_pct=1.0, use_parallel_residual=False
    ),
}


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Spell rotary settings as this version of transformers takes them."""
    if int(transformers.__version__.split(".")[0]) >= 5:
        return {"rope_parameters": parameters}
    scaling = {k: v for k, v in parameters.items() if k != "rope_theta"}
    return {"rope_theta": parameters["rope_theta"], "rope_scaling": scaling}


def make_model(family: str, seed: int = 0) -> Any:
    """Return a tiny model with random weights; biases and norms random too."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


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
