"""Reading, tokenising and packing a corpus: tokens per second and peak memory.

The text is made of the words of Python's standard library, in documents of a length drawn from a
lognormal law (median 3,000 characters), written as one .jsonl file; and once as one line of 10 MB.

    python benchmarks/bench_corpus.py                     # the SmolLM2 tokenizer, 10 million tokens
    python benchmarks/bench_corpus.py --tokens 2_000_000 --write

Memory is that of a process of its own: the most that it held in anonymous pages (Linux), minus what
it held after imports and a first call of the tokenizer. "whole" is the same 10 MB in one call.
"""

import argparse
import json
import multiprocessing
import random
import re
import sysconfig
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lorsa.harvest.corpus.corpus import open_corpus
from lorsa.harvest.corpus.document import Document
from lorsa.harvest.corpus.packing import pack
from lorsa.harvest.corpus.tokenise import ids_of_texts
from lorsa.language.aliases import demo_file
from lorsa.language.subject import Subject
from measure import append_row, machine

RESULTS = Path(__file__).parent / "results" / "bench_corpus.md"
LINE_CHARACTERS = 10_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--n-ctx", type=int, default=1024)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", action="store_true", help=f"append rows to {RESULTS.name}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer"
        Subject.find(str(demo_file())).tokenizer().save_pretrained(tokenizer)
        write_corpus(Path(folder), args.tokens * 4)
        result = {
            name: alone(job, folder, args)
            for name, job in (("packed", packed), ("line", line_in_pieces), ("whole", line_whole))
        }
    result["same_ids"] = result["line"].pop("hash") == result["whole"].pop("hash")
    result["machine"] = machine("transformers", "tokenizers")
    if args.write:
        write_rows(result)
    print(json.dumps(result) if args.json else json.dumps(result, indent=2))


def write_corpus(folder: Path, n_characters: int) -> None:
    rng, np_rng = random.Random(0), np.random.default_rng(0)
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = "\n".join(file.read_text("utf-8", errors="replace") for file in sources)
    with (folder / "corpus.jsonl").open("w") as out:
        while n_characters > 0:
            length = min(int(np_rng.lognormal(8.0, 1.0)), len(text) // 2)
            start = rng.randrange(len(text) - length)
            out.write(json.dumps({"text": text[start : start + length]}) + "\n")
            n_characters -= length
    words = text.split()
    rng.shuffle(words)
    line = " ".join(words * (LINE_CHARACTERS // len(text) * 2 + 2))
    (folder / "line.txt").write_text(line[:LINE_CHARACTERS])


def alone(job: Callable[..., dict[str, Any]], folder: str, args: argparse.Namespace) -> Any:
    """Do a job in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measured, (job, folder, args.tokens, args.n_ctx))


def measured(
    job: Callable[..., dict[str, Any]], folder: str, tokens: int, n_ctx: int
) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
    tokenizer(["warm up"] * 8)
    before, peak, done = held_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], held_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    result = job(Path(folder), tokenizer, tokens, n_ctx)
    seconds = time.perf_counter() - started
    done.set()
    thread.join()
    result["tokens_per_second"] = result["tokens"] / seconds
    result["peak_bytes"] = max(peak[0], held_bytes()) - before
    return result


def held_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))
    assert found is not None
    return int(found[1]) * 1024


def packed(folder: Path, tokenizer: Any, tokens: int, n_ctx: int) -> dict[str, Any]:
    docs = open_corpus(str(folder / "corpus.jsonl")).documents()
    made = pack(docs, tokenizer, n_ctx=n_ctx, max_tokens=tokens)
    n_tokens = made.tokens.numel()
    return {"tokens": n_tokens, "result_bytes": 8 * n_tokens}


def line_in_pieces(folder: Path, tokenizer: Any, tokens: int, n_ctx: int) -> dict[str, Any]:
    doc = Document("line", (folder / "line.txt").read_text())
    ((_, ids),) = ids_of_texts([doc], tokenizer)
    return {"tokens": len(ids), "hash": zlib.crc32(ids.tobytes())}


def line_whole(folder: Path, tokenizer: Any, tokens: int, n_ctx: int) -> dict[str, Any]:
    text = (folder / "line.txt").read_text()
    ids = np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return {"tokens": len(ids), "hash": zlib.crc32(ids.astype(np.int64).tobytes())}


def write_rows(result: dict[str, Any]) -> None:
    for name in ("packed", "line", "whole"):
        row = result[name]
        rate, peak = f"{row['tokens_per_second']:,.0f}", f"{row['peak_bytes'] / 1e6:,.0f}"
        append_row(RESULTS, [name, f"{row['tokens']:,}", rate, peak, result["machine"]])


if __name__ == "__main__":
    main()
