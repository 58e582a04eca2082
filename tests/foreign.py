"""Checkpoints of other tools, made and computed from their published equations in plain torch.

Nothing of lorsa is used here: dense attention head by head, in float64.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

HOOK_IN, HOOK_OUT = "blocks.3.ln1.hook_normalized", "blocks.3.hook_attn_out"


class Result(NamedTuple):
    """What a Lorsa makes of raw activations."""

    acts: Tensor
    """[batch, seq, n_ov_heads]"""
    y_hat: Tensor
    """[batch, seq, d_model]"""


def settings(**changes: Any) -> dict[str, Any]:
    """Return a config.json of Llamascopium for 24 OV heads."""
    return {
        "sae_type": "lorsa",
        "d_model": 12,
        "expansion_factor": 2.0,
        "use_decoder_bias": True,
        "act_fn": "topk",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": 5,
        "use_triton_kernel": False,
        "sparsity_threshold_for_triton_spmm_kernel": 0.996,
        "jumprelu_threshold_window": 2.0,
        "hook_point_in": HOOK_IN,
        "hook_point_out": HOOK_OUT,
        "n_qk_heads": 6,
        "d_qk_head": 8,
        "positional_embedding_type": "rotary",
        "rotary_dim": 8,
        "rotary_base": 10000,
        "rotary_adjacent_pairs": True,
        "rotary_scale": 1,
        "use_NTK_by_parts_rope": False,
        "NTK_by_parts_factor": 1.0,
        "NTK_by_parts_low_freq_factor": 1.0,
        "NTK_by_parts_high_freq_factor": 1.0,
        "old_context_len": 2048,
        "n_ctx": 16,
        "attn_scale": math.sqrt(8),
        "use_post_qk_ln": False,
        "normalization_type": None,
        "eps": 1e-6,
        **changes,
    }


def tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Return random tensors for a config.json."""
    random = torch.Generator().manual_seed(seed)
    d, n_qk, width = config["d_model"], config["n_qk_heads"], config["d_qk_head"]
    n_ov = int(d * config["expansion_factor"])
    shapes = {
        "W_Q": (n_qk, d, width),
        "W_K": (n_qk, d, width),
        "W_V": (n_ov, d),
        "W_O": (n_ov, d),
        "b_Q": (n_qk, width),
        "b_K": (n_qk, width),
        "b_V": (n_ov,),
    }
    if config["use_decoder_bias"]:
        shapes["b_D"] = (d,)
    if config["use_post_qk_ln"]:
        shapes |= {"ln_q.w": (n_qk, width), "ln_k.w": (n_qk, width)}
    made = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    if config["act_fn"] == "jumprelu":
        made["activation_function.log_jumprelu_threshold"] = torch.rand(n_ov, generator=random)
    if config["norm_activation"] == "dataset-wise":
        made[f"dataset_average_activation_norm.{HOOK_IN}"] = torch.tensor(7.0)
        made[f"dataset_average_activation_norm.{HOOK_OUT}"] = torch.tensor(2.5)
    made["mask"] = torch.ones(16, 16, dtype=torch.bool).tril()
    made["IGNORE"] = torch.tensor(-math.inf)
    if config["positional_embedding_type"] == "rotary":
        made["rotary_sin"] = torch.zeros(16, config["rotary_dim"])
        made["rotary_cos"] = torch.zeros(16, config["rotary_dim"])
    return made


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """Write a folder as Llamascopium does."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "sae_weights.safetensors", {"version": "2.0.0b34"})
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    return folder


def compute(x: Tensor, config: dict[str, Any], weights: dict[str, Tensor]) -> Result:
    """Return what the equations make of raw activations [batch, seq, d_model]."""
    w = {name: t.double() if t.is_floating_point() else t for name, t in weights.items()}
    x = x.double()
    d = config["d_model"]
    scaled = config["norm_activation"] == "dataset-wise"
    norm = "dataset_average_activation_norm."
    if scaled:
        x = x * math.sqrt(d) / w[norm + HOOK_IN]
    seq, n_ov, n_qk = x.shape[1], len(w["W_V"]), config["n_qk_heads"]
    mask = torch.ones(seq, seq, dtype=torch.bool).tril()
    z = torch.zeros(*x.shape[:2], n_ov, dtype=torch.float64)
    for i in range(n_ov):
        h = i // (n_ov // n_qk)
        q, k = x @ w["W_Q"][h] + w["b_Q"][h], x @ w["W_K"][h] + w["b_K"][h]
        if config["use_post_qk_ln"]:
            q, k = (
                a / (a.pow(2).mean(-1, keepdim=True) + config["eps"]).sqrt() * w[name][h]
                for a, name in ((q, "ln_q.w"), (k, "ln_k.w"))
            )
        if config["positional_embedding_type"] == "rotary":
            q, k = rotated(q, config), rotated(k, config)
        scores = (q @ k.transpose(1, 2) / config["attn_scale"]).masked_fill(~mask, -math.inf)
        v = x @ w["W_V"][i] + w["b_V"][i]
        z[:, :, i] = (scores.softmax(-1) @ v[..., None])[..., 0]
    fires = chosen(z, config, w)
    acts = torch.where(fires, z, 0)
    y_hat = acts @ w["W_O"] + w.get("b_D", torch.zeros(d))
    return Result(acts, y_hat * w[norm + HOOK_OUT] / math.sqrt(d) if scaled else y_hat)


def chosen(z: Tensor, config: dict[str, Any], w: dict[str, Tensor]) -> Tensor:
    """Return which heads fire, bool, [batch, seq, n_ov_heads]."""
    factor = w["W_O"].norm(dim=1) if config["sparsity_include_decoder_norm"] else 1.0
    score = (z * factor).clamp(min=0)
    if config["act_fn"] == "jumprelu":
        return score > w["activation_function.log_jumprelu_threshold"].exp()
    if config["act_fn"] == "topk":
        least = score.sort(dim=-1, descending=True).values[..., config["top_k"] - 1, None]
    elif config["act_fn"] == "batchtopk":
        n = config["top_k"] * z.shape[0] * z.shape[1]
        least = score.flatten().sort(descending=True).values[n - 1]
    else:
        least = torch.zeros(())
    return (score >= least) & (score > 0)


def rotated(a: Tensor, config: dict[str, Any]) -> Tensor:
    """Return queries or keys [batch, seq, width], channel pairs turned by their position."""
    width, n = config["rotary_dim"], config["rotary_dim"] // 2
    out = a.clone()
    for j in range(n):
        turn = config["rotary_base"] ** (-2 * j / width)
        if config["use_NTK_by_parts_rope"]:
            turn = slowed(turn, config)
        one, two = (2 * j, 2 * j + 1) if config["rotary_adjacent_pairs"] else (j, j + n)
        for t in range(a.shape[1]):
            c, s = math.cos(t * turn), math.sin(t * turn)
            out[:, t, one] = a[:, t, one] * c - a[:, t, two] * s
            out[:, t, two] = a[:, t, two] * c + a[:, t, one] * s
    return out


def slowed(turn: float, config: dict[str, Any]) -> float:
    """Return a frequency of Llama 3.1, by the three cases of its definition."""
    low, high = config["NTK_by_parts_low_freq_factor"], config["NTK_by_parts_high_freq_factor"]
    factor, old = config["NTK_by_parts_factor"], config["old_context_len"]
    wavelength = 2 * math.pi / turn
    if wavelength < old / high:
        return turn
    if wavelength > old / low:
        return float(turn / factor)
    smooth = (old / wavelength - low) / (high - low)
    return float((1 - smooth) * turn / factor + smooth * turn)
