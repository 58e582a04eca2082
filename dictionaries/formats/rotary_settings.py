"""RoPE by TransformerLens' settings: a base and a width instead of frequencies.

    inv_freq_i = rotary_base ** (-2 i / rotary_dim)

and, with use_NTK_by_parts_rope (Llama 3.1), slower where a wavelength is long against the length
of the texts that the model was first trained on:

    n_i = old_context_len * inv_freq_i / (2 pi)                turns within that length
    r_i = (n_i - low_freq_factor) / (high_freq_factor - low_freq_factor), kept to 0..1
    inv_freq_i (r_i + (1 - r_i) / factor)
"""

import math
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ...language.geometry import Rope
from .foreign import Settings

TOLERANCE = 1e-5
"""Relative error up to which frequencies are the same; two ways to round them are 1e-6 apart."""
NTK = "NTK_by_parts_"
OLD_CONTEXT = 8192
"""Length that fitted factors refer to; only their ratios to it matter."""


def take_rope(settings: Settings, *, d_qk_head: int, adjacent: bool) -> Rope | None:
    """Return the rotation that settings describe; None if there is none.

    Args:
        settings: the rotation's are taken out of them.
        d_qk_head: width of a query.
        adjacent: what the tool takes `rotary_adjacent_pairs` for where it is not set.

    Raises:
        CheckpointError: a setting is missing, or cannot be expressed.
    """
    kind = settings.take("positional_embedding_type", str, "rotary")
    width = settings.take("rotary_dim", int, None)
    base = settings.above_zero("rotary_base", 10_000)
    pairs = settings.take("rotary_adjacent_pairs", bool, adjacent)
    settings.require("rotary_scale", 1, "which repeats channels; allowed: 1")
    ntk = settings.take("use_NTK_by_parts_rope", bool, False)
    factor, low, high = (
        float(settings.take(NTK + name, (float, int), 1.0))
        for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    old = settings.take("old_context_len", int, 2048)
    if kind in ("none", "default", "standard"):  # added to the residual stream, or nowhere
        return None
    if kind != "rotary":
        raise settings.refuse("positional_embedding_type", kind, "allowed: rotary, none")
    if width is None or width < 2 or width % 2 or width > d_qk_head:
        raise settings.refuse("rotary_dim", width, f"allowed: even, 2..{d_qk_head} (d_qk_head)")
    inv_freq = _plain(base, width)
    if ntk:
        if not (factor > 0 and 0 < low < high and old > 0):
            why = (
                f"with low_freq_factor {low}, high_freq_factor {high} and old_context_len {old}; "
                "all must be above 0, and high_freq_factor above low_freq_factor"
            )
            raise settings.refuse(NTK + "factor", factor, why)
        inv_freq = _scaled(inv_freq, factor, low, high, old)
    return Rope(inv_freq=tuple(inv_freq.tolist()), interleaved=pairs)


def spell_rope(rope: Rope) -> dict[str, Any] | None:
    """Return the settings that describe a rotation; None if there are none."""
    inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float64)
    width = 2 * len(inv_freq)
    for base in _bases_of(inv_freq):
        settings: dict[str, Any] = {
            "positional_embedding_type": "rotary",
            "rotary_dim": width,
            "rotary_base": base,
            "rotary_adjacent_pairs": rope.interleaved,
        }
        plain = _plain(base, width)
        if same(plain, inv_freq):
            return settings
        parts = _parts_of(plain, inv_freq)
        if parts is not None and same(_scaled(plain, *parts, OLD_CONTEXT), inv_freq):
            names = ("factor", "low_freq_factor", "high_freq_factor")
            return (
                settings
                | {"use_NTK_by_parts_rope": True, "old_context_len": OLD_CONTEXT}
                | {NTK + name: value for name, value in zip(names, parts, strict=True)}
            )
    return None


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether frequencies are the same but for rounding."""
    return one.shape == other.shape and bool(((one - other).abs() <= TOLERANCE * one).all())


def _plain(base: float, width: int) -> Tensor:
    """Return the frequencies of a base, rounded as TransformerLens does; float64, [width / 2]."""
    pair = torch.arange(width // 2, dtype=torch.float32)
    return 1 / (base ** (pair / (width / 2))).double()


def _scaled(inv_freq: Tensor, factor: float, low: float, high: float, old: float) -> Tensor:
    turns = old * inv_freq / (2 * math.pi)
    r = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (r + (1 - r) / factor)


def _bases_of(inv_freq: Tensor) -> list[int]:
    """Return whole numbers that may be the base: that of the longest run of even steps, rounded."""
    n = len(inv_freq)
    if n == 1:
        return [10_000]
    steps = -inv_freq.log().diff()
    even = ((steps - steps.median()).abs() < 1e-4).tolist()  # the median itself is
    runs = [list(i) for is_even, i in groupby(range(n - 1), even.__getitem__) if is_even]
    run = max(runs, key=len)
    base = math.exp(min(n * float(steps[run].mean()), 700.0))
    return [round(float(f"{base:.4g}")), round(base)]


def _parts_of(plain: Tensor, inv_freq: Tensor) -> tuple[float, float, float] | None:
    """Return factor, low and high of frequencies that are scaled by parts; None if they are not."""
    factor = float(plain[-1] / inv_freq[-1])
    if factor <= 1:
        return None
    r = (inv_freq / plain * factor - 1) / (factor - 1)  # falls from 1 to 0
    turns = OLD_CONTEXT * plain / (2 * math.pi)
    between = ((r > 1e-3) & (r < 1 - 1e-3)).nonzero().flatten().tolist()
    first = between[0] if between else int((r > 0.5).sum())  # the first that is scaled at all
    if not between:
        fast = float(turns[first - 1]) if first else 4 * float(turns[0])
        return factor, (float(turns[first]) if first else 2 * float(turns[0])), fast
    last = between[-1]
    if last > first:
        slope = float((r[first] - r[last]) / (turns[first] - turns[last]))
    else:  # steep enough for its neighbours
        up = (1 - r[first]) / (turns[first - 1] - turns[first]) if first else r[first] * 0
        down = r[first] / (turns[first] - turns[first + 1]) if first + 1 < len(r) else r[first] * 0
        slope = float(torch.maximum(up, down))
    low = float(turns[first] - r[first] / slope)
    return factor, low, low + 1 / slope
