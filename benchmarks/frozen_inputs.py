"""What frozen jobs work on: tiny models with random weights, and two folders of text."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

GROUPS = "num_key_value_heads"
SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    GROUPS: 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
WINDOWS: dict[str, Any] = {
    "sliding_window": 7,
    "head_dim": 16,
    "layer_types": ["sliding_attention"] * 3,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "small": (
        "LlamaConfig",
        SIZES | {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 2},
    ),
    "qwen3": ("Qwen3Config", SIZES | {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        SIZES | WINDOWS | {"query_pre_attn_scalar": 4, "attn_logit_softcapping": 2.0},
    ),
    "neox": (
        "GPTNeoXConfig",
        {k: v for k, v in SIZES.items() if k != GROUPS} | {"rotary_pct": 0.25},
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 400,
            "n_positions": 128,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "initializer_range": 0.3,
        },
    ),
}
"""Class of the config and its settings, by name."""
SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on. "
    "A store keeps what a model saw; a head reads one thing and writes another. "
)


def make_inputs(folder: Path) -> None:
    """Write the models with their tokenizer, and two folders of text."""
    tokenizer = make_tokenizer()
    for name, (kind, settings) in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**settings)
        eager = {"attn_implementation": "eager"} if name == "gemma2" else {}
        model = transformers.AutoModelForCausalLM.from_config(config, **eager)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("bias"):
                    parameter.normal_(std=0.3)
                elif "norm" in parameter_name or "ln_" in parameter_name:
                    parameter.uniform_(0.5, 1.5)
        model.save_pretrained(folder / "models" / name)
        tokenizer.save_pretrained(folder / "models" / name)
    words = (SENTENCES * 12).split()
    for text, some in (("text", words), ("text-b", words[::-1])):
        (folder / text).mkdir(parents=True)
        for i in range(12):
            turned = some[i * 7 :] + some[: i * 7]
            (folder / text / f"doc{i}.txt").write_text(" ".join(turned), "utf-8")


def make_tokenizer() -> Any:
    """Return a byte-level tokenizer of 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCES * 12], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>"
    )
