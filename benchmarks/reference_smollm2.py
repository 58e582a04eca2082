"""Ours beside the reference implementation: the same activations, in the same order.

The reference is Llamascopium 2.0.0b34, which trains in an environment of its own (it needs an
older transformer-lens and numpy than a plain install gives):

    pip install llamascopium==2.0.0b34 'transformer-lens<3' 'pyarrow<22'

    python benchmarks/reference_smollm2.py export ACTS --layer 12 --folder F
    THEIR_PYTHON benchmarks/reference_smollm2.py reference --folder F
    python benchmarks/reference_smollm2.py ours ACTS --layer 12 --folder F
    python benchmarks/reference_smollm2.py table F ...

`export` writes one file for every step of our sampler (seed 0) and the held-out sequences, in
bfloat16 as the store has them. Both sides read files that the page cache holds.

The reference in one configuration, from the layer and not tuned further, with its own
Initializer, Trainer and schedule:
- start: initialize_lorsa_with_mhsa, initialize_W_D_with_active_subspace, grid_search_init_norm;
  its QK heads then have the attention pattern of our start, and its attention module gives the
  stored y, both of which are checked here;
- sizes, learning rate, warm-up, decay and batches are ours; all else (Adam's betas, no gradient
  clipping, last learning rate 1/32 of the peak, decoder bias from zero) are its defaults;
- float32, because bfloat16, its default, is many times slower on CPUs;
- its running metrics are off (--metrics turns them on, as its default is), and so are checkpoints:
  neither is part of a step;
- top_k is constant, as in its documented example (initial_k = top_k). --initial-k 256 tries its
  annealing, over the default tenth of the run.

Seconds are those of the steps, reading included. Looks at held-out tokens are left out, and so is
the start, which has a column of its own (ours holds one look). tokens/s is the median over
stretches of 20 steps, which a burst of other work on the machine does not move. FVU is that of
docs/maths.md over all held-out tokens, dead heads did not fire on the last quarter of the run, and
peak memory is the process's. "others" is the share of the machine's CPU time that other processes
took meanwhile: times of rows in which it differs do not compare.
"""

import argparse
import importlib
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch as safe
import torch
from measure import busy_s
from torch import Tensor

N_STEPS, BATCH_SEQS, N_CTX, LOOK_EVERY = 180, 8, 256, 20
N_OV_HEADS, N_QK_HEADS, TOP_K, LR = 4608, 36, 64, 1e-3
STEP_TOKENS = BATCH_SEQS * N_CTX
HOOK_IN, HOOK_OUT = "blocks.0.ln1.hook_normalized", "blocks.0.hook_attn_out"


BUSY_AT_START = [0.0, 0.0]
"""CPU seconds of the machine, and the clock, when the script began."""


def main() -> None:
    args = parse()
    BUSY_AT_START[:] = busy_s(), time.perf_counter()
    args.run(args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(required=True)
    for name, run in (("export", export), ("reference", reference), ("ours", ours)):
        verb = verbs.add_parser(name)
        verb.set_defaults(run=run)
        verb.add_argument("--folder", type=Path, required=True, help="of this layer's comparison")
        if name == "reference":
            verb.add_argument("--initial-k", type=int, default=TOP_K, help="anneal from here")
            verb.add_argument("--metrics", action="store_true", help="its running metrics")
        else:
            verb.add_argument("store", type=Path)
            verb.add_argument("--layer", type=int, required=True)
    verb = verbs.add_parser("table")
    verb.set_defaults(run=table)
    verb.add_argument("folders", type=Path, nargs="+")
    return parser.parse_args()


def export(args: argparse.Namespace) -> None:
    """Write what the other environment needs of a layer of a store."""
    from lorsa.dictionaries.lorsa.config import LorsaConfig
    from lorsa.dictionaries.lorsa.module import Lorsa
    from lorsa.language.stored import layer_geometry
    from lorsa.sites import attention_ports
    from lorsa.store.read.reader import ActivationStore
    from lorsa.store.read.sampler import Sampler
    from lorsa.train.shape import shape_of
    from lorsa.train.start import Initialiser

    store = ActivationStore.open(args.store)
    args.folder.mkdir(parents=True, exist_ok=True)
    sampler = Sampler(store.train_seqs, store.manifest.shard_seqs, batch_seqs=BATCH_SEQS, seed=0)
    held_out = store.held_out_seqs.reshape(-1, BATCH_SEQS)
    parts = {f"step-{step:03}": sampler.batch(step) for step in range(N_STEPS)}
    parts |= {f"held-out-{i:03}": seqs for i, seqs in enumerate(held_out)}
    for name, seqs in parts.items():
        acts = store.activations(attention_ports(args.layer), seqs)
        safe.save_file({"x": acts.x, "y": acts.y}, args.folder / f"{name}.safetensors")

    config = our_config(args, init_tokens=4096)
    shape = shape_of(config, store)
    assert isinstance(shape, LorsaConfig)
    lorsa = Lorsa(shape)
    Initialiser(store).fill(lorsa, config)
    geometry = layer_geometry(args.layer, store)
    if geometry.rope is None or geometry.rope.interleaved:
        raise SystemExit("this comparison is written for half-split rotary embeddings")
    weights = {name: w.float() for name, w in store.weights(f"{args.layer}.attention").items()}
    with torch.no_grad():
        x = store.activations(attention_ports(args.layer), store.held_out_seqs[:1]).x
        pattern = lorsa.pattern(x)
    inv_freq = torch.tensor(geometry.rope.inv_freq, dtype=torch.float64)
    layer = weights | {"pattern": pattern, "inv_freq": inv_freq}
    safe.save_file({name: w.contiguous() for name, w in layer.items()}, args.folder / "layer")
    about = {"layer": args.layer, "text": Path(store.manifest.corpus["data"]).name}
    (args.folder / "about.json").write_text(json.dumps(about))


def ours(args: argparse.Namespace) -> None:
    """Train ours on the same batches: today's defaults but for steps of 2,048 tokens."""
    from lorsa.train.report.events import EvalReport, StepReport
    from lorsa.train.train import train

    curve: list[tuple[int, float, float]] = []
    busy_s, times = 0.0, dict[str, float]()

    def report(event: Any) -> None:
        nonlocal busy_s
        if isinstance(event, StepReport):
            busy_s = event.tokens / event.tokens_per_second
        elif isinstance(event, EvalReport):
            curve.append((event.step, busy_s, event.held_out.fvu))
        times.setdefault(str(event) if isinstance(event, str) else "numbers", time.perf_counter())

    result = train(our_config(args), report=report)
    save(
        args.folder / "ours.json",
        what="lorsa train, steps of 2,048 tokens",
        curve=curve,
        start_s=times["numbers"] - times["initialising"],
        dead=result.dead_fraction,
        versions=f"lorsa {version('lorsa')}, torch {torch.__version__}",
    )


def our_config(args: argparse.Namespace, **settings: Any) -> Any:
    """Return ours with the sizes of the comparison."""
    from lorsa.train.config import TrainConfig

    sizes = {"n_ov_heads": N_OV_HEADS, "n_qk_heads": N_QK_HEADS, "top_k": TOP_K}
    out = args.folder / f"run-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    span = {"train_tokens": N_STEPS * STEP_TOKENS, "batch_tokens": STEP_TOKENS}
    evals = {"eval_every_tokens": LOOK_EVERY * STEP_TOKENS, "lr": LR}
    wanted = {**sizes, **span, **evals, "device": "cpu", **settings}
    return TrainConfig(store=args.store, layer=args.layer, out=out, **wanted)


class Stream:
    """The steps' batches as the reference's trainer takes them, from the first on each time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.step = 0
        self.began = 0.0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.began = time.perf_counter()
        for step in range(N_STEPS):
            self.step = step + 1
            yield read(self.folder / f"step-{step:03}.safetensors")


def read(path: Path) -> dict[str, Tensor]:
    """Return a batch, float32, as the reference names things; read, not mapped."""
    batch = safe.load(path.read_bytes())
    ones = torch.ones(batch["x"].shape[:2], dtype=torch.int64)
    return {
        HOOK_IN: batch["x"].float(),
        HOOK_OUT: batch["y"].float(),
        "tokens": ones,
        "mask": ones,
    }


class Watch:
    """What is measured of a run of the reference, and the time that measuring took."""

    def __init__(self, sae: Any, stream: Stream) -> None:
        self.stream = stream
        self.held_out = sorted(stream.folder.glob("held-out-*.safetensors"))
        self.curve: list[tuple[int, float, float]] = []
        self.away_s = 0.0
        self.looking = False
        self.fired = torch.zeros(N_OV_HEADS, dtype=torch.bool)
        sae.hook_feature_acts.register_forward_hook(self.note)

    def note(self, _module: Any, _inputs: Any, acts: Tensor) -> None:
        """Note which heads fire in the last quarter."""
        if self.looking or self.stream.step <= N_STEPS - N_STEPS // 4:
            return
        began = time.perf_counter()
        self.fired |= (acts != 0).any(dim=1).any(dim=0)
        self.away_s += time.perf_counter() - began

    @torch.no_grad()
    def look(self, sae: Any) -> None:
        """Measure the FVU on all held-out sequences, in the units of the activations."""
        began = time.perf_counter()
        self.looking = True
        residual, ys = 0.0, []
        for path in self.held_out:
            batch = read(path)
            scaled, factors = sae.normalize_activations(batch, return_scale_factor=True)
            y_hat = sae.decode(sae.encode(scaled[HOOK_IN])) / factors[HOOK_OUT]
            residual += float((batch[HOOK_OUT].double() - y_hat).square().sum())
            ys.append(batch[HOOK_OUT].double())
        y = torch.cat(ys).flatten(0, 1)
        fvu = residual / float((y - y.mean(dim=0)).square().sum())
        self.curve.append((self.stream.step, began - self.stream.began - self.away_s, fvu))
        self.looking = False
        self.away_s += time.perf_counter() - began


def reference(args: argparse.Namespace) -> None:
    """Train the reference on the same batches."""
    package: Any = importlib.import_module("llamascopium")
    trainer_module: Any = importlib.import_module("llamascopium.trainer")
    torch.manual_seed(0)
    layer = safe.load_file(args.folder / "layer")
    stream, model = Stream(args.folder), language_model(layer)
    began = time.perf_counter()
    sae = initialised(package, stream, model)
    start_s = time.perf_counter() - began
    check_start(sae, model, layer, args.folder)
    settings = trainer_module.TrainerConfig(
        amp_dtype=torch.float32,
        lr=LR,
        lr_warm_up_steps=0.05,
        lr_cool_down_steps=0.2,
        initial_k=args.initial_k,
        k_warmup_steps=0.1 if args.initial_k > TOP_K else 0,
        total_training_tokens=N_STEPS * STEP_TOKENS,
        skip_metrics_calculation=not args.metrics,
        eval_frequency=LOOK_EVERY,
        n_checkpoints=0,
        exp_result_path=str(args.folder / "reference"),
    )
    watch = Watch(sae, stream)
    trainer_module.Trainer(settings).fit(sae, stream, eval_fn=watch.look)
    variant = f", top_k from {args.initial_k}" if args.initial_k > TOP_K else ""
    variant += ", its metrics on" if args.metrics else ""
    save(
        args.folder / f"reference-{args.initial_k}{'-metrics' * args.metrics}.json",
        what=f"Llamascopium, from the layer{variant}",
        curve=watch.curve,
        start_s=start_s,
        dead=float((~watch.fired).double().mean()),
        versions=", ".join(
            f"{name} {version(name)}" for name in ("llamascopium", "transformer-lens", "torch")
        ),
    )


def language_model(layer: dict[str, Tensor]) -> Any:
    """Return a model of one layer, in the reference's class, whose attention is the stored one."""
    lens: Any = importlib.import_module("transformer_lens")
    backend: Any = importlib.import_module("llamascopium.backend.language_model")
    n_heads, d_model, d_head = layer["W_Q"].shape
    base = float(layer["inv_freq"][1]) ** (-d_head / 2)
    config = lens.HookedTransformerConfig(
        n_layers=1,
        d_model=d_model,
        n_ctx=N_CTX,
        d_head=d_head,
        n_heads=n_heads,
        n_key_value_heads=len(layer["W_K"]),
        d_vocab=2,
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_base=round(base),
        rotary_adjacent_pairs=False,
        device="cpu",
    )
    model = backend.TransformerLensLanguageModel.from_hooked_transformer(
        lens.HookedTransformer(config)
    )
    attention = model.blocks[0].attn
    shared = "_" if config.n_key_value_heads < n_heads else ""
    names = {"W_Q": "W_Q", "W_K": f"{shared}W_K", "W_V": f"{shared}W_V", "W_O": "W_O"}
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.zero_()
        for ours_name, theirs in names.items():
            getattr(attention, theirs).copy_(layer[ours_name])
    return model


def initialised(package: Any, stream: Stream, model: Any) -> Any:
    """Return the reference's Lorsa as its initializer makes it."""
    attention = model.blocks[0].attn
    config = package.LorsaConfig(
        hook_point_in=HOOK_IN,
        hook_point_out=HOOK_OUT,
        d_model=attention.cfg.d_model,
        expansion_factor=N_OV_HEADS / attention.cfg.d_model,
        n_qk_heads=N_QK_HEADS,
        d_qk_head=attention.cfg.d_head,
        rotary_dim=attention.cfg.rotary_dim,
        rotary_base=attention.cfg.rotary_base,
        rotary_adjacent_pairs=False,
        n_ctx=N_CTX,
        act_fn="topk",
        top_k=TOP_K,
    )
    settings = package.InitializerConfig(
        init_encoder_with_decoder_transpose=False,
        initialize_lorsa_with_mhsa=True,
        initialize_W_D_with_active_subspace=True,
        grid_search_init_norm=True,
        model_layer=0,
    )
    initializer: Any = importlib.import_module("llamascopium.initializer")
    return initializer.Initializer(settings).initialize_sae_from_config(
        config, activation_stream=stream, model=model
    )


@torch.no_grad()
def check_start(sae: Any, model: Any, layer: dict[str, Tensor], folder: Path) -> None:
    """Raise unless its attention gives the stored y, and its QK heads our pattern."""
    batch = read(folder / "held-out-000.safetensors")
    x, y = batch[HOOK_IN][:1], batch[HOOK_OUT][:1]
    error = float((model.blocks[0].attn(x, x, x) - y).norm() / y.norm())
    scaled = sae.normalize_activations({HOOK_IN: x})[HOOK_IN]
    pattern = sae.encode(scaled, return_attention_pattern=True)[-1]
    away = float((pattern - layer["pattern"]).abs().max())
    print(f"relative error of y {error:.1e}; of the patterns, at most {away:.1e}")
    if error > 1e-2 or away > 1e-3:
        raise SystemExit("the reference was not given the layer that the store holds")


def save(path: Path, **result: Any) -> None:
    """Write a result, and print it."""
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    cores, clock = os.cpu_count() or 1, time.perf_counter() - BUSY_AT_START[1]
    result["others"] = (busy_s() - BUSY_AT_START[0] - time.process_time()) / clock / cores
    result["date"] = f"{datetime.now(UTC):%Y-%m-%d}"
    result["machine"] = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    path.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


def table(args: argparse.Namespace) -> None:
    """Print a row for every result, with the time that each took to what the reference ended at."""
    for folder in args.folders:
        about = json.loads((folder / "about.json").read_text())
        goal = json.loads((folder / f"reference-{TOP_K}.json").read_text())["curve"][-1][2]
        for path in sorted(folder.glob("reference-*.json")) + sorted(folder.glob("ours.json")):
            run = json.loads(path.read_text())
            _, seconds, fvu = run["curve"][-1]
            cells = [
                run["date"],
                about["text"],
                about["layer"],
                run["what"],
                f"{fvu:.4f}",
                f"{run['dead']:.1%}",
                f"{rate(run['curve']):,.0f}",
                f"{run['start_s']:.0f}",
                f"{seconds:.0f}",
                reached(run["curve"], 0.239),
                reached(run["curve"], goal),
                f"{run['peak_mb']:,.0f}",
                f"{run['others']:.0%}" if "others" in run else "?",
            ]
            print("| " + " | ".join(map(str, cells)) + " |")


def rate(curve: list[tuple[int, float, float]]) -> float:
    """Return tokens per second, the median over the stretches between evals."""
    places = [(0, 0.0), *((step, seconds) for step, seconds, _ in curve if step)]
    stretches = pairwise(places)
    return statistics.median((b[0] - a[0]) * STEP_TOKENS / (b[1] - a[1]) for a, b in stretches)


def reached(curve: list[tuple[int, float, float]], goal: float) -> str:
    """Return the seconds of the first look at which the FVU was no larger, rounded."""
    return next((f"{seconds:.0f}" for _, seconds, fvu in curve if fvu <= goal), "never")


if __name__ == "__main__":
    main()
