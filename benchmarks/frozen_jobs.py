"""Frozen jobs whose results are compared between two versions, to the bit.

    PYTHONPATH=FOLDER_WITH_LORSA python benchmarks/frozen_jobs.py FOLDER

same_bits.py runs this with the code of each version, in a folder that holds the models and texts
of `make_inputs`. Jobs use the public names of `lorsa` and its command line, as both versions must
have them, and tiny models with random weights on the CPU. For every job digests.json has the
SHA-256 of each part of what it made, or the error that it ended with.

frozen_digests.py says what is left out of a digest.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lorsa
import torch
from frozen_digests import Parts, of_data, of_files, of_tensor
from frozen_inputs import MODELS
from frozen_settings import COMMANDS, LAYER, MAIN, MODES, N_CTX, RUNS, STEP

DIGESTS = "digests.json"
Job = Callable[[], Parts]


class Stop(Exception):  # noqa: N818
    """Ends a harvest or a run from outside."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="with what make_inputs makes; jobs run in it")
    parser.add_argument("--only", default="", help="jobs whose names match this expression")
    args = parser.parse_args()
    torch.set_num_threads(1)
    digests: dict[str, Parts] = {}
    for name, job in all_jobs():
        needed = name.startswith("harvest ")  # others read these stores
        if not needed and not re.search(args.only, name):
            continue
        print(name, file=sys.stderr, flush=True)
        try:
            digests[name] = job()
        except Exception as error:  # of a job, which must not keep the others from running
            digests[name] = {"error": f"{type(error).__name__}: {error}"}
    where = str(Path(lorsa.__file__).parent)
    (args.folder / DIGESTS).write_text(json.dumps({"code": where, "jobs": digests}, indent=1))


def all_jobs() -> Iterator[tuple[str, Job]]:
    """Yield every job by its name, those that others read from first."""
    for mode in MODES:
        asked = dict(zip(("dtype", "compression", "outputs"), mode, strict=True))
        yield f"harvest {'-'.join(mode)}", partial(harvest, f"acts/{'-'.join(mode)}", **asked)
    for name in [name for name in MODELS if name != "llama"]:
        model = {"model": f"models/{name}", "dtype": "float32"}
        yield f"harvest {name}", partial(harvest, f"acts/{name}", **model)
    yield "harvest, stopped, gone on with", harvest_stopped
    yield "layers added", layers_added
    yield "stores merged, layers removed", merged
    for name, changes in RUNS.items():
        yield f"train {name}", partial(train, name, **changes)
    for activation in ("topk", "batchtopk", "jumprelu"):
        yield f"train {activation}, stopped, gone on with", partial(train_stopped, activation)
    yield "train two layers", train_layers
    yield "sweep", sweep
    for name in ("topk", "topk, abs", "batchtopk", "jumprelu", "from int8, derived"):
        yield f"eval {name}", partial(evaluate, name)
    yield "eval two runs together", evaluate_together
    for name in ("topk", "topk, abs", "jumprelu", "qwen3", "gemma2", "gpt2"):
        yield f"tensors of {name}", partial(tensors, name)
        yield f"analyze {name}", partial(analyze, name)
    yield "find", find
    yield "ablate", ablate
    for name in ("topk", "batchtopk", "jumprelu", "gpt2"):
        yield f"convert {name}", partial(convert, name)
    for name in COMMANDS:
        yield f"command {name}", partial(command, name)
    for name in ("exact", "shard"):
        yield f"two processes, {name}", partial(two_processes, name)


def harvest_config(store: str, **changes: Any) -> lorsa.HarvestConfig:
    settings: dict[str, Any] = {
        "model": "models/llama",
        "layers": "1" if changes.get("model") == "models/small" else "1,2",
        "store": Path(store),
        "data": "text",
        "n_ctx": N_CTX,
        "tokens": 150 * N_CTX,
        "device": "cpu",
    }
    return lorsa.HarvestConfig(**settings | changes)


def harvest(store: str, **changes: Any) -> Parts:
    lorsa.harvest_activations(harvest_config(store, **changes))
    opened = lorsa.ActivationStore.open(store)
    x = inputs_of(opened, range(0, opened.manifest.n_seq, 3))
    held_out = opened.held_out_seqs.tolist()
    read = {"read": of_tensor(x), "held out": of_data(held_out)}
    return {**of_files(Path(store)), **read, "info": of_data(lorsa.store_info(store))}


def inputs_of(opened: Any, seqs: Any) -> torch.Tensor:
    """Return x of LAYER, as this version of the code reads it or as those before it did."""
    if hasattr(opened, "inputs"):
        found: torch.Tensor = opened.inputs(LAYER, seqs)
    else:
        found = opened.values(lorsa.Site(LAYER, "attn_in"), seqs)
    return found


def stop_after(n: int) -> Callable[[Any], None]:
    """Return a report that ends the work after so many sequences, or so many steps."""

    def report(event: Any) -> None:
        tokens = getattr(event, "tokens", 0) if hasattr(event, "n_tokens") else 0
        if tokens >= n * N_CTX or (hasattr(event, "grad_norm") and event.step >= n):
            raise Stop

    return report


def stopped(work: Callable[[], Any]) -> None:
    try:
        work()
    except Stop:
        return
    raise AssertionError("it was not stopped")


def harvest_stopped() -> Parts:
    config = harvest_config("acts/stopped", dtype="int8", compression="zstd")
    stopped(lambda: lorsa.harvest_activations(config, report=stop_after(70)))
    missing = lorsa.store_info("acts/stopped")["n_missing_shards"]
    lorsa.harvest_activations(config)
    verified = lorsa.verify_store("acts/stopped", full=True)
    return {**of_files(Path("acts/stopped")), "missing": of_data(missing), "ok": of_data(verified)}


def layers_added() -> Parts:
    lorsa.harvest_activations(harvest_config("acts/added", layers="1"))
    more = harvest_config("acts/added", layers="0-2")
    stopped(lambda: lorsa.harvest_activations(more, report=stop_after(70)))
    lorsa.harvest_activations(more)
    return of_files(Path("acts/added"))


def merged() -> Parts:
    lorsa.harvest_activations(harvest_config("acts/b", data="text-b"))
    lorsa.merge_stores([MAIN, "acts/b"], "acts/merged")
    parts = of_files(Path("acts/merged"))
    made_with: Any = lorsa  # the version of the code that is tried
    if hasattr(made_with, "remove_layers"):
        made_with.remove_layers("acts/merged", "2")
    else:
        made_with.remove_sites("acts/merged", layers="2")
    fewer = of_files(Path("acts/merged"))
    return {**parts, **{f"{kind}, fewer layers": digest for kind, digest in fewer.items()}}


def train_config(name: str, **changes: Any) -> lorsa.TrainConfig:
    settings: dict[str, Any] = {
        "store": Path(MAIN),
        "layer": LAYER,
        "out": run_folder(name),
        "expansion": 4.0,
        "top_k": 8,
        "batch_tokens": STEP,
        "train_tokens": 36 * STEP,
        "eval_tokens": 4 * N_CTX,
        "init_tokens": 32 * N_CTX,
        "device": "cpu",
    }
    return lorsa.TrainConfig(**settings | changes)


def run_folder(name: str) -> Path:
    """Return the folder of a run, whose name has no characters that paths lack."""
    return Path("runs") / re.sub(r"\W+", "-", name)


def train(name: str, **changes: Any) -> Parts:
    result = lorsa.train_lorsa(train_config(name, **changes))
    return {**of_files(run_folder(name)), "result": of_data(result)}


def train_stopped(activation: str) -> Parts:
    name = f"{activation}-stopped"
    config = train_config(name, activation=activation, checkpoint_every_tokens=9 * STEP)
    stopped(lambda: lorsa.train_lorsa(config, report=stop_after(20)))
    there = of_files(run_folder(name))
    lorsa.train_lorsa(config)
    return {f"{kind}, stopped": digest for kind, digest in there.items()} | of_files(
        run_folder(name)
    )


def train_layers() -> Parts:
    configs = [train_config(f"layer-{layer}", layer=layer) for layer in (1, 2)]
    outcomes = lorsa.train_lorsas(configs)
    assert all(outcome.failure is None for outcome in outcomes)
    return {
        f"{config.out.name} {kind}": digest
        for config in configs
        for kind, digest in of_files(config.out).items()
    }


def sweep() -> Parts:
    base = train_config("sweep", train_tokens=20 * STEP).to_dict()
    values: dict[str, list[Any]] = {
        "top_k": [4, 8],
        "activation": ["topk", "batchtopk", "jumprelu"],
        "lr": [1e-3, 2e-3],
    }
    base = {name: value for name, value in base.items() if name not in (*values, "out")}
    result = lorsa.sweep_lorsas(base, values, "sweep")
    assert result.n_groups == 1
    parts = of_files(Path("sweep"))
    del parts["csv"]  # has tokens per second
    return parts


def eval_config(name: str, **changes: Any) -> lorsa.EvalConfig:
    store = Path(RUNS[name].get("store", MAIN))
    return lorsa.EvalConfig(run=run_folder(name), store=store, device="cpu", **changes)


def evaluate(name: str) -> Parts:
    alone = lorsa.evaluate_lorsa(eval_config(name))
    inside = lorsa.evaluate_lorsa(eval_config(name, model="models/llama", ce_tokens=6 * N_CTX))
    kept = json.loads((run_folder(name) / "eval.json").read_text("utf-8"))
    for added in ("asked", "by_position", "frequency_histogram"):
        kept.pop(added, None)  # that earlier versions did not keep
    if kept["cross_entropy"]:
        kept["cross_entropy"].pop("by_position", None)
    parts = {"on the store": alone.to_dict(), "in the model": inside.to_dict(), "kept": kept}
    return {part: of_data(found) for part, found in parts.items()}


def evaluate_together() -> Parts:
    configs = [
        lorsa.EvalConfig(
            run=Path(f"runs/layer-{n}"), store=Path(MAIN), model="models/llama", device="cpu"
        )
        for n in (1, 2)
    ]
    return {"all": of_data(lorsa.evaluate_lorsas(configs).to_dict())}


def tensors(name: str) -> Parts:
    opened = lorsa.ActivationStore.open(RUNS[name].get("store", MAIN))
    x = inputs_of(opened, opened.held_out_seqs[:3]).float()
    trained = lorsa.Lorsa.from_pretrained(run_folder(name))
    with torch.no_grad():
        acts, ids = trained.encode(x)
        found = {
            "acts": acts,
            "ids": ids,
            "y_hat": trained.decode(acts, ids),
            "z_pre": trained.z_pre(x),
            "pattern": trained.pattern(x, ov_heads=[0, 5, 17]),
            "contributions": trained.contributions(x, ids),
        }
    return {part: of_tensor(values) for part, values in found.items()}


def analyze(name: str) -> Parts:
    store = Path(RUNS[name].get("store", MAIN))
    model = f"models/{name}" if name in MODELS else "models/llama"
    for out, given in ((Path("analyses") / run_folder(name).name, None), (None, model)):
        config = lorsa.AnalyzeConfig(
            run=run_folder(name), store=store, model=given, out=out, device="cpu"
        )
        lorsa.analyze_lorsa(config)
    without = of_files(Path("analyses") / run_folder(name).name)
    return of_files(run_folder(name) / "analysis") | {
        f"{kind}, no model": digest for kind, digest in without.items()
    }


def find() -> Parts:
    kinds = ("previous_token", "induction", "local", "same_token")
    runs = [run_folder(name) for name in ("topk", "jumprelu")]
    parts = {f"runs, {kind}": of_data(lorsa.find_heads(kind, runs=runs)) for kind in kinds}
    return parts | {f"model, {kind}": of_data(lorsa.find_heads(kind, store=MAIN)) for kind in kinds}


def ablate() -> Parts:
    change: dict[str, dict[str, Any]] = {
        "ablated": {},
        "doubled": {"scale": 2.0, "error": "drop"},
        "set": {"value": 1.5},
    }
    parts = {}
    for part, asked in change.items():
        config = lorsa.AblateConfig(
            run=run_folder("topk"),
            model="models/llama",
            heads="0-9",
            tokens="5,17,30,5,17",
            **asked,
        )
        parts[part] = of_data(lorsa.ablate_heads(config).to_dict())
    return parts


def convert(name: str) -> Parts:
    model = f"models/{name}" if name in MODELS else "models/llama"
    parts: Parts = {}
    for with_model in (None, model):
        theirs = Path(f"theirs/{name}-{with_model is not None}")
        ours = Path(f"ours/{name}-{with_model is not None}")
        lorsa.convert_lorsa(
            lorsa.ConvertConfig(
                source=str(run_folder(name)), out=theirs, to="llamascopium", model=with_model
            )
        )
        lorsa.convert_lorsa(
            lorsa.ConvertConfig(source=str(theirs), out=ours, model=with_model, max_l0=None)
        )
        for folder in (theirs, ours):
            parts |= {f"{folder.parent}, {with_model}, {k}": v for k, v in of_files(folder).items()}
    return parts


def command(name: str) -> Parts:
    """Run a command line; what it prints is compared, and what all of them have written so far."""
    return {"printed": of_data(run_command(["-m", "lorsa", *COMMANDS[name].split(), "--json"]))} | {
        kind: digest for kind, digest in of_files(Path("cli")).items() if kind != "csv"
    }


def run_command(words: list[str]) -> Any:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


def two_processes(name: str) -> Parts:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = f"train --store {MAIN} --layer 1 --out two/{name} --top-k 8 --expansion 4 "
    words += f"--batch-tokens 96 --tokens 1920 --device cpu --{name}"
    run_command([*launcher, "-m", "lorsa", *words.split(), "--json"])
    return of_files(Path("two") / name)


if __name__ == "__main__":
    main()
