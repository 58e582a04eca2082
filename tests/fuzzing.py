"""Commands on inputs that are mistyped, damaged or odd at random; each ends as promised.

A case is a number: it seeds which command runs, on what, and what is wrong with it. It runs in a
process of its own, so that crashes and hangs are seen, too.
"""

import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import typer
from lorsa import cli
from lorsa.analyze.config import AnalyzeConfig
from lorsa.analyze.features import analyze_run
from lorsa.seal import json_crc32c
from lorsa.store.manifest import SEAL
from lorsa.train.config import TrainConfig
from lorsa.train.train import train
from tiny import N_CTX
from unseal import unseal

LONGEST_S = 120
"""Seconds after which a command hangs."""
SMALL = ["--top-k", "4", "--batch-tokens", str(2 * N_CTX), "--train-tokens", str(4 * N_CTX)]
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 3, 10**9, 10**30, 1e308, -0.5, float("nan"), "", "x", "0", "\0",
    "../x", "\udcff", "a\nb", "x" * 999, [], {}, [[]], [1, "a", None], {"a": {"b": [1]}},
]  # fmt: skip
WORDS = [
    "", "x", "-1", "0", "1", "3", "7,1", "1-", "-", "0-9999999999", "1e3", "nan", "inf", "1" * 30,
    "~",
    "~nouser/x", "/", ".", "..", "nowhere", "acts", "runs/layer-1", "model", "text",
    "text/doc0.txt",
    "/dev/null", "a:b", "owner/name", "s3://", "s3://x", "hf://x/y", "x" * 4096,
    "\udcff", "a\nb", "é",
    "cpu", "cuda:9", "all", "none", "true", "[1]", "{}", "induction",
]  # fmt: skip


LATE = (
    "circuits.ablate", "publish.push", "exchange.convert", "view.build", "store.care.merge",
    "analyze.explain.explain", "analyze.found", "display.show", "train.sweep",
)  # fmt: skip
"""Modules that commands import when they run."""


class Outcome(NamedTuple):
    """What became of a case."""

    argv: list[str]
    changed: str
    """What was wrong with the inputs"""
    code: int
    """Exit code; negative of a signal"""
    out: str
    err: str

    @property
    def fault(self) -> str | None:
        """What is not as promised; None where all is."""
        if self.code == -signal.SIGALRM:
            return "hangs"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        if "Traceback" in self.err:
            return "traceback"
        said = [line for line in self.err.splitlines() if line.startswith("error: ")]
        told = "verify" in self.argv[:2] or '"failed"' in self.out
        if self.code and not said and not told:
            return "no line says why"
        with suppress(ValueError):
            return None if isinstance(json.loads(self.out), dict) else "no JSON object"
        return "no JSON"


def make_world(folder: Path, model: Path, text: Path, store: Path) -> None:
    """Make what the commands read: a model, its text, store, and an unsealed run and analysis."""
    for source, name in ((model, "model"), (text, "text"), (store, "acts")):
        shutil.copytree(source, folder / name)
    run = folder / "runs/layer-1"
    settings: dict[str, Any] = {"top_k": 4, "batch_tokens": 2 * N_CTX, "train_tokens": 8 * N_CTX}
    train(TrainConfig(store=folder / "acts", layer=1, out=run, device="cpu", **settings))
    wanted = {"run": run, "store": folder / "acts", "tokens": 256, "device": "cpu"}
    analyze_run(AnalyzeConfig(model=str(model), **wanted))
    for sealed in (run, run / "analysis"):
        unseal(sealed)  # or a seal would tell before anything is read


COMMANDS: dict[str, list[list[str]]] = {
    "acts": [
        ["store", "info", "acts"],
        ["store", "verify", "acts"],
        ["store", "verify", "acts", "--full", "--repair"],
        ["store", "rm", "acts", "--layers", "2"],
        ["store", "merge", "acts", "acts", "--out", "out"],
        ["train", "--store", "acts", "--layers", "1", "--out", "out", *SMALL],
        ["find", "induction", "--store", "acts", "--layers", "1"],
        ["eval", "runs/layer-1", "--store", "acts", "--tokens", "64"],
        ["analyze", "runs/layer-1", "--store", "acts", "--tokens", "64"],
        ["harvest", "--model", "model", "--data", "text", "--store", "acts", "--device", "cpu"],
    ],
    "runs/layer-1": [
        ["eval", "runs/layer-1", "--store", "acts", "--tokens", "64"],
        ["analyze", "runs/layer-1", "--store", "acts", "--tokens", "64"],
        ["push", "runs/layer-1", "--repo", "out", "--dry-run"],
        ["push", "runs/layer-1", "--repo", "./out"],
        ["convert", "runs/layer-1", "out", "--to", "llamascopium"],
        ["ablate", "runs/layer-1", "--heads", "1", "--model", "model", "--prompt", "The fox"],
        ["train", "--store", "acts", "--layers", "1", *SMALL],
        ["verify", "runs/layer-1"],
    ],
    "runs/layer-1/analysis": [
        ["find", "induction", "runs/layer-1"],
        ["find", "local", "runs/layer-1", "--layers", "1"],
        ["view", "runs/layer-1", "--out", "out"],
        ["verify", "runs/layer-1/analysis"],
        ["push", "runs/layer-1", "--repo", "out", "--dry-run"],
        ["explain", "runs/layer-1", "--endpoint", "http://127.0.0.1:9/v1", "--model", "m"],
        ["analyze", "runs/layer-1", "--store", "acts", "--tokens", "256"],
    ],
    "model": [
        ["harvest", "--model", "model", "--data", "text", "--store", "out", "--tokens", "64",
         "--n-ctx", "16", "--layers", "1", "--device", "cpu"],
        ["eval", "runs/layer-1", "--store", "acts", "--model", "model", "--tokens", "64"],
        ["ablate", "runs/layer-1", "--heads", "1", "--model", "model", "--prompt", "The fox"],
    ],
}  # fmt: skip
"""What is damaged, and the commands that read it."""


def run_case(seed: int, world: Path, folder: Path) -> Outcome:
    """Make the inputs of a case in a new folder, run its command there, and remove the folder."""
    rng = random.Random(seed)
    folder.mkdir()
    try:
        kind = rng.choice([*COMMANDS, "options", "config", "corpus"])
        if kind in COMMANDS:
            argv, changed = _damaged(rng, kind, world, folder)
        else:
            _links(world, folder)
            argv, changed = {"options": _options, "config": _config, "corpus": _corpus}[kind](
                rng, folder
            )
        code, out, err = run_alone([*argv, "--json"], folder)
        return Outcome(argv, changed, code, out, err)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_alone(argv: list[str], folder: Path) -> tuple[int, str, str]:
    """Run a command in a process of its own; return exit code or minus signal, stdout, stderr."""
    out, err = folder.parent / f"{folder.name}.out", folder.parent / f"{folder.name}.err"
    child = os.fork()
    if child == 0:
        _be_lorsa(argv, folder, out, err)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = [path.read_bytes().decode("utf-8", "replace") for path in (out, err)]
    out.unlink()
    err.unlink()
    return code, texts[0], texts[1]


def _be_lorsa(argv: list[str], folder: Path, out: Path, err: Path) -> None:
    """Become the command; this process ends here."""
    code = 99
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LONGEST_S)
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        os.environ.pop("LORSA_DEBUG", None)
        tempfile.tempdir = str(folder.parent)  # of traces
        os.chdir(folder)
        sys.argv = ["lorsa", *argv]
        cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 98
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _links(world: Path, folder: Path, but: str = "") -> None:
    """Give a case the world, its own copy of what is to be damaged."""
    for name in ("model", "text", "acts", "runs"):
        if but.startswith(name) or name == "runs":
            shutil.copytree(world / name, folder / name)
        else:
            (folder / name).symlink_to(world / name)


def _damaged(rng: random.Random, kind: str, world: Path, folder: Path) -> tuple[list[str], str]:
    _links(world, folder, kind)
    files = sorted(path for path in (folder / kind).rglob("*") if path.is_file())
    files = [path for path in files if kind != "runs/layer-1" or "analysis" not in path.parts]
    words = [p for p in files if p.suffix in (".json", ".jsonl", ".parquet", ".safetensors")]
    path = rng.choice(words if words and rng.random() < 0.8 else files)
    said = damage(rng, path, files)
    return rng.choice(COMMANDS[kind]), f"{path.relative_to(folder)}: {said}"


def damage(rng: random.Random, path: Path, others: list[Path]) -> str:
    """Damage a file: its content by its kind, or its bytes; return what was done."""
    by_kind: dict[str, Callable[[random.Random, bytes], tuple[bytes, str]]] = {
        ".json": _json,
        ".jsonl": _jsonl,
        ".parquet": _parquet,
        ".safetensors": _tensors,
    }
    content = path.read_bytes()
    if path.suffix in by_kind and rng.random() < 0.75:
        with suppress(ValueError, pa.ArrowException, KeyError, OverflowError):
            content, said = by_kind[path.suffix](rng, content)
            path.write_bytes(content)
            return said
    return _bytes(rng, path, content, others)


def _bytes(rng: random.Random, path: Path, content: bytes, others: list[Path]) -> str:
    how = rng.choice(["cut", "empty", "noise", "swap", "gone", "folder", "loop", "more"])
    path.unlink()
    if how == "cut":
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif how == "empty":
        path.touch()
    elif how == "noise":
        path.write_bytes(rng.randbytes(rng.randrange(1, 300)))
    elif how == "swap":
        other = rng.choice([p for p in others if p != path] or [Path(__file__)])
        path.write_bytes(other.read_bytes())
        how = f"is {other.name}"
    elif how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path)
    elif how == "more":
        path.write_bytes(content + rng.randbytes(9))
    return how


def mistype(rng: random.Random, content: Any) -> tuple[Any, str]:
    """Return content with one value of another kind, gone or doubled, and where that is."""
    places = list(_places(content, ()))
    place = rng.choice(places)
    if not place:
        value = rng.choice(ODD)
        return value, f"all is {value!r:.60}"
    holder = content
    for step in place[:-1]:
        holder = holder[step]
    if rng.random() < 0.2:
        del holder[place[-1]]
        return content, f"{place} is gone"
    value = rng.choice(ODD)
    said = f"{place} is {value!r:.60}"
    if rng.random() < 0.05:
        for _ in range(3000):
            value = [value]
        said = f"{place} is deep"
    holder[place[-1]] = value
    return content, said


def _places(content: Any, at: tuple[Any, ...]) -> Any:
    yield at
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _places(value, (*at, key))
    elif isinstance(content, list):
        for key, value in list(enumerate(content))[:5]:
            yield from _places(value, (*at, key))


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 100_000 + "]" * 100_000


def sealed_anew(content: Any) -> Any:
    """Return facts with their own checksum made anew, where they have one: they look whole."""
    if not isinstance(content, dict) or SEAL not in content:
        return content
    rest = {name: value for name, value in content.items() if name != SEAL}
    return rest | {SEAL: json_crc32c(rest)}


def _json(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    found, said = mistype(rng, json.loads(content))
    if "deep" not in said and rng.random() < 0.8:
        found = sealed_anew(found)
    text = _dumps(found)
    if rng.random() < 0.1 and text.startswith("{") and len(text) > 2:
        key = json.dumps(rng.choice(list(found)))
        return f"{{{key}: 1, {text[1:]}".encode(), f"{said}, {key} twice"
    return text.encode("utf-8", "surrogatepass"), said


def _jsonl(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at], said = _json(rng, lines[at])
    return b"\n".join(lines), f"line {at}: {said}"


def _parquet(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    table = pq.read_table(io.BytesIO(content), use_threads=False)
    name = rng.choice(table.column_names)
    at = table.column_names.index(name)
    how = rng.choice(["gone", "renamed", "null", "odd", "none", "twice", "empty", "other", "more"])
    n = len(table)
    if how == "gone":
        table = table.drop_columns([name])
    elif how == "renamed":
        table = table.rename_columns([c if c != name else f"{c}x" for c in table.column_names])
    elif how == "null":
        table = table.set_column(at, name, pa.nulls(n, table.schema.field(name).type))
    elif how == "none":
        table = table.set_column(at, name, pa.nulls(n))
    elif how == "odd":
        table = table.set_column(at, name, pa.array([str(rng.choice(ODD))[:9] for _ in range(n)]))
    elif how == "other":
        table = table.set_column(at, name, pa.array([rng.randrange(-9, 10**12) for _ in range(n)]))
    elif how == "twice":
        table = pa.concat_tables([table, table])
    elif how == "empty":
        table = table.slice(0, 0)
    elif how == "more":
        table = table.append_column("x", pa.array(range(n)))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue(), f"{name} {how}"


def _tensors(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    facts = header.get("__metadata__")
    if rng.random() < 0.4:
        header, said = mistype(rng, header)
        text = _dumps(header).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + content[8 + size :], said
    tensors = safetensors.torch.load(content)
    name = rng.choice(list(tensors))
    how = rng.choice(["gone", "flat", "nan", "int", "less", "twice"])
    value = tensors[name]
    if how == "gone":
        del tensors[name]
    elif how == "flat":
        tensors[name] = value.reshape(-1).clone()
    elif how == "nan":
        tensors[name] = torch.full(value.shape, torch.nan)
    elif how == "int":
        tensors[name] = torch.ones(value.shape, dtype=torch.int64)
    elif how == "less":
        tensors[name] = value.reshape(-1)[:1].clone()
    elif how == "twice":
        tensors[f"{name}.x"] = value.clone()
    return safetensors.torch.save(tensors, facts), f"{name} {how}"


def _options(rng: random.Random, _folder: Path) -> tuple[list[str], str]:
    """Type odd values for some options of a command."""
    argv = list(rng.choice([argv for some in COMMANDS.values() for argv in some]))
    group: Any = typer.main.get_command(cli.app)
    command = group.commands[argv[0]]
    depth = 1
    if hasattr(command, "commands"):
        command, depth = command.commands[argv[1]], 2
    params = command.get_params(typer.Context(command))
    options = [p.opts[0] for p in params if p.opts[0].startswith("--")]
    options = [name for name in options if name not in ("--help", "--json", "--serve", "--open")]
    for _ in range(rng.randrange(1, 3) if options else 0):
        argv += [rng.choice(options), rng.choice(WORDS)]
    if rng.random() < 0.4 and len(argv) > depth:
        argv[rng.randrange(depth, len(argv))] = rng.choice(WORDS)
    return argv, "options"


def _config(rng: random.Random, folder: Path) -> tuple[list[str], str]:
    """Write settings of odd values into a TOML file."""
    argv = list(rng.choice([["train", "--store", "acts", "--out", "out"],
                            ["sweep", "--store", "acts", "--out", "out"],
                            ["harvest", "--model", "model", "--store", "out"]]))  # fmt: skip
    from lorsa.harvest.config import HarvestConfig

    kind: Any = HarvestConfig if argv[0] == "harvest" else TrainConfig
    names = list(kind.__dataclass_fields__)
    lines = ["train_tokens = 64", "top_k = 4"] if argv[0] != "harvest" else ['data = "text"']
    if argv[0] == "harvest":
        lines += ["tokens = 64", "n_ctx = 16"]
    for _ in range(rng.randrange(1, 4)):
        value = rng.choice([v for v in ODD if v is not None and "\\ud" not in json.dumps(v)])
        text = json.dumps(value).replace("NaN", "nan").replace("null", "0").replace(": ", " = ")
        lines.append(f"{rng.choice(names)} = {text}")
    if rng.random() < 0.2:
        lines.append(rng.choice(["[run]", "[[run]]\nlr = 1", "x", "= 1", "run = 3", "\udcff"]))
    content = "\n".join(dict.fromkeys(lines))
    (folder / "c.toml").write_bytes(content.encode("utf-8", "surrogateescape"))
    return [*argv, "--config", "c.toml"], content


def _corpus(rng: random.Random, folder: Path) -> tuple[list[str], str]:
    """Harvest a folder of odd files."""
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "good.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    said = []
    for i in range(rng.randrange(1, 4)):
        make = rng.choice([_odd_table, _odd_lines, _odd_bytes, _odd_dataset])
        said.append(make(rng, corpus, f"odd{i}"))
    data = rng.choice(["corpus", "corpus", "corpus", str(folder / "corpus" / "odd0"), "~nouser/x"])
    argv = ["harvest", "--model", "model", "--store", "out", "--tokens", "64", "--n-ctx", "16"]
    return [*argv, "--layers", "1", "--device", "cpu", "--data", data], "; ".join(said)


def _odd_column(rng: random.Random) -> Any:
    texts = ["a b c d e", None, "the quick fox", ""] * 3
    kind = rng.choice([
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(),
        pa.binary(5), pa.dictionary(pa.int8(), pa.string()), pa.list_(pa.string()), pa.int64(),
        pa.float64(), pa.bool_(), pa.null(), pa.struct([("a", pa.string())]), pa.timestamp("ns"),
        pa.decimal128(9, 2), pa.map_(pa.string(), pa.string()), pa.date32(),
    ])  # fmt: skip
    if pa.types.is_fixed_size_binary(kind) and not pa.types.is_decimal(kind):
        return pa.array([b"abcde", None] * 6, kind)
    with suppress(pa.ArrowException, TypeError, ValueError):
        return pa.array(texts, kind)
    with suppress(pa.ArrowException, TypeError, ValueError):
        return pa.array([["a b"], None] * 6, kind)
    return pa.nulls(12, kind)


def _odd_table(rng: random.Random, folder: Path, name: str) -> str:
    names = rng.choices(["text", "id", "content", "Text", "", "a.b"], k=2)
    table = pa.table({name: _odd_column(rng) for name in names})
    how = rng.choice(["parquet", "arrow", "feather", "csv"])
    path = folder / f"{name}.{how}"
    if how == "parquet":
        pq.write_table(table, path)
    elif how == "csv":
        text = "text,x\n" + "\n".join(
            rng.choice(['"a', "a,b,c", "\0", "a b", '""']) for _ in range(9)
        )
        path.write_text(text)
    else:
        with pa.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    return f"{path.name} {table.schema}".replace("\n", ", ")


def _odd_lines(rng: random.Random, folder: Path, name: str) -> str:
    lines = []
    for _ in range(rng.randrange(1, 6)):
        row: Any = {"text": "The fox and the dog. " * 9, "id": 1}
        if rng.random() < 0.6:
            row, _ = mistype(rng, row)
        text = _dumps(row)
        lines.append(text if rng.random() < 0.8 else text[: rng.randrange(len(text) + 1)])
    if rng.random() < 0.2:
        lines.append('{"text": "a", "text": ["b"]}')
    path = folder / f"{name}.{rng.choice(['jsonl', 'json', 'ndjson'])}"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return f"{path.name} {lines[0][:60]}"


def _odd_bytes(rng: random.Random, folder: Path, name: str) -> str:
    import gzip

    ends = "txt gz txt.gz zst jsonl.zst xz bz2 lz4 zip tar parquet arrow json jsonl csv md py html"
    path = folder / f"{name}.{rng.choice(ends.split())}"
    content = rng.choice([b"", b"\0" * 99, rng.randbytes(300), b"\xff\xfea\0b\0", b"text " * 99])
    if rng.random() < 0.3:
        content = gzip.compress(content)[: rng.randrange(1, 60)]
    path.write_bytes(content)
    return f"{path.name} {content[:20]!r}"


def _odd_dataset(rng: random.Random, folder: Path, name: str) -> str:
    """Save a dataset as `save_to_disk` does, with odd facts."""
    saved = folder / name
    saved.mkdir()
    table = pa.table({"text": _odd_column(rng)})
    with pa.ipc.new_stream(saved / "data-00000-of-00001.arrow", table.schema) as file:
        file.write_table(table)
    state: Any = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": None,
                  "_fingerprint": "a", "_format_columns": None, "_format_type": None}  # fmt: skip
    if rng.random() < 0.3:
        state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    facts: Any = {"features": {"text": {"dtype": "string", "_type": "Value"}}, "splits": {}}
    said = ""
    if rng.random() < 0.7:
        state, said = mistype(rng, state)
    if rng.random() < 0.4:
        facts, _ = mistype(rng, facts)
    (saved / "state.json").write_bytes(_dumps(state).encode("utf-8", "surrogatepass"))
    (saved / "dataset_info.json").write_bytes(_dumps(facts).encode("utf-8", "surrogatepass"))
    return f"{name}/state.json {said}"


def fuzz(
    world: Path, seeds: range, *, seconds: float, report: Callable[[int, Outcome], None]
) -> int:
    """Run cases until the time is over; return how many ran."""
    warnings.simplefilter("ignore")
    for name in LATE:  # once, and not in every process
        import_module(f"lorsa.{name}")
    start, n = time.monotonic(), 0
    for seed in seeds:
        if time.monotonic() - start > seconds:
            break
        report(seed, run_case(seed, world, world.parent / f"case-{seed}"))
        n += 1
    return n
