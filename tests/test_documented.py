"""Figures are what docs/ defines: computed again from files and weights, by nothing of lorsa's.

Stored activations and the Lorsa's weights are read as any tool reads them, attention and sums are
written out, and the language model is transformers' own with a hook.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
import transformers
import zarr
from lorsa.analyze.config import AnalyzeConfig
from lorsa.analyze.features import analyze_run
from lorsa.evaluate.config import EvalConfig
from lorsa.evaluate.evaluate import evaluate_run
from lorsa.store.care.info import store_info
from lorsa.train.config import TrainConfig
from lorsa.train.train import train
from tiny import N_CTX
from torch import Tensor

LAYER = 1
N_HEADS, TOP_K = 64, 2
Figures = dict[str, Any]


class World(NamedTuple):
    """A run of the tiny model's layer, what it should write, and what it does."""

    run: Path
    model: Path
    tokens: Tensor
    """Of every sequence, [n_seq, N_CTX]"""
    x: Tensor
    """[n_seq, N_CTX, d_model], float64"""
    y: Tensor
    held_out: Tensor
    """Sequences that no run trains on, int64"""
    z: Tensor
    """Activations, [n_seq, N_CTX, N_HEADS], float64"""
    parts: Tensor
    """P[t, s] v[s] where the head fires, else 0, [n_seq, t, s, N_HEADS], float64"""
    y_hat: Tensor


@pytest.fixture(scope="module")
def world(
    store_folder: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> World:
    run = tmp_path_factory.mktemp("documented") / "layer-1"
    settings: Figures = {"n_ov_heads": N_HEADS, "top_k": TOP_K, "batch_tokens": 4 * N_CTX}
    settings |= {"train_tokens": 8 * N_CTX, "device": "cpu"}
    train(TrainConfig(store=store_folder, layer=LAYER, out=run, **settings))
    arrays = zarr.open_group(store_folder, mode="r")
    tokens = torch.from_numpy(arrays["tokens"][:]).long()
    x, y = (
        torch.from_numpy(arrays[f"layers/{LAYER}/{name}"][:]).double()
        for name in ("attn_in", "attn_out")
    )
    facts = json.loads((store_folder / "manifest.json").read_text())
    size = facts["shard_seqs"]
    first = [shard * size for shard in facts["held_out_shards"]]
    held_out = [seq for start in first for seq in range(start, min(start + size, len(x)))]
    z, parts, y_hat = _lorsa(run, x)
    return World(run, model_folder, tokens, x, y, torch.tensor(held_out), z, parts, y_hat)


def _lorsa(run: Path, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute docs/maths.md: activations, contributions and output, in float64."""
    w = {n: v.double() for n, v in safetensors.torch.load_file(run / "lorsa.safetensors").items()}
    facts = json.loads((run / "config.json").read_text())["config"]
    q = torch.einsum("btd,hdk->bthk", x, w["W_Q"]) + w["b_Q"]
    k = torch.einsum("btd,hdk->bthk", x, w["W_K"]) + w["b_K"]
    q, k = (_rotated(each, torch.tensor(facts["rope"]["inv_freq"]).double()) for each in (q, k))
    scores = facts["scale"] * torch.einsum("bthk,bshk->btsh", q, k)
    n = x.shape[1]
    later = torch.arange(n)[None, :] > torch.arange(n)[:, None]
    pattern = scores.masked_fill(later[None, :, :, None], -math.inf).softmax(dim=2)
    group = len(w["W_V"]) // len(w["W_Q"])
    pattern = pattern.repeat_interleave(group, dim=3)  # [n_seq, t, s, heads]
    v = x @ w["W_V"].T + w["b_V"]
    parts = pattern * v[:, None]
    z_pre = parts.sum(dim=2)
    score = z_pre.relu() * w["W_O"].norm(dim=1)
    chosen = torch.zeros_like(z_pre, dtype=torch.bool)
    chosen.scatter_(2, score.topk(TOP_K, dim=2).indices, value=True)
    fires = chosen & (score > 0)
    z = torch.where(fires, z_pre, 0)
    return z, parts * fires[:, :, None], z @ w["W_O"] + w["b_O"]


def _rotated(values: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotate halves of the channels against each other, as Llama does."""
    angle = torch.arange(values.shape[1])[:, None] * inv_freq
    cos, sin = (each(torch.cat([angle, angle], dim=1))[:, None] for each in (torch.cos, torch.sin))
    a, b = values.chunk(2, dim=-1)
    return values * cos + torch.cat([-b, a], dim=-1) * sin


@pytest.fixture(scope="module")
def measured(world: World, store_folder: Path) -> Figures:
    config = EvalConfig(run=world.run, store=store_folder, model=str(world.model), device="cpu")
    return evaluate_run(config).to_dict()


def _near(told: Any, ours: Any) -> None:
    told = torch.tensor([math.nan if each is None else each for each in told])
    torch.testing.assert_close(told.double(), ours.double(), rtol=1e-4, atol=1e-5, equal_nan=True)


def test_measures_on_the_store_are_as_documented(world: World, measured: Figures) -> None:
    """docs/fidelity.md and docs/maths.md: FVU, NMSE, cosine, L0, and by position."""
    y, y_hat, z = (values[world.held_out] for values in (world.y, world.y_hat, world.z))
    error, deviation = (y - y_hat).square().sum(dim=2), (y - y.mean(dim=(0, 1))).square().sum(dim=2)
    cosine = (y * y_hat).sum(dim=2) / y.norm(dim=2) / y_hat.norm(dim=2)
    nmse, fired = error / y.square().sum(dim=2), (z != 0).double()
    ours = {
        "fvu": error.sum() / deviation.sum(),
        "nmse": nmse.mean(),
        "cosine": cosine.mean(),
        "l0": fired.sum(dim=2).mean(),
        "dead_fraction": (fired.sum(dim=(0, 1)) == 0).double().mean(),
        "n_tokens": error.numel(),
    }
    for name, value in ours.items():
        assert measured[name] == pytest.approx(float(value), rel=1e-4), name
    assert 0 < measured["dead_fraction"] < 1
    by_position = {
        "fvu": error.sum(dim=0) / deviation.sum(dim=0),
        "nmse": nmse.mean(dim=0),
        "cosine": cosine.mean(dim=0),
        "l0": fired.sum(dim=2).mean(dim=0),
        "variance": deviation.mean(dim=0),
    }
    assert set(measured["by_position"]) == set(by_position)
    for name, values in by_position.items():
        _near(measured["by_position"][name], values)
    weights = by_position["variance"]
    whole = (by_position["fvu"] * weights).sum() / weights.sum()
    assert measured["fvu"] == pytest.approx(float(whole), rel=1e-4)


def test_the_histogram_of_frequencies_is_as_documented(world: World, measured: Figures) -> None:
    """docs/fidelity.md: heads in the decade from 10^log10_from, edges counted upwards."""
    share = (world.z[world.held_out] != 0).double().mean(dim=(0, 1))
    told = measured["frequency_histogram"]
    assert told["n_silent"] == int((share == 0).sum())
    for low, n in zip(told["log10_from"], told["n_features"], strict=True):
        upper = 10.0 ** (low + 1) if low < -1 else math.inf
        assert n == int(((share >= 10.0**low) & (share < upper)).sum())
    assert sum(told["n_features"]) + told["n_silent"] == N_HEADS


def test_losses_in_the_model_are_as_documented(world: World, measured: Figures) -> None:
    """docs/fidelity.md said "its mean over training tokens", which was of 64 sequences.

    The first 64 training sequences, in the order of the store.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(world.model).eval()
    training = [seq for seq in range(len(world.x)) if seq not in set(world.held_out.tolist())]
    mean = world.y[training[:64]].mean(dim=(0, 1)).float()
    ids = world.tokens[world.held_out]
    y_hat = world.y_hat[world.held_out].float()
    of = {
        "original": None,
        "replaced": y_hat,
        "zero_ablated": torch.zeros_like(y_hat),
        "mean_ablated": mean.expand_as(y_hat),
    }
    told = measured["cross_entropy"]
    log_p: dict[str, Tensor] = {}
    losses: dict[str, Tensor] = {}
    for name, output in of.items():
        log_p[name] = _predictions(model, ids, output)
        losses[name] = -log_p[name].gather(2, ids[:, 1:, None])[:, :, 0]
        assert told[name] == pytest.approx(float(losses[name].mean()), rel=1e-4)
        _near(told["by_position"][name], losses[name].mean(dim=0))
    for name in ("replaced", "zero_ablated", "mean_ablated"):
        kl = (log_p["original"].exp() * (log_p["original"] - log_p[name])).sum(dim=2).mean()
        same = (log_p["original"].argmax(dim=2) == log_p[name].argmax(dim=2)).double().mean()
        assert told["kl"][name] == pytest.approx(float(kl), rel=1e-3)
        assert told["top1_agreement"][name] == pytest.approx(float(same))
    means = {name: float(loss.mean()) for name, loss in losses.items()}
    for name in ("zero", "mean"):
        ablated = means[f"{name}_ablated"]
        recovered = (ablated - means["replaced"]) / (ablated - means["original"])
        assert told[f"recovered_from_{name}"] == pytest.approx(recovered, rel=1e-3)
    increase = (losses["replaced"] - losses["original"]).mean(dim=1)
    se = float(increase.std()) / len(increase) ** 0.5
    assert told["increase_se"] == pytest.approx(se, rel=1e-3)


@torch.no_grad()
def _predictions(model: Any, ids: Tensor, output: Tensor | None) -> Tensor:
    """Return log-probabilities of the next tokens, with the attention's output replaced."""

    def hook(_module: Any, _inputs: Any, found: Any) -> Any:
        return (output, *found[1:]) if isinstance(found, tuple) else output

    attention = model.model.layers[LAYER].self_attn
    handle = None if output is None else attention.register_forward_hook(hook)
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return logits.double().log_softmax(dim=2)
    finally:
        if handle is not None:
            handle.remove()


@pytest.fixture(scope="module")
def heads(world: World, store_folder: Path) -> dict[str, list[Any]]:
    """Columns of heads.parquet, of all tokens of the store."""
    analyze_run(AnalyzeConfig(run=world.run, store=store_folder, device="cpu"))
    columns: dict[str, list[Any]] = pq.read_table(world.run / "analysis/heads.parquet").to_pydict()
    return columns


def test_firings_are_as_documented(world: World, heads: dict[str, list[Any]]) -> None:
    fired = (world.z != 0).double()
    _near(heads["n_fired"], fired.sum(dim=(0, 1)))
    _near(heads["frequency"], fired.mean(dim=(0, 1)))
    _near(heads["mean_act"], world.z.sum(dim=(0, 1)) / fired.sum(dim=(0, 1)))
    w = safetensors.torch.load_file(world.run / "lorsa.safetensors")
    _near(heads["norm_o"], w["W_O"].norm(dim=1))
    _near(heads["norm_v"], w["W_V"].norm(dim=1))


def test_distances_leave_out_first_tokens_as_documented(
    world: World, heads: dict[str, list[Any]]
) -> None:
    """First tokens counted, at a distance of 0, though they can only read themselves."""
    read = world.parts.abs()[:, 1:]  # [n_seq, t, s, heads]
    amount = read.sum(dim=(0, 1, 2))
    distance = torch.arange(1, N_CTX)[:, None] - torch.arange(N_CTX)
    far = distance.clamp(min=0)[None, :, :, None]
    _near(heads["distance"], (read * far).sum(dim=(0, 1, 2)) / amount)
    edges = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 10**9]
    for i in range(len(edges) - 1):
        inside = ((distance >= edges[i]) & (distance < edges[i + 1]))[None, :, :, None]
        ours = (read * inside).sum(dim=(0, 1, 2)) / amount
        told = [row[i] for row, total in zip(heads["by_distance"], amount, strict=True) if total]
        _near(told, ours[amount > 0])
    each = read.sum(dim=2)  # what a token reads, [n_seq, t, heads]
    share = read / each[:, :, None].clamp(min=1e-300)
    entropy = torch.special.entr(share).sum(dim=2)
    _near(heads["entropy"], (entropy * each).sum(dim=(0, 1)) / amount)


def _sources(tokens: Tensor) -> dict[str, Tensor]:
    """Return where docs/analysis.md finds each kind of source, [n_seq, t, s]; none at t = 0."""
    found: dict[str, Tensor] = {}
    t, s = torch.arange(N_CTX)[:, None], torch.arange(N_CTX)[None, :]
    same = tokens[:, :, None] == tokens[:, None, :]
    follows = torch.zeros_like(same)
    follows[:, :, 1:] = same[:, :, :-1]  # the token before s is that at t
    found["previous_token"] = (s == t - 1).expand_as(same)
    found["same_token"] = (s == t).expand_as(same)
    found["duplicate_token"] = same & (s < t)
    found["induction"] = follows & (s < t)
    found["first_token"] = ((s == 0) & (t >= 2)).expand_as(same)
    found["local"] = ((s < t) & (s >= t - 8)).expand_as(same)
    found["long_range"] = (s <= t - 64).expand_as(same)
    return {name: where & (t > 0) for name, where in found.items()}


@pytest.mark.parametrize(
    "kind",
    ["previous_token", "same_token", "duplicate_token", "induction", "first_token", "local",
     "long_range"],
)  # fmt: skip
def test_shares_of_kinds_are_as_documented(
    kind: str, world: World, heads: dict[str, list[Any]]
) -> None:
    """docs/analysis.md: over the tokens that offer such a source, all but the first."""
    where = _sources(world.tokens)[kind]
    offers = where.any(dim=2)[:, :, None, None]
    read = world.parts.abs()
    share = (read * where[..., None]).sum(dim=(0, 1, 2)) / (read * offers).sum(dim=(0, 1, 2))
    _near(heads[kind], share)


def test_mean_norms_are_as_documented(world: World, store_folder: Path) -> None:
    """docs/json.md: the mean norms of x and y over training tokens, as `lorsa store info` has."""
    found = store_info(store_folder)["layers"][str(LAYER)]
    training = [seq for seq in range(len(world.x)) if seq not in set(world.held_out.tolist())]
    for name, values in (("mean_norm_x", world.x), ("mean_norm_y", world.y)):
        ours = float(values[training].norm(dim=2).mean())
        assert found[name] == pytest.approx(ours, rel=1e-5)


def test_examples_add_up_as_documented(world: World, heads: dict[str, list[Any]]) -> None:
    """Sources of at least 1 % of the activation, at most 16, and the rest: all of it."""
    assert heads
    rows = pq.read_table(world.run / "analysis/examples.parquet").to_pylist()
    for row in rows[:: max(1, len(rows) // 300)]:
        parts = world.parts[row["seq"], row["position"], :, row["head"]]
        act = float(world.z[row["seq"], row["position"], row["head"]])
        assert row["act"] == pytest.approx(act, rel=1e-4)
        assert sum(row["source_acts"]) + row["rest"] == pytest.approx(act, rel=1e-3, abs=1e-5)
        _near(row["source_acts"], parts[torch.tensor(row["sources"])])
        large = int((parts.abs() >= 0.0101 * abs(act)).sum())
        assert min(large, 16) <= len(row["sources"]) <= 16
        assert all(abs(part) >= 0.0099 * abs(act) for part in row["source_acts"])
