"""Stores of format 1 with checksums, and runs of one, packed for tests/test_format1.py.

    python tests/before/make_format1.py FOLDER

Run it with the code of commit 1c336aa, the last whose stores are of format 1, and with no other:
what lies here is there to hold later code to it. FOLDER must be new; the model of model.tar.xz is
unpacked into it. Version 0.1.0's own stores, without checksums, are those of make.py.
"""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import lorsa
from lorsa import (
    ActivationStore,
    EvalConfig,
    HarvestConfig,
    TrainConfig,
    evaluate_lorsa,
    harvest_activations,
    store_info,
    train_lorsa,
)

sys.path.insert(0, str(Path(__file__).parent))

from make import HERE, LAYER, MODEL, N_CTX, PLACE, TEXT, kill_at, stopped

COMMIT = "1c336aa"
STORES: dict[str, dict[str, Any]] = {
    "bfloat16": {"layers": "1,2"},
    "int8-derive": {"layers": "1", "dtype": "int8", "outputs": "derive"},
}
UNFINISHED = {
    "half": {"layers": "0,1"},
    "half-derive": {"layers": "1", "dtype": "int8", "outputs": "derive"},
}
N_STEPS, STOP_AFTER = 24, 18


def main() -> None:
    code = Path(lorsa.__file__).parent
    changed = ["git", "diff", "--quiet", COMMIT, "--", ".", ":!tests", ":!benchmarks"]
    if (code / ".git").exists() and subprocess.run(changed, cwd=code, check=False).returncode:
        sys.exit(f"{code} is not the code of commit {COMMIT}")
    folder = Path(sys.argv[1]).resolve()
    if len(sys.argv) > 2:  # a harvest that ends as if it were killed
        os.chdir(folder)
        name = sys.argv[2]
        harvest_activations(store_config(f"format1/{name}", UNFINISHED[name]), report=kill_at(30))
        return
    folder.mkdir(parents=True)
    os.chdir(folder)
    with tarfile.open(HERE / "model.tar.xz") as file:
        file.extractall(filter="data")
    recorded: dict[str, Any] = {"stores": {}, "runs": {}}
    for name, settings in STORES.items():
        harvest_activations(store_config(f"format1/{name}", settings))
        recorded["stores"][name] = facts(Path("format1") / name)
    for name, settings in UNFINISHED.items():
        harvest_activations(store_config(f"format1/whole-{name}", settings))
        words = [sys.executable, __file__, str(folder), name]
        assert subprocess.run(words, check=False).returncode == 9
        assert 0 < store_info(f"format1/{name}")["n_missing_shards"] < 22
    adding = store_config("format1/adding", {"layers": "1"})
    harvest_activations(adding)
    more = store_config("format1/adding", {"layers": "0,1"})
    stopped(lambda report: harvest_activations(more, report=report), 20)
    harvest_activations(store_config("format1/whole-adding", {"layers": "0,1"}))
    recorded["runs"] = make_runs()
    for root in sorted({path.parent for path in Path("format1").rglob("tokens")}):
        for name in ("manifest.json", "journal/plan.json"):
            reseal(root / name)
    pack()
    (HERE / "format1.json").write_text(json.dumps(recorded, indent=1) + "\n")


def store_config(root: str, changes: dict[str, Any]) -> HarvestConfig:
    """Return the request of a store."""
    settings: dict[str, Any] = {
        "model": str(MODEL),
        "store": Path(root),
        "data": str(TEXT),
        "n_ctx": N_CTX,
        "tokens": 43 * N_CTX,
        "device": "cpu",
    }
    return HarvestConfig(**settings | changes)


def facts(root: Path) -> dict[str, Any]:
    """Return what a store's values come to."""
    store = ActivationStore.open(root)
    seqs = range(store.manifest.n_seq)
    found: dict[str, Any] = {}
    for layer in store.layers:
        mean = store.mean_norms(layer)
        found[str(layer)] = {
            "x_sha256": sha256(store.inputs(layer, seqs).float()),
            "norms_sha256": [sha256(n) for n in store.norms(layer, seqs).unbind(-1)],
            "mean_norms": [mean.x, mean.y],
        }
        if store.manifest.outputs == "store":
            found[str(layer)]["y_sha256"] = sha256(store.activations(layer, seqs).y.float())
    return found


def sha256(values: Any) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def make_runs() -> dict[str, Any]:
    """Make a finished run of each store, and the same stopped; return what was measured."""
    found = {}
    for name in STORES:
        whole = run_config(name, Path("format1/runs") / name)
        result = train_lorsa(whole)
        other = run_config(name, Path("format1/stopped") / name)
        stopped(lambda report, other=other: train_lorsa(other, report=report), STOP_AFTER + 2)
        config = EvalConfig(run=whole.out, store=whole.store, device="cpu")
        found[name] = {"fvu": result.fvu, "eval": evaluate_lorsa(config).fvu}
    return found


def run_config(name: str, out: Path) -> TrainConfig:
    """Return the request of a run on one of STORES."""
    step = 4 * N_CTX
    return TrainConfig(
        store=Path("format1") / name,
        layer=LAYER,
        out=out,
        top_k=6,
        expansion=2.0,
        batch_tokens=step,
        train_tokens=N_STEPS * step,
        init_tokens=16 * N_CTX,
        eval_tokens=4 * N_CTX,
        checkpoint_every_tokens=STOP_AFTER * step,
        device="cpu",
    )


def reseal(path: Path) -> None:
    """Replace the folder's own path in a manifest by PLACE; its checksum is taken again."""
    from lorsa.seal import json_crc32c

    if path.exists():
        content = json.loads(path.read_text().replace(str(Path.cwd()), PLACE))
        del content["crc32c"]
        content["crc32c"] = json_crc32c(content)
        path.write_text(json.dumps(content, indent=1) + "\n")


def pack() -> None:
    """Write the archive: sorted, and without times, owners, curves and locks."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if entry.name.endswith((".png", ".jsonl.lock")):
            return None
        entry.mtime = entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(HERE / "format1.tar.xz", "w:xz", preset=9) as file:
        file.add("format1", filter=plain)


if __name__ == "__main__":
    main()
