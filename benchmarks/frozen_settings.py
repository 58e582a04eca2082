"""What frozen jobs are asked for: encodings of stores, settings of runs, command lines."""

from typing import Any

N_CTX, LAYER = 24, 1
STEP = 4 * N_CTX
MAIN = "acts/bfloat16-none-store"
MODES = [
    (dtype, compression, outputs)
    for dtype in ("float32", "bfloat16", "float16", "int8")
    for compression in ("none", "lz4", "zstd")
    for outputs in ("store", "derive")
    if (dtype, compression) != ("int8", "lz4")
]
RUNS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk, abs": {"select": "abs"},
    "batchtopk": {"activation": "batchtopk"},
    "batchtopk, max_l0": {"activation": "batchtopk", "max_l0": 9},
    "jumprelu": {"activation": "jumprelu"},
    "jumprelu, other width": {
        "activation": "jumprelu",
        "jump_bandwidth": 0.5,
        "l0_coefficient": 1.0,
    },
    "layer-weighted": {"init": "layer-weighted"},
    "random": {"init": "random"},
    "few heads": {"n_qk_heads": 4, "n_ov_heads": 64},
    "masked first": {"loss_mask": "first"},
    "masked special and loud": {"loss_mask": "special,norm>1.1x"},
    "masked batchtopk": {"loss_mask": "norm>1.1x", "activation": "batchtopk"},
    "top_k falls": {"top_k_start": 3.0},
    "schedule": {"warmup_frac": 0.2, "decay_frac": 0.3, "betas": (0.8, 0.99), "grad_clip": 0.1},
    "parts": {"micro_batch_tokens": N_CTX},
    "exact": {"exact": True},
    "other seed": {"seed": 3},
    "other order": {"data_seed": 3},
    "bfloat16": {"precision": "bfloat16"},
    "reference": {"backend": "reference", "train_tokens": 6 * STEP},
    "from float32, derived": {"store": "acts/float32-none-derive"},
    "from bfloat16, derived": {"store": "acts/bfloat16-lz4-derive"},
    "from float16": {"store": "acts/float16-zstd-store"},
    "from int8": {"store": "acts/int8-none-store"},
    "from int8, derived": {"store": "acts/int8-zstd-derive", "activation": "jumprelu"},
    "small": {"store": "acts/small", "top_k": 16, "expansion": 8.0},
    "qwen3": {"store": "acts/qwen3"},
    "gemma2": {"store": "acts/gemma2"},
    "neox": {"store": "acts/neox"},
    "gpt2": {"store": "acts/gpt2"},
}
COMMANDS = {
    "harvest": "harvest --model models/llama --layers 1-2 --store cli/acts --data text --n-ctx 24 "
    "--tokens 3600 --dtype float16 --device cpu",
    "store verify": "store verify cli/acts --full",
    "train": "train --store cli/acts --out cli/runs --top-k 8 --expansion 4 --batch-tokens 96 "
    "--tokens 2880 --device cpu",
    "sweep": "sweep --store cli/acts --layer 1 --out cli/sweep --top-k 4,8 --select relu,abs "
    "--expansion 2 --batch-tokens 96 --tokens 960 --device cpu --set init_tokens=480",
    "eval": "eval cli/runs/layer-1 cli/runs/layer-2 --store cli/acts --model models/llama "
    "--ce-tokens 120 --device cpu",
    "analyze": "analyze cli/runs/layer-1 --store cli/acts --model models/llama --device cpu",
    "find": "find previous-token cli/runs/layer-1 --top 5",
    "convert": "convert cli/runs/layer-1 cli/theirs --to llamascopium --model models/llama",
}
