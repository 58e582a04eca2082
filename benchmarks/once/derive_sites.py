"""What recomputing the sites of a layer costs: bytes, rounding by depth, and time.

    python benchmarks/once/derive_sites.py --model smollm2.gguf --from STORE --write

The tokens are those of STORE. All sites of the model's layers are computed in float32; then those
of some layers again, from what a store would keep of them:

    direct      every site itself: seven arrays a layer
    pairs       attn_in and mlp_in, their modules' outputs recomputed: two
    sums        attn_out and mlp_out of all layers, residual sites as running sums from the
                embeddings, inputs by their norms: two
    stream      resid_in, all else recomputed: one

The error is by site, sum ||found - exact||^2 / sum ||exact - mean||^2: what it adds to an FVU, at
most. It is of ordinary tokens, whose resid_in is no longer than 10 times the median, and of all.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lorsa import __version__
from lorsa.harvest.foundation import loudest
from lorsa.language.attention import layer_attention
from lorsa.language.block import BlockReading, Derivation
from lorsa.language.blockcheck import understand_block
from lorsa.language.blocks import attention_sites, find_blocks
from lorsa.language.capture import Capture
from lorsa.language.mlp import layer_mlp
from lorsa.language.selfcheck import understand
from lorsa.language.subject import load_language_model
from lorsa.sites import SITE_NAMES, Site
from lorsa.store.encoding import channel_scale, encode
from lorsa.store.read.reader import ActivationStore
from torch import Tensor

RESULTS = Path(__file__).parent.parent / "results" / "derive_sites.md"
LARGE = 10.0
"""Tokens of a longer resid_in, in medians of the layer, are not ordinary."""
BATCH_SEQS = 8
DTYPES = ("bfloat16", "int8", "int8, largest")
"""Encodings; the last takes int8's channel scales from values, as a harvest does of attention's
sites, and not from shares of their token."""

Sites = dict[str, Tensor]
"""Activations of a layer by the site's name, [n, n_ctx, d_model]."""


class Layer(NamedTuple):
    """What a store would keep of a layer besides activations."""

    block: BlockReading
    attention: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]


def main() -> None:
    args = parse()
    torch.set_grad_enabled(False)
    model = load_language_model(args.model, dtype="float32").model
    store = ActivationStore.open(args.store)
    n = args.tokens // store.manifest.n_ctx
    sample, tokens = (store.tokens(range(start, start + n)) for start in (0, n))
    layers = [int(layer) for layer in args.layers.split(",")]
    known = read_layers(model, tokens[:2], layers)
    sampled, every = (capture(model, layers, some) for some in (sample, tokens))
    rows = [row for layer in layers for row in measure(layer, known[layer], sampled, every)]
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}"
    text = [
        f"\n{datetime.now(UTC):%Y-%m-%d}, {Path(args.model).name}, {n * store.manifest.n_ctx:,} "
        f"tokens in sequences of {store.manifest.n_ctx}; {machine}, lorsa {__version__}\n",
        *table(rows),
    ]
    print("\n".join(text))
    if args.write:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write("\n".join(text) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--from", dest="store", required=True)
    parser.add_argument("--layers", default="0,6,12,20,29")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--write", action="store_true", help=f"append to {RESULTS.name}")
    return parser.parse_args()


def read_layers(model: Any, tokens: Tensor, layers: list[int]) -> dict[int, Layer]:
    """Return what a harvest reads of some layers."""
    blocks, found = find_blocks(model), {}
    for at in attention_sites(model, layers):
        layer = at.layer
        names = {layer: blocks[layer].name}
        with Capture(model, [at], spots=spots(blocks, layer), blocks=names) as capture:
            seen = capture.see(tokens)
        attention = understand(model, at, seen.attention[layer]).reading
        sites = {site.name: values for site, values in seen.sites.items()}
        mlp, block = understand_block(model, blocks[layer], seen.blocks[layer], sites)
        assert attention is not None
        assert block.reading is not None
        assert mlp is not None
        assert mlp.reading is not None
        found[layer] = Layer(
            block.reading,
            partial(layer_attention, weights=attention.weights, geometry=attention.geometry),
            partial(layer_mlp, weights=mlp.reading.weights, geometry=mlp.reading.geometry),
        )
    return found


def spots(blocks: Mapping[int, Any], layer: int) -> dict[Site, Any]:
    return {Site(layer, name): spot for name, spot in blocks[layer].spots.items()}


def capture(model: Any, layers: list[int], tokens: Tensor) -> dict[Site, Tensor]:
    """Return the sites of some layers, and attn_out and mlp_out of all before the last of them."""
    blocks = find_blocks(model)
    wanted = spots(blocks, 0)
    for i in range(max(layers) + 1):
        every = spots(blocks, i)
        outputs = {s: p for s, p in every.items() if s.name in ("attn_out", "mlp_out")}
        wanted |= every if i in layers else outputs
    with Capture(model, spots=wanted) as found:
        parts = [found.run(some) for some in tokens.split(BATCH_SEQS)]
    return {site: torch.cat([part.pop(site) for part in parts]) for site in wanted}


def of_layer(every: Mapping[Site, Tensor], layer: int) -> Sites:
    names = (name for name in SITE_NAMES if Site(layer, name) in every)
    return {name: every[Site(layer, name)] for name in names}


def rounded(site: Site, values: Tensor, sample: Tensor, dtype: str) -> Tensor:
    """Return activations as a store decodes them, given a sample for int8's channels."""
    if not dtype.startswith("int8"):
        plain: Tensor = encode(values, dtype).decode().float()
        return plain
    rule = "int8" if dtype == "int8" else "largest"
    channels = channel_scale(loudest({site: sample}, [site], rule)[site][None])
    decoded: Tensor = encode(values, "int8", channels).decode()
    return decoded


def ordinary(resid: Tensor) -> Tensor:
    """Return which tokens are no longer than LARGE medians, bool, [n, n_ctx]."""
    norms = resid.norm(dim=-1)
    short: Tensor = norms <= LARGE * norms.median()
    return short


def measure(
    layer: int, known: Layer, sampled: Mapping[Site, Tensor], seen: Mapping[Site, Tensor]
) -> list[list[str]]:
    """Return a row for each way to keep a layer and each encoding."""
    sample, exact = of_layer(sampled, layer), of_layer(seen, layer)
    usual = ordinary(exact["resid_in"])
    rows = []
    for dtype in DTYPES:
        kept = {
            name: rounded(Site(layer, name), values, sample[name], dtype)
            for name, values in exact.items()
        }
        stream = seen[Site(0, "resid_in")]  # embeddings, of which the token ids say all
        for i, name in ((i, name) for i in range(layer) for name in ("attn_out", "mlp_out")):
            site = Site(i, name)
            added = rounded(site, seen[site], sampled[site], dtype)
            stream = stream + known.block.geometry.multiplier * added
        ways = {
            "direct": kept,
            "pairs": {n: kept[n] for n in ("attn_in", "mlp_in")},
            "sums": {"resid_in": stream} | {n: kept[n] for n in ("attn_out", "mlp_out")},
            "stream": {"resid_in": kept["resid_in"]},
        }
        for way, stored in ways.items():
            found, seconds = derived(stored, known, list(exact))
            rate = "" if way == "direct" else f"{usual.numel() / seconds:,.0f}"
            n_arrays = {"direct": len(kept), "pairs": 2, "sums": 2, "stream": 1}[way]
            width = exact["resid_in"].shape[-1]
            n_bytes = n_arrays * (width + 4 if dtype.startswith("int8") else 2 * width)
            cells = []
            for name in SITE_NAMES:
                if name not in found or (way == "pairs" and name.startswith("resid")):
                    cells.append("")
                    continue
                some = error(found[name], exact[name], usual)
                every = error(found[name], exact[name], torch.ones_like(usual))
                cells.append(f"{some:.1e} / {every:.1e}")
            share = f"{1 - float(usual.float().mean()):.2%}"
            rows.append([str(layer), share, dtype, way, f"{n_bytes:,}", rate, *cells])
    return rows


def derived(stored: Sites, layer: Layer, names: list[str]) -> tuple[Sites, float]:
    """Return the sites that follow from those that are stored, and the CPU seconds that it took."""
    started = time.process_time()
    found: dict[str, list[Tensor]] = {}
    n = len(next(iter(stored.values())))
    for first in range(0, n, BATCH_SEQS):
        some = {name: values[first : first + BATCH_SEQS] for name, values in stored.items()}
        derivation = Derivation(some, block=layer.block, attention=layer.attention, mlp=layer.mlp)
        for name in names:
            try:
                found.setdefault(name, []).append(derivation.site(name))
            except KeyError:  # it does not follow from these
                found.pop(name, None)
    return {name: torch.cat(parts) for name, parts in found.items()}, time.process_time() - started


def error(found: Tensor, exact: Tensor, counted: Tensor) -> float:
    """Return the squared error over the variance, of the tokens that count."""
    found, exact = found[counted].double(), exact[counted].double()
    return float((found - exact).square().sum() / (exact - exact.mean(dim=0)).square().sum())


def table(rows: list[list[str]]) -> list[str]:
    names = [
        "layer",
        "large tokens",
        "encoding",
        "kept",
        "bytes",
        "tokens per CPU second",
        *SITE_NAMES,
    ]
    return [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows)]


if __name__ == "__main__":
    main()
