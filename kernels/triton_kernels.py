"""Triton kernels of the triton_*.py beside it, which say what they are for.

Names as in triton_attention.py: T and S are tiles of positions and of keys, K the width of a QK
head, G the OV heads of a QK head. Tensors are contiguous. A `window`, `softcap` or `sinks_ptr` of
None is compiled away.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def scores(q, k, t, s, scale, softcap, window, PRECISION: tl.constexpr):
    """Return scores [T, S] of q [T, K] and k [S, K], -inf where hidden, and the cap's slope."""
    dots = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    slope = tl.full(dots.shape, 1.0, tl.float32)
    if softcap is not None:
        # tanh by the exponential that cannot overflow
        e = tl.exp(-2.0 * tl.abs(dots / softcap))
        bent = (1.0 - e) / (1.0 + e)
        bent = tl.where(dots < 0, -bent, bent)
        slope = 1.0 - bent * bent
        dots = bent * softcap
    seen = s[None, :] <= t[:, None]
    if window is not None:
        seen &= t[:, None] - s[None, :] < window
    return tl.where(seen, dots, float("-inf")), slope


@triton.jit
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    sinks_ptr,
    z_ptr,
    lse_ptr,
    seq,
    n_qk_heads,
    scale,
    softcap,
    window,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Z [seq, N] and lse [H, seq] of one block of positions, QK head and sequence."""
    # the last blocks see the most keys: start with them
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_T
    h = tl.program_id(0) % n_qk_heads
    b = (tl.program_id(0) // n_qk_heads).to(tl.int64)
    t = first + tl.arange(0, BLOCK_T)
    c = tl.arange(0, BLOCK_K)
    g = tl.arange(0, BLOCK_G)
    q_rows = ((b * seq + t) * n_qk_heads + h) * WIDTH
    q = tl.load(
        q_ptr + q_rows[:, None] + c[None, :],
        mask=(t < seq)[:, None] & (c < WIDTH)[None, :],
        other=0.0,
    )
    if sinks_ptr is None:
        top = tl.full([BLOCK_T], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_T], tl.float32)
    else:  # a key before all others, whose value is 0
        top = tl.zeros([BLOCK_T], tl.float32) + tl.load(sinks_ptr + h)
        total = tl.full([BLOCK_T], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_G], tl.float32)
    low = 0
    if window is not None:
        low = tl.maximum(0, (first - window + 1) // BLOCK_S * BLOCK_S)
    for s0 in range(low, tl.minimum(first + BLOCK_T, seq), BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        rows = (b * seq + s) * n_qk_heads + h
        k = tl.load(
            k_ptr + (rows * WIDTH)[:, None] + c[None, :],
            mask=(s < seq)[:, None] & (c < WIDTH)[None, :],
            other=0.0,
        )
        v = tl.load(
            v_ptr + (rows * GROUP)[:, None] + g[None, :],
            mask=(s < seq)[:, None] & (g < GROUP)[None, :],
            other=0.0,
        )
        score, _ = scores(q, k, t, s, scale, softcap, window, PRECISION)
        higher = tl.maximum(top, tl.max(score, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2((top - safe) * LOG2E)
        p = tl.exp2((score - safe[:, None]) * LOG2E)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = higher
    total = tl.where(total > 0.0, total, 1.0)  # positions past the end see nothing
    z_rows = ((b * seq + t) * n_qk_heads + h) * GROUP
    tl.store(
        z_ptr + z_rows[:, None] + g[None, :],
        acc / total[:, None],
        mask=(t < seq)[:, None] & (g < GROUP)[None, :],
    )
    lse = top + tl.log2(total) / LOG2E
    tl.store(lse_ptr + (b * n_qk_heads + h) * seq + t, lse, mask=t < seq)


@triton.jit
def select_kernel(
    z_ptr,
    given_ptr,
    norm_ptr,
    acts_ptr,
    ids_ptr,
    n_rows,
    n_entries,
    n_tiles,
    top_k,
    SELECT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keep the top_k of one tile of some rows: acts and ascending ids, id -1 where it has fewer.

    Scores are not negative, so their bits compare as integers. The k-th largest is built bit by
    bit: a bit stays where at least top_k keys reach it.
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    tile = tl.program_id(1)
    entry = tile * BLOCK + tl.arange(0, BLOCK)
    there = (row < n_rows)[:, None] & (entry < n_entries)[None, :]
    place = row[:, None] * n_entries + entry[None, :]
    z = tl.load(z_ptr + place, mask=there, other=0.0)
    if given_ptr is None:
        ids = tl.broadcast_to(entry[None, :], [ROWS, BLOCK])
    else:
        ids = tl.load(given_ptr + place, mask=there, other=-1)
        there = there & (ids >= 0)
    norm = tl.load(norm_ptr + ids, mask=there, other=0.0)
    kept = tl.where(z < 0.0, 0.0, z) if SELECT == "relu" else z  # NaN stays
    key = (tl.abs(kept) * norm).to(tl.int32, bitcast=True)
    key = tl.where(there, key, -1)
    threshold = tl.zeros([ROWS], tl.int32)
    for step in range(31):
        raised = threshold | (1 << (30 - step))
        n_reaching = tl.sum((key >= raised[:, None]).to(tl.int32), axis=1)
        threshold = tl.where(n_reaching >= top_k, raised, threshold)
    above = key > threshold[:, None]
    level = key == threshold[:, None]
    n_wanted = top_k - tl.sum(above.to(tl.int32), axis=1)
    chosen = above | (level & (tl.cumsum(level.to(tl.int32), axis=1) <= n_wanted[:, None]))
    slot = tl.cumsum(chosen.to(tl.int32), axis=1) - 1
    out = ((row * n_tiles + tile) * top_k)[:, None] + slot
    tl.store(acts_ptr + out, kept, mask=chosen)
    tl.store(ids_ptr + out, ids, mask=chosen)


@triton.jit
def row_sums_kernel(
    acts_ptr,
    d_acts_ptr,
    ids_ptr,
    sums_ptr,
    top_k,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """D: for every kept head of a token, the sum of act * d_act over those of its QK head."""
    base = tl.program_id(0).to(tl.int64) * top_k
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(ids_ptr + base + i, mask=i < top_k, other=-1) // GROUP
    total = tl.zeros([BLOCK], tl.float32)
    for j0 in range(0, top_k, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        theirs = tl.load(ids_ptr + base + j, mask=j < top_k, other=-1) // GROUP
        act = tl.load(acts_ptr + base + j, mask=j < top_k, other=0.0).to(tl.float32)
        d_act = tl.load(d_acts_ptr + base + j, mask=j < top_k, other=0.0).to(tl.float32)
        same = mine[:, None] == theirs[None, :]
        total += tl.sum(tl.where(same, (act * d_act)[None, :], 0.0), axis=1)
    tl.store(sums_ptr + base + i, total, mask=i < top_k)


@triton.jit
def load_rows(
    pair,
    there,
    q_ptr,
    dz_ptr,
    lse_ptr,
    sums_ptr,
    b,
    h,
    seq,
    n_qk_heads,
    top_k,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Gather firing rows of a sequence and QK head: positions, q, dz, lse, D."""
    t = tl.where(there, (pair // top_k) % seq, seq).to(tl.int32)
    c = tl.arange(0, BLOCK_K)
    g = tl.arange(0, BLOCK_G)
    rows = (b * seq + t) * n_qk_heads + h
    q = tl.load(
        q_ptr + (rows * WIDTH)[:, None] + c[None, :],
        mask=there[:, None] & (c < WIDTH)[None, :],
        other=0.0,
    )
    dz = tl.load(
        dz_ptr + (rows * GROUP)[:, None] + g[None, :],
        mask=there[:, None] & (g < GROUP)[None, :],
        other=0.0,
    )
    lse = tl.load(lse_ptr + (b * n_qk_heads + h) * seq + t, mask=there, other=0.0)
    total = tl.load(sums_ptr + pair, mask=there, other=0.0)
    return t, q, dz.to(q.dtype), lse, total


@triton.jit
def pattern_and_gradient(
    q, k, v, dz, t, s, there, lse, total, scale, softcap, window, PRECISION: tl.constexpr
):
    """Return P and d(loss)/d(q k^T), both [T, S]."""
    score, slope = scores(q, k, t, s, scale, softcap, window, PRECISION)
    p = tl.exp2((score - lse[:, None]) * LOG2E)
    p = tl.where(there[:, None], p, 0.0)
    dp = tl.dot(dz, tl.trans(v), input_precision=PRECISION)
    return p, p * (dp - total[:, None]) * slope * scale


@triton.jit
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dz_ptr,
    lse_ptr,
    sums_ptr,
    pairs_ptr,
    starts_ptr,
    dq_ptr,
    seq,
    n_qk_heads,
    top_k,
    n_starts,
    scale,
    softcap,
    window,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Dq of one tile of firing rows."""
    bh = tl.program_id(0)
    h = bh % n_qk_heads
    b = (bh // n_qk_heads).to(tl.int64)
    begin = tl.load(starts_ptr + bh * n_starts)
    end = tl.load(starts_ptr + bh * n_starts + n_starts - 1)
    row = begin + tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    there = row < end
    if begin + tl.program_id(1) * BLOCK_T < end:
        pair = tl.load(pairs_ptr + row, mask=there, other=0)
        t, q, dz, lse, total = load_rows(
            pair, there, q_ptr, dz_ptr, lse_ptr, sums_ptr, b, h, seq, n_qk_heads, top_k,
            WIDTH, GROUP, BLOCK_K, BLOCK_G,
        )  # fmt: skip
        c = tl.arange(0, BLOCK_K)
        g = tl.arange(0, BLOCK_G)
        low = 0
        if window is not None:
            low = tl.maximum(0, (tl.min(t) - window + 1) // BLOCK_S * BLOCK_S)
        high = tl.max(tl.where(there, t, 0)) + 1
        acc = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
        for s0 in range(low, high, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            rows = (b * seq + s) * n_qk_heads + h
            k = tl.load(
                k_ptr + (rows * WIDTH)[:, None] + c[None, :],
                mask=(s < seq)[:, None] & (c < WIDTH)[None, :],
                other=0.0,
            )
            v = tl.load(
                v_ptr + (rows * GROUP)[:, None] + g[None, :],
                mask=(s < seq)[:, None] & (g < GROUP)[None, :],
                other=0.0,
            )
            _, ds = pattern_and_gradient(
                q, k, v, dz, t, s, there, lse, total, scale, softcap, window, PRECISION
            )
            acc += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
        out = ((b * seq + t) * n_qk_heads + h) * WIDTH
        tl.store(
            dq_ptr + out[:, None] + c[None, :],
            acc,
            mask=there[:, None] & (c < WIDTH)[None, :],
        )


@triton.jit
def dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dz_ptr,
    lse_ptr,
    sums_ptr,
    pairs_ptr,
    starts_ptr,
    ends_ptr,
    dk_ptr,
    dv_ptr,
    seq,
    n_qk_heads,
    top_k,
    n_starts,
    scale,
    softcap,
    window,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Dk and dv of one block of keys: a loop over the firing rows that see it."""
    bh = tl.program_id(0)
    block = tl.program_id(1)
    h = bh % n_qk_heads
    b = (bh // n_qk_heads).to(tl.int64)
    s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_K)
    g = tl.arange(0, BLOCK_G)
    rows = (b * seq + s) * n_qk_heads + h
    k_mask = (s < seq)[:, None] & (c < WIDTH)[None, :]
    v_mask = (s < seq)[:, None] & (g < GROUP)[None, :]
    k = tl.load(k_ptr + (rows * WIDTH)[:, None] + c[None, :], mask=k_mask, other=0.0)
    v = tl.load(v_ptr + (rows * GROUP)[:, None] + g[None, :], mask=v_mask, other=0.0)
    dk = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_G], tl.float32)
    begin = tl.load(starts_ptr + bh * n_starts + block)
    end = tl.load(ends_ptr + bh * n_starts + block)
    for r0 in range(begin, end, BLOCK_T):
        row = r0 + tl.arange(0, BLOCK_T)
        there = row < end
        pair = tl.load(pairs_ptr + row, mask=there, other=0)
        t, q, dz, lse, total = load_rows(
            pair, there, q_ptr, dz_ptr, lse_ptr, sums_ptr, b, h, seq, n_qk_heads, top_k,
            WIDTH, GROUP, BLOCK_K, BLOCK_G,
        )  # fmt: skip
        p, ds = pattern_and_gradient(
            q, k, v, dz, t, s, there, lse, total, scale, softcap, window, PRECISION
        )
        dv += tl.dot(tl.trans(p).to(dz.dtype), dz, input_precision=PRECISION)
        dk += tl.dot(tl.trans(ds).to(q.dtype), q, input_precision=PRECISION)
    tl.store(dk_ptr + (rows * WIDTH)[:, None] + c[None, :], dk, mask=k_mask)
    tl.store(dv_ptr + (rows * GROUP)[:, None] + g[None, :], dv, mask=v_mask)


@triton.jit
def decode_kernel(
    acts_ptr, ids_ptr, w_ptr, y_ptr, top_k, d_model, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr
):
    """y_hat of one token and block of channels."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for j0 in range(0, top_k, BLOCK_J):
        j = j0 + tl.arange(0, BLOCK_J)
        act = tl.load(acts_ptr + token * top_k + j, mask=j < top_k, other=0.0).to(tl.float32)
        head = tl.load(ids_ptr + token * top_k + j, mask=j < top_k, other=0).to(tl.int64)
        w = tl.load(
            w_ptr + (head * d_model)[:, None] + d[None, :],
            mask=(act != 0.0)[:, None] & (d < d_model)[None, :],
            other=0.0,
        )
        acc += tl.sum(act[:, None] * w.to(tl.float32), axis=0)
    tl.store(y_ptr + token * d_model + d, acc, mask=d < d_model)


@triton.jit
def dots_kernel(
    x_ptr, ids_ptr, w_ptr, parts_ptr, n_tokens, top_k, d_model,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """<x, W[id]> over a slice of channels, of one token and block of slots."""
    token = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    head = tl.load(ids_ptr + token * top_k + j, mask=j < top_k, other=0).to(tl.int64)
    x = tl.load(x_ptr + token * d_model + d, mask=d < d_model, other=0.0).to(tl.float32)
    w = tl.load(
        w_ptr + (head * d_model)[:, None] + d[None, :],
        mask=(j < top_k)[:, None] & (d < d_model)[None, :],
        other=0.0,
    )
    part = tl.sum(w.to(tl.float32) * x[None, :], axis=1)
    row = tl.program_id(2) * n_tokens + token
    tl.store(parts_ptr + row * top_k + j, part, mask=j < top_k)


@triton.jit
def dw_kernel(
    acts_ptr, x_ptr, pairs_ptr, starts_ptr, dw_ptr, db_ptr, top_k, d_model,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum over the tokens on which one feature fired: dW of a block of channels, and db."""
    head = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.load(starts_ptr + head + 1)
    acc = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    for i0 in range(tl.load(starts_ptr + head), end, BLOCK_J):
        i = i0 + tl.arange(0, BLOCK_J)
        pair = tl.load(pairs_ptr + i, mask=i < end, other=0)
        act = tl.load(acts_ptr + pair, mask=i < end, other=0.0).to(tl.float32)
        x = tl.load(
            x_ptr + (pair // top_k * d_model)[:, None] + d[None, :],
            mask=(act != 0.0)[:, None] & (d < d_model)[None, :],
            other=0.0,
        )
        acc += tl.sum(act[:, None] * x.to(tl.float32), axis=0)
        total += tl.sum(act, axis=0)
    tl.store(dw_ptr + head * d_model + d, acc, mask=d < d_model)
    if db_ptr is not None:  # noqa: SIM102 -- compiled away
        if tl.program_id(1) == 0:
            tl.store(db_ptr + head, total)


@triton.jit
def linear_kernel(
    x_ptr, w_ptr, b_ptr, z_ptr, n_tokens, n_features, width,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write a tile of z = x W^T + b, in fp32.

    Tiles go through the tokens fastest, so that a block of W is read once from memory.
    """
    n_blocks = tl.cdiv(n_tokens, BLOCK_T)
    t = (tl.program_id(0) % n_blocks * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    i = (tl.program_id(0) // n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for c0 in range(0, width, BLOCK_K):
        c = c0 + tl.arange(0, BLOCK_K)
        there = c < width
        x = tl.load(
            x_ptr + (t * width)[:, None] + c[None, :],
            mask=(t < n_tokens)[:, None] & there[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + (i * width)[:, None] + c[None, :],
            mask=(i < n_features)[:, None] & there[None, :],
            other=0.0,
        )
        acc += tl.dot(x, tl.trans(w), input_precision=PRECISION)
    acc += tl.load(b_ptr + i, mask=i < n_features, other=0.0).to(tl.float32)[None, :]
    tl.store(
        z_ptr + (t * n_features)[:, None] + i[None, :],
        acc,
        mask=(t < n_tokens)[:, None] & (i < n_features)[None, :],
    )
