"""Stores, runs and analyses as version 0.1.0 writes them, packed for tests/test_before.py.

    python tests/before/make.py FOLDER

Run it with the code of commit 14518a9, which is version 0.1.0, and with no other: what lies here
is there to hold later code to it. FOLDER must be new. All is made in it, measured, and packed into
the archives beside this script; recorded.json says what was measured. Absolute paths in the stores
become PLACE, which the test replaces by the folder that it unpacks into.
"""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lorsa
import torch
import transformers
from lorsa import (
    ActivationStore,
    AnalyzeConfig,
    ConvertConfig,
    EvalConfig,
    HarvestConfig,
    TrainConfig,
    __version__,
    analyze_lorsa,
    convert_lorsa,
    evaluate_lorsa,
    evaluate_lorsas,
    find_heads,
    harvest_activations,
    store_info,
    sweep_lorsas,
    train_lorsa,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
ARCHIVES = {
    "model.tar.xz": ("model", "text"),
    "modes.tar.xz": ("modes",),
    "unfinished.tar.xz": ("unfinished", "whole"),
    "runs.tar.xz": ("acts", "runs", "stopped", "sweep", "half-read", "llamascopium"),
}
COMMIT = "14518a9"
PLACE = "@BEFORE@"
MODEL, TEXT = Path("model"), Path("text")
N_CTX, LAYER = 12, 1
STEP = 4 * N_CTX
N_STEPS, STOP_AFTER = 24, 18
MODES = [
    (dtype, compression, outputs)
    for dtype in ("float32", "bfloat16", "float16", "int8")
    for compression in ("none", "lz4", "zstd")
    for outputs in ("store", "derive")
    if (dtype, compression) != ("int8", "lz4")
]
UNFINISHED = {
    "float32": {"layers": "0,1", "dtype": "float32"},
    "int8": {"layers": "1", "dtype": "int8", "compression": "zstd", "outputs": "derive"},
}
RUNS: dict[str, dict[str, Any]] = {
    "topk": {"top_k": 6},
    "batchtopk": {"top_k": 6, "activation": "batchtopk", "loss_mask": "first"},
    "jumprelu": {"top_k": 6, "activation": "jumprelu", "layer": 2},
}
SWEEP: dict[str, list[Any]] = {"top_k": [4, 6], "select": ["relu", "abs"]}
SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on. "
    "A store keeps what a model saw; a head reads one thing and writes another. "
)


class Stop(Exception):  # noqa: N818
    """Ends a harvest, a run or an analysis from outside."""


def main() -> None:
    code = Path(lorsa.__file__).parent
    changed = ["git", "diff", "--quiet", COMMIT, "--", ".", ":!tests", ":!benchmarks"]
    if subprocess.run(changed, cwd=code, check=False).returncode:
        sys.exit(f"{code} is not the code of commit {COMMIT}")
    folder = Path(sys.argv[1])
    if len(sys.argv) > 2:  # a harvest that ends as if it were killed
        os.chdir(folder)
        harvest_activations(store_config(sys.argv[2]), report=kill_at(20))
        return
    folder.mkdir(parents=True)
    os.chdir(folder)
    make_model()
    make_unfinished()
    recorded = {
        "versions": {"lorsa": __version__, "torch": torch.__version__},
        "modes": make_modes(),
        "runs": make_runs(),
        "sweep": make_sweep(),
        "analysis": make_analysis(),
    }
    for root in sorted({path.parent for path in Path().rglob("tokens") if path.is_dir()}):
        for name in ("manifest.json", "journal/plan.json"):
            if (path := root / name).exists():
                path.write_text(path.read_text().replace(str(Path.cwd()), PLACE))
    pack()
    (HERE / "recorded.json").write_text(json.dumps(recorded, indent=1) + "\n")


def make_model() -> None:
    """Make a three-layer Llama with random weights, a tokenizer and some text."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(MODEL)
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
    tokenizer.save(str(MODEL / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (MODEL / "tokenizer_config.json").write_text(json.dumps(facts))
    TEXT.mkdir()
    words = (SENTENCES * 12).split()
    for i in range(8):
        (TEXT / f"doc{i}.txt").write_text(" ".join(words[i * 7 :] + words[: i * 7]))


def store_config(name: str, **changes: Any) -> HarvestConfig:
    """Return the request of a store; one of UNFINISHED by its name."""
    settings: dict[str, Any] = {
        "model": str(MODEL),
        "layers": str(LAYER),
        "store": Path("unfinished") / name,
        "data": str(TEXT),
        "n_ctx": N_CTX,
        "tokens": 43 * N_CTX,
        "device": "cpu",
    }
    return HarvestConfig(**settings | UNFINISHED.get(name, {}) | changes)


def make_modes() -> dict[str, Any]:
    """Make a store in every encoding; return what their values come to."""
    facts = {}
    for dtype, compression, outputs in MODES:
        name = f"{dtype}-{compression}-{outputs}"
        root = Path("modes") / name
        harvest_activations(
            store_config(name, store=root, dtype=dtype, compression=compression, outputs=outputs)
        )
        store = ActivationStore.open(root)
        x = store.inputs(LAYER, range(store.manifest.n_seq)).float()
        facts[name] = {"x_sha256": sha256(x)}
        if outputs == "store":
            y = store.activations(LAYER, range(store.manifest.n_seq)).y.float()
            facts[name]["y_sha256"] = sha256(y)
    return facts


def sha256(values: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def make_unfinished() -> None:
    """Make stores that were stopped, killed, and left while layers were added."""
    for name in UNFINISHED:
        if name != "int8":  # which is one of MODES
            harvest_activations(store_config(name, store=Path("whole") / name))
    stopped(lambda report: harvest_activations(store_config("float32"), report=report), 20)
    words = [sys.executable, __file__, str(Path.cwd()), "int8"]
    assert subprocess.run(words, check=False).returncode == 9
    assert 0 < store_info("unfinished/int8")["n_missing_shards"] < 20
    harvest_activations(store_config("adding"))
    more = store_config("adding", layers="0,1")
    stopped(lambda report: harvest_activations(more, report=report), 20)
    harvest_activations(store_config("adding", store=Path("whole/adding"), layers="0,1"))


def kill_at(n_seqs: int) -> Any:
    """Return a report that ends the process where so many sequences are in the store."""

    def report(event: Any) -> None:
        if type(event).__name__ == "Progress" and event.tokens >= n_seqs * N_CTX:
            os._exit(9)

    return report


def stopped(work: Any, n_seqs: int) -> None:
    """Do some work that is stopped where so many sequences, or steps, are done."""

    def report(event: Any) -> None:
        kind = type(event).__name__
        if kind == "Progress" and event.tokens >= n_seqs * N_CTX:
            raise Stop
        if kind == "StepReport" and event.step >= n_seqs:
            raise Stop

    try:
        work(report)
    except Stop:
        return
    raise AssertionError("it was not stopped")


def run_config(name: str, out: Path) -> TrainConfig:
    """Return the request of one of RUNS."""
    return TrainConfig(**run_settings() | RUNS[name], out=out)


def run_settings() -> dict[str, Any]:
    """Return what all runs share."""
    return {
        "store": Path("acts"),
        "layer": LAYER,
        "expansion": 2.0,
        "batch_tokens": STEP,
        "train_tokens": N_STEPS * STEP,
        "init_tokens": 16 * N_CTX,
        "eval_tokens": 4 * N_CTX,
        "checkpoint_every_tokens": STOP_AFTER * STEP,
        "device": "cpu",
    }


def make_runs() -> dict[str, Any]:
    """Make finished runs and the same stopped; return what was measured."""
    harvest_activations(store_config("acts", store=Path("acts"), layers="1,2", tokens=120 * N_CTX))
    facts: dict[str, Any] = {}
    for name in RUNS:
        result = train_lorsa(run_config(name, Path("runs") / name))
        other = run_config(name, Path("stopped") / name)
        stopped(lambda report, other=other: train_lorsa(other, report=report), STOP_AFTER + 2)
        facts[name] = {"fvu": result.fvu, "l0": result.l0, "dead_fraction": result.dead_fraction}
        measured = evaluate_lorsa(measure(name, Path("acts"), model=str(MODEL)))
        facts[name]["eval"] = without_details(measured.to_dict())
    facts["topk"]["modes"] = {
        "-".join(mode): evaluate_lorsa(measure("topk", Path("modes") / "-".join(mode))).fvu
        for mode in MODES
    }
    both = [measure(name, Path("acts"), model=str(MODEL)) for name in ("topk", "jumprelu")]
    facts["together"] = without_details(evaluate_lorsas(both).to_dict()["together"])
    to = ConvertConfig(
        source="runs/topk", out=Path("llamascopium"), to="llamascopium", model=str(MODEL)
    )
    convert_lorsa(to)
    return facts


def without_details(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the measures of an evaluation, but for tables and quotients of small differences."""
    left_out = {"run", "by_position", "frequency_histogram", "top1_agreement", "increase_se"}
    left_out |= {"recovered_from_zero", "recovered_from_mean"}
    return {
        name: without_details(value) if isinstance(value, dict) else value
        for name, value in measured.items()
        if name not in left_out
    }


def measure(name: str, store: Path, **changes: Any) -> EvalConfig:
    """Return what an evaluation of one of RUNS is asked for."""
    return EvalConfig(run=Path("runs") / name, store=store, device="cpu", **changes)


def make_sweep() -> dict[str, Any]:
    """Make a sweep that was stopped; return what a whole one comes to."""
    settings = run_settings()
    whole = sweep_lorsas(settings, SWEEP, "whole-sweep")

    def work(report: Any) -> None:
        sweep_lorsas(settings, SWEEP, "sweep", report=lambda told: report(told.event))

    stopped(work, STOP_AFTER + 2)
    return {Path(row["run"]).name: row["fvu"] for row in whole.rows}


def make_analysis() -> dict[str, Any]:
    """Analyse a run, with the model, and half without; return the heads that are found."""
    run = Path("runs/topk")
    analyze_lorsa(AnalyzeConfig(run=run, store=Path("acts"), model=str(MODEL), device="cpu"))
    half = AnalyzeConfig(run=run, store=Path("acts"), out=Path("half-read"), device="cpu")
    try:
        analyze_lorsa(half, report=stop_writing)
    except Stop:
        pass
    else:
        raise AssertionError("it was not stopped")
    whole = AnalyzeConfig(run=run, store=Path("acts"), out=Path("whole-read"), device="cpu")
    types = analyze_lorsa(whole)["types"]
    found = {}
    for kind in ("previous_token", "induction", "local", "same_token"):
        found[kind] = [asdict(head) | {"run": None} for head in find_heads(kind, runs=[run], n=5)]
    return {"found": found, "types_without_model": types}


def stop_writing(event: Any) -> None:
    """Stop an analysis when all heads were read and nothing is written."""
    if event == "comparing with the layer's own heads":
        raise Stop


def pack() -> None:
    """Write the archives: sorted, and without times and owners."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if entry.name.endswith(".png"):
            return None
        entry.mtime = entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    for archive, folders in ARCHIVES.items():
        with tarfile.open(HERE / archive, "w:xz", preset=9) as file:
            for folder in folders:
                file.add(folder, filter=plain)


if __name__ == "__main__":
    main()
