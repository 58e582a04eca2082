"""The reference implementation on checkpoints from here, and the other way round.

    python benchmarks/once/exchange_llamascopium.py ours --folder F [--run RUN ... --store STORE]
    THEIR_PYTHON benchmarks/once/exchange_llamascopium.py theirs --folder F
    python benchmarks/once/exchange_llamascopium.py compare --folder F --write

THEIR_PYTHON is of an environment with llamascopium==2.0.0b34 and 'transformer-lens<3'; ours need
not be in it, nor theirs in ours. `ours` writes Lorsas in Llamascopium's format, with inputs and
what they give; `theirs` loads them with Llamascopium, and saves Lorsas of its own with what they
give; `compare` loads those, and tells the differences.
"""

import argparse
import json
import platform
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RESULTS = Path(__file__).parent.parent / "results" / "exchange_llamascopium.md"
SHAPE: dict[str, Any] = {
    "d_model": 48,
    "n_ov_heads": 384,
    "d_qk_head": 16,
    "top_k": 12,
    "n_ctx": 64,
}
RULES = ("topk", "batchtopk", "jumprelu")
CASES: list[dict[str, Any]] = [
    {"rule": rule, "norm": norm, "adjacent": adjacent, "n_qk_heads": n_qk_heads}
    for rule, norm, adjacent, n_qk_heads in product(RULES, (False, True), (False, True), (24, 384))
]


def main() -> None:
    args = parse()
    {"ours": ours, "theirs": theirs, "compare": compare}[args.part](args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=["ours", "theirs", "compare"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--run", type=Path, nargs="*", default=[], help="trained Lorsas, as well")
    parser.add_argument("--store", help="store with their layer")
    parser.add_argument("--write", action="store_true", help=f"append rows to {RESULTS.name}")
    return parser.parse_args()


def name_of(case: dict[str, Any]) -> str:
    return "-".join(
        [
            case["rule"],
            "norm" if case["norm"] else "plain",
            "adjacent" if case["adjacent"] else "halves",
            str(case["n_qk_heads"]),
        ]
    )


def inputs(seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(4, SHAPE["n_ctx"], SHAPE["d_model"], generator=random)


@torch.no_grad()
def ours(args: argparse.Namespace) -> None:
    """Write Lorsas in their format, and what we compute."""
    from lorsa import ActivationStore, Lorsa
    from lorsa.dictionaries.formats.llamascopium_write import write as write_llamascopium
    from lorsa.sites import attention_ports

    for case in CASES:
        save(args.folder / "ours" / name_of(case), random_lorsa(case), inputs(), write_llamascopium)
    for run in args.run:
        lorsa = Lorsa.from_pretrained(run)
        if lorsa.config.activation == "batchtopk":  # by the largest of the batch, as theirs
            limits: dict[str, Any] = {"has_threshold": False, "max_l0": lorsa.config.n_ov_heads}
            lorsa.config = replace(lorsa.config, **limits)
        store = ActivationStore.open(args.store)
        assert lorsa.config.layer is not None
        x, _ = store.activations(attention_ports(lorsa.config.layer), store.held_out_seqs[:8])
        label = f"trained {lorsa.config.activation}"
        save(args.folder / "ours" / label, lorsa, x, write_llamascopium)


def random_lorsa(case: dict[str, Any]) -> Any:
    from lorsa import Lorsa, LorsaConfig
    from lorsa.language.geometry import QKNorm, Rope

    width = SHAPE["d_qk_head"]
    config = LorsaConfig(
        **SHAPE,
        n_qk_heads=case["n_qk_heads"],
        scale=width**-0.5,
        activation=case["rule"],
        max_l0=None if case["rule"] == "topk" else SHAPE["n_ov_heads"],
        has_threshold=case["rule"] != "batchtopk",
        rope=Rope(
            inv_freq=tuple(10000 ** (-2 * j / width) for j in range(width // 2)),
            interleaved=case["adjacent"],
        ),
        qk_norm=QKNorm(eps=1e-6, kind="rms_by_head") if case["norm"] else None,
        layer=0,
    )
    lorsa = Lorsa(config)
    random = torch.Generator().manual_seed(1)
    for parameter in lorsa.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
    return lorsa


def save(folder: Path, lorsa: Any, x: Tensor, write: Any) -> None:
    write(lorsa.saved(), folder)
    save_file({"x": x.float().contiguous(), **computed(lorsa, x)}, folder / "io.safetensors")


def computed(lorsa: Any, x: Tensor) -> dict[str, Tensor]:
    """Return our dense activations [batch, seq, n_ov_heads] and y_hat."""
    acts, ids = lorsa.encode(x)
    dense = acts.new_zeros(*x.shape[:2], lorsa.config.n_ov_heads)
    return {"acts": dense.scatter_add(2, ids.long(), acts), "y_hat": lorsa.decode(acts, ids)}


@torch.no_grad()
def theirs(args: argparse.Namespace) -> None:
    """Load ours with Llamascopium; save Lorsas of theirs."""
    package = import_module("llamascopium.models.lorsa")
    rows = {}
    for folder in sorted((args.folder / "ours").iterdir()):
        io = load_file(folder / "io.safetensors")
        sae = package.LowRankSparseAttention.from_pretrained(str(folder))
        acts = sae.encode(io["x"])
        rows[folder.name] = differences({"acts": acts, "y_hat": sae.decode(acts)}, io)
    for case in CASES:
        folder = args.folder / "theirs" / name_of(case)
        folder.mkdir(parents=True, exist_ok=True)
        sae = their_lorsa(case)
        sae.cfg.save_hyperparameters(folder)
        sae.save_pretrained(folder)
        x = inputs()
        normed = sae.normalize_activations({sae.cfg.hook_point_in: x, sae.cfg.hook_point_out: x})
        acts = sae.encode(normed[sae.cfg.hook_point_in])
        y_hat = sae.denormalize_activations(
            {sae.cfg.hook_point_out: sae.decode(acts)}, scale_factors=sae_factors(sae, x)
        )[sae.cfg.hook_point_out]
        io = {"x": x, "acts": acts.contiguous(), "y_hat": y_hat.contiguous()}
        save_file(io, folder / "io.safetensors")
    found = {"version": version("llamascopium"), "rows": rows}
    (args.folder / "theirs.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


def sae_factors(sae: Any, x: Tensor) -> Any:
    """Return what they scale activations by, of both hooks."""
    hooks = (sae.cfg.hook_point_in, sae.cfg.hook_point_out)
    return {hook: sae.compute_norm_factor(x, hook_point=hook) for hook in hooks}


def their_lorsa(case: dict[str, Any]) -> Any:
    package = import_module("llamascopium.models.lorsa")
    config = package.LorsaConfig(
        hook_point_in="blocks.0.ln1.hook_normalized",
        hook_point_out="blocks.0.hook_attn_out",
        d_model=SHAPE["d_model"],
        expansion_factor=SHAPE["n_ov_heads"] / SHAPE["d_model"],
        n_qk_heads=case["n_qk_heads"],
        d_qk_head=SHAPE["d_qk_head"],
        rotary_dim=SHAPE["d_qk_head"],
        rotary_adjacent_pairs=case["adjacent"],
        n_ctx=SHAPE["n_ctx"],
        top_k=SHAPE["top_k"],
        act_fn=case["rule"],
        use_post_qk_ln=case["norm"],
        normalization_type="RMS" if case["norm"] else None,
        norm_activation="dataset-wise",
    )
    sae = package.LowRankSparseAttention(config)
    random = torch.Generator().manual_seed(2)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
    hooks = (config.hook_point_in, config.hook_point_out)
    sae.set_dataset_average_activation_norm(dict(zip(hooks, (7.0, 2.5), strict=True)))
    return sae.eval()


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Any]:
    """Return how many firings only one of them has, and how far apart the other tokens are."""
    fires = [part["acts"] != 0 for part in (one, other)]
    unlike = fires[0] != fires[1]  # a score on the edge of the top_k, rounded the other way
    same = ~unlike.any(dim=-1)
    return {
        "unlike": int(unlike.sum()),
        "fire": int(fires[1].sum()),
        **{key: distance(one[key][same], other[key][same]) for key in ("acts", "y_hat")},
    }


def distance(one: Tensor, other: Tensor) -> float:
    """Return the largest difference over the largest entry."""
    return float((one - other).abs().max() / other.abs().max())


@torch.no_grad()
def compare(args: argparse.Namespace) -> None:
    """Load theirs, and tell both directions."""
    from lorsa import Lorsa, __version__

    found = json.loads((args.folder / "theirs.json").read_text())
    rows = {}
    for folder in sorted((args.folder / "theirs").iterdir()):
        io = load_file(folder / "io.safetensors")
        rows[folder.name] = differences(computed(Lorsa.from_pretrained(folder), io["x"]), io)
    machine = f"{platform.machine()}, torch {torch.__version__}, lorsa {__version__}"
    lines = []
    for way, cases in (("ours, loaded there", found["rows"]), ("theirs, loaded here", rows)):
        for label, some in groups(cases).items():
            worst = {key: max(row[key] for row in some) for key in ("acts", "y_hat")}
            unlike, fire = (sum(row[key] for row in some) for key in ("unlike", "fire"))
            lines.append(
                f"| {datetime.now(UTC):%Y-%m-%d} | {way} | {label} | {len(some)} | "
                f"{worst['acts']:.1e} | {worst['y_hat']:.1e} | {unlike:,} of {fire:,} | "
                f"llamascopium {found['version']}; {machine} |"
            )
    print("\n".join(lines))
    if args.write:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


def groups(rows: dict[str, Any]) -> dict[str, list[Any]]:
    """Return cases by their rule; trained Lorsas alone."""
    found: dict[str, list[Any]] = {}
    for name, row in rows.items():
        found.setdefault(name.split("-")[0], []).append(row)
    return found


if __name__ == "__main__":
    main()
