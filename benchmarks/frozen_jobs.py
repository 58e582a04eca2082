"""Frozen jobs whose results are compared between two versions, to the bit.

    PYTHONPATH=FOLDER_WITH_LORSA python benchmarks/frozen_jobs.py FOLDER

same_bits.py runs this with the code of each version, in a folder that holds the models and texts
of `make_inputs`. Jobs use the public names of `lorsa` and its command line, as both versions must
have them, and tiny models with random weights on the CPU. For every job digests.json has the
SHA-256 of each part of what it made, or the error that it ended with.

Left out of the digests is what differs between two runs of one version: identities (uuids of
stores), clocks (dates, seconds, tokens per second, share of time spent waiting), version numbers,
the folder itself, checksums over these, pictures, and the journal of a store, which is how its
writers took turns.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lorsa
import torch
import transformers
from lorsa import (
    AblateConfig,
    ActivationStore,
    AnalyzeConfig,
    ConvertConfig,
    EvalConfig,
    HarvestConfig,
    Lorsa,
    TrainConfig,
    ablate_heads,
    analyze_lorsa,
    convert_lorsa,
    evaluate_lorsa,
    evaluate_lorsas,
    find_heads,
    harvest_activations,
    merge_stores,
    remove_layers,
    store_info,
    sweep_lorsas,
    train_lorsa,
    train_lorsas,
    verify_store,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Parts = dict[str, str]
"""SHA-256 of each part of what a job made."""

DIGESTS = "digests.json"
LEFT_OUT = {"uuid", "store_uuid", "created", "lorsa_version", "versions", "crc32"}
LEFT_OUT |= {"tokens_per_second", "data_wait_fraction", "seconds", "spent_s", "free_bytes"}
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
SIZES = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
WINDOWS = {"sliding_window": 7, "head_dim": 16, "layer_types": ["sliding_attention"] * 3}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "small": lambda: transformers.LlamaConfig(
        **SIZES | {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 2}
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, **WINDOWS, query_pre_attn_scalar=4, attn_logit_softcapping=2.0
    ),
    "neox": lambda: transformers.GPTNeoXConfig(**SIZES, rotary_pct=0.25),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=400, n_positions=128, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3
    ),
}
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
SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on. "
    "A store keeps what a model saw; a head reads one thing and writes another. "
)


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
        needed = name.startswith("harvest") and "added" not in name  # others read these stores
        if not needed and not re.search(args.only, name):
            continue
        print(name, file=sys.stderr, flush=True)
        try:
            digests[name] = job()
        except Exception as error:  # of a job, which must not keep the others from running
            digests[name] = {"error": f"{type(error).__name__}: {error}"}
    where = str(Path(lorsa.__file__).parent)
    (args.folder / DIGESTS).write_text(json.dumps({"code": where, "jobs": digests}, indent=1))


def make_inputs(folder: Path) -> None:
    """Write the models with their tokenizer, and two folders of text."""
    tokenizer = make_tokenizer()
    for name, make in MODELS.items():
        torch.manual_seed(0)
        eager = {"attn_implementation": "eager"} if name == "gemma2" else {}
        model = transformers.AutoModelForCausalLM.from_config(make(), **eager)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.endswith("bias"):
                    parameter.normal_(std=0.3)
                elif "norm" in parameter_name or "ln_" in parameter_name:
                    parameter.uniform_(0.5, 1.5)
        model.save_pretrained(folder / "models" / name)
        tokenizer.save_pretrained(folder / "models" / name)
    words = (SENTENCES * 12).split()
    for text, turn in (("text", 7), ("text-b", 5)):
        (folder / text).mkdir(parents=True)
        for i in range(12):
            turned = words[i * turn :] + words[: i * turn]
            (folder / text / f"doc{i}.txt").write_text(" ".join(turned), "utf-8")


def make_tokenizer() -> Any:
    """Return a byte-level tokenizer of 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SENTENCES * 12], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>"
    )


def all_jobs() -> Iterator[tuple[str, Callable[[], Parts]]]:
    """Yield every job by its name, those that others read from first."""
    for mode in MODES:
        name = "-".join(mode)
        dtype, compression, outputs = mode
        asked = {"dtype": dtype, "compression": compression, "outputs": outputs}
        yield f"harvest {name}", lambda name=name, asked=asked: harvest(f"acts/{name}", **asked)
    for name in MODELS:
        if name != "llama":
            model = {"model": f"models/{name}", "dtype": "float32"}
            yield f"harvest {name}", lambda name=name, model=model: harvest(f"acts/{name}", **model)
    yield "harvest stopped, gone on with", harvest_stopped
    yield "layers added", layers_added
    yield "stores merged, layers removed", merged
    for name, changes in RUNS.items():
        yield f"train {name}", lambda name=name, changes=changes: train(name, **changes)
    for activation in ("topk", "batchtopk", "jumprelu"):
        yield (
            f"train {activation}, stopped, gone on with",
            lambda activation=activation: train_stopped(activation),
        )
    yield "train two layers", train_layers
    yield "sweep", sweep
    for name in ("topk", "topk, abs", "batchtopk", "jumprelu", "from int8, derived"):
        yield f"eval {name}", lambda name=name: evaluate(name)
    yield "eval two runs together", evaluate_together
    for name in ("topk", "topk, abs", "jumprelu", "qwen3", "gemma2", "gpt2"):
        yield f"tensors of {name}", lambda name=name: tensors(name)
        yield f"analyze {name}", lambda name=name: analyze(name)
    yield "find", find
    yield "ablate", ablate
    for name in ("topk", "batchtopk", "jumprelu", "gpt2"):
        yield f"convert {name}", lambda name=name: convert(name)
    for name in COMMANDS:
        yield f"command {name}", lambda name=name: command(name)
    for name in ("exact", "shard"):
        yield f"two processes, {name}", lambda name=name: two_processes(name)


def sha256(data: bytes) -> str:
    """Return a SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def of_tensor(values: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's bits."""
    bits = values.detach().contiguous().reshape(-1).view(torch.uint8)
    return sha256(f"{values.dtype} {tuple(values.shape)}".encode() + bits.numpy().tobytes())


def of_data(data: Any) -> str:
    """Return the SHA-256 of JSON-able data, without what LEFT_OUT names."""
    text = json.dumps(cleaned(data), sort_keys=True, default=str)
    return sha256(text.replace(str(Path.cwd()), ".").encode())


def cleaned(data: Any) -> Any:
    """Return data without what LEFT_OUT names."""
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        data = dataclasses.asdict(data)
    if isinstance(data, dict):
        return {name: cleaned(value) for name, value in data.items() if name not in LEFT_OUT}
    return [cleaned(value) for value in data] if isinstance(data, list | tuple) else data


def of_files(root: Path) -> Parts:
    """Return a SHA-256 for all files of a kind in a folder: their names, and what is in them."""
    kinds: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if not path.is_file() or path.suffix == ".png" or "journal" in name.parts:
            continue
        if path.suffix == ".json":
            digest = of_data(json.loads(path.read_text("utf-8")))
        elif path.suffix == ".jsonl":
            digest = of_data([json.loads(line) for line in path.read_text("utf-8").splitlines()])
        else:
            digest = sha256(path.read_bytes())
        kinds.setdefault(path.suffix.strip(".") or "data", []).append(f"{name} {digest}")
    return {kind: sha256("\n".join(lines).encode()) for kind, lines in kinds.items()}


def harvest_config(store: str, **changes: Any) -> HarvestConfig:
    settings: dict[str, Any] = {
        "model": "models/llama",
        "layers": "1" if changes.get("model") == "models/small" else "1,2",
        "store": store,
        "data": "text",
        "n_ctx": N_CTX,
        "tokens": 150 * N_CTX,
        "device": "cpu",
    }
    return HarvestConfig(**settings | changes)


def harvest(store: str, **changes: Any) -> Parts:
    harvest_activations(harvest_config(store, **changes))
    opened = ActivationStore.open(store)
    x = opened.inputs(LAYER, range(0, opened.manifest.n_seq, 3))
    held_out = opened.held_out_seqs.tolist()
    read = {"read": of_tensor(x), "held out": of_data(held_out)}
    return {**of_files(Path(store)), **read, "info": of_data(store_info(store))}


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
    stopped(lambda: harvest_activations(config, report=stop_after(70)))
    missing = store_info("acts/stopped")["n_missing_shards"]
    harvest_activations(config)
    verified = verify_store("acts/stopped", full=True)
    return {**of_files(Path("acts/stopped")), "missing": of_data(missing), "ok": of_data(verified)}


def layers_added() -> Parts:
    harvest_activations(harvest_config("acts/added", layers="1"))
    more = harvest_config("acts/added", layers="0-2")
    stopped(lambda: harvest_activations(more, report=stop_after(70)))
    harvest_activations(more)
    return of_files(Path("acts/added"))


def merged() -> Parts:
    harvest_activations(harvest_config("acts/b", data="text-b"))
    merge_stores([MAIN, "acts/b"], "acts/merged")
    parts = of_files(Path("acts/merged"))
    remove_layers("acts/merged", "2")
    fewer = of_files(Path("acts/merged"))
    return {**parts, **{f"{kind}, fewer layers": digest for kind, digest in fewer.items()}}


def train_config(name: str, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "store": MAIN,
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
    return TrainConfig(**settings | changes)


def run_folder(name: str) -> Path:
    """Return the folder of a run, whose name has no characters that paths lack."""
    return Path("runs") / re.sub(r"\W+", "-", name)


def train(name: str, **changes: Any) -> Parts:
    result = train_lorsa(train_config(name, **changes))
    return {**of_files(run_folder(name)), "result": of_data(result)}


def train_stopped(activation: str) -> Parts:
    name = f"{activation}-stopped"
    config = train_config(name, activation=activation, checkpoint_every_tokens=9 * STEP)
    stopped(lambda: train_lorsa(config, report=stop_after(20)))
    there = of_files(run_folder(name))
    train_lorsa(config)
    return {f"{kind}, stopped": digest for kind, digest in there.items()} | of_files(
        run_folder(name)
    )


def train_layers() -> Parts:
    configs = [train_config(f"layer-{layer}", layer=layer) for layer in (1, 2)]
    outcomes = train_lorsas(configs)
    assert all(outcome.failure is None for outcome in outcomes)
    return {
        f"{config.out.name} {kind}": digest
        for config in configs
        for kind, digest in of_files(config.out).items()
    }


def sweep() -> Parts:
    base = train_config("sweep", train_tokens=20 * STEP).to_dict()
    values = {"top_k": [4, 8], "activation": ["topk", "batchtopk", "jumprelu"], "lr": [1e-3, 2e-3]}
    base = {name: value for name, value in base.items() if name not in (*values, "out")}
    result = sweep_lorsas(base, values, "sweep")
    assert result.n_groups == 1
    shutil.rmtree("sweep-table", ignore_errors=True)
    parts = of_files(Path("sweep"))
    del parts["csv"]  # has tokens per second
    return parts


def eval_config(name: str, **changes: Any) -> EvalConfig:
    store = RUNS[name].get("store", MAIN)
    return EvalConfig(run=run_folder(name), store=store, device="cpu", **changes)


def evaluate(name: str) -> Parts:
    alone = evaluate_lorsa(eval_config(name))
    inside = evaluate_lorsa(eval_config(name, model="models/llama", ce_tokens=6 * N_CTX))
    kept = json.loads((run_folder(name) / "eval.json").read_text("utf-8"))
    parts = {"on the store": alone.to_dict(), "in the model": inside.to_dict(), "kept": kept}
    return {part: of_data(found) for part, found in parts.items()}


def evaluate_together() -> Parts:
    configs = [
        EvalConfig(run=Path(f"runs/layer-{n}"), store=MAIN, model="models/llama", device="cpu")
        for n in (1, 2)
    ]
    return {"all": of_data(evaluate_lorsas(configs).to_dict())}


def tensors(name: str) -> Parts:
    opened = ActivationStore.open(RUNS[name].get("store", MAIN))
    x = opened.inputs(LAYER, opened.held_out_seqs[:3]).float()
    trained = Lorsa.from_pretrained(run_folder(name))
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
    store = RUNS[name].get("store", MAIN)
    model = f"models/{name}" if name in MODELS else "models/llama"
    for out, given in ((f"analyses/{run_folder(name).name}", None), (None, model)):
        config = AnalyzeConfig(
            run=run_folder(name), store=store, model=given, out=out, device="cpu"
        )
        analyze_lorsa(config)
    without = of_files(Path("analyses") / run_folder(name).name)
    return of_files(run_folder(name) / "analysis") | {
        f"{kind}, no model": digest for kind, digest in without.items()
    }


def find() -> Parts:
    kinds = ("previous_token", "induction", "local", "same_token")
    runs = [run_folder(name) for name in ("topk", "jumprelu")]
    parts = {f"runs, {kind}": of_data(find_heads(kind, runs=runs)) for kind in kinds}
    return parts | {f"model, {kind}": of_data(find_heads(kind, store=MAIN)) for kind in kinds}


def ablate() -> Parts:
    change: dict[str, dict[str, Any]] = {
        "ablated": {},
        "doubled": {"scale": 2.0, "error": "drop"},
        "set": {"value": 1.5},
    }
    parts = {}
    for part, asked in change.items():
        config = AblateConfig(
            run=run_folder("topk"),
            model="models/llama",
            heads="0-9",
            tokens="5,17,30,5,17",
            **asked,
        )
        parts[part] = of_data(ablate_heads(config).to_dict())
    return parts


def convert(name: str) -> Parts:
    model = f"models/{name}" if name in MODELS else "models/llama"
    parts: Parts = {}
    for with_model in (None, model):
        theirs = Path(f"theirs/{name}-{with_model is not None}")
        ours = Path(f"ours/{name}-{with_model is not None}")
        convert_lorsa(
            ConvertConfig(
                source=str(run_folder(name)), out=theirs, to="llamascopium", model=with_model
            )
        )
        convert_lorsa(ConvertConfig(source=str(theirs), out=ours, model=with_model, max_l0=None))
        for folder in (theirs, ours):
            parts |= {f"{folder.parent}, {with_model}, {k}": v for k, v in of_files(folder).items()}
    return parts


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
