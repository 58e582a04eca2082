"""The command line: one JSON object, one line for what is wrong, the promised exit codes."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from lorsa import cli
from lorsa.commands.ending import told_in_a_line
from lorsa.commands.harvest import next_of_harvest
from lorsa.display import show as display
from lorsa.train.config import TrainConfig
from lorsa.version import __version__
from small import digests
from tiny import N_CTX
from typer.testing import CliRunner, Result

Lorsa = Callable[..., Result]


@pytest.fixture
def lorsa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lorsa:
    """Run the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORSA_DEBUG", raising=False)

    def run(*args: object) -> Result:
        return CliRunner().invoke(cli.app, [str(arg) for arg in args])

    return run


def _one_line_error(result: Result, code: int = 1) -> str:
    """Return the message of a failed command after checking its form."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert result.stderr.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.fixture
def harvest_args(model_folder: Path, text_folder: Path) -> list[object]:
    args: list[object] = ["harvest", "--model", model_folder, "--data", text_folder]
    return [*args, "--n-ctx", N_CTX, "--tokens", 60 * N_CTX, "--device", "cpu"]


def _run_alone(work: str, redirection: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command whose work is an expression, as a shell does."""
    code = "import ctypes, os, sys, typer; from lorsa import cli; cli.app = typer.Typer(); "
    code += "from lorsa.commands.common import perform; "
    code += f"cli.app.command()(lambda: perform('x', lambda: {work}, True)); cli.main()"
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {redirection}"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.run(line, shell=True, capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize(
    "noise", ["os.write(1, b'noise')", "print('noise')", "ctypes.CDLL(None).puts(b'noise')"]
)
def test_what_libraries_say_on_stdout_is_no_part_of_the_result(noise: str) -> None:
    """Gloo in torch 2.10 tells there, from C++, how many processes it has found."""
    done = _run_alone(f"{{'a': [{noise}] and 5}}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"lorsa": __version__, "command": "x", "ok": True, "a": 5}
    assert done.stderr.strip() == "noise"


@pytest.mark.parametrize(("stderr", "told"), [("&-", '"a": 5}'), ("/dev/full", '"error": ')])
def test_stdout_has_the_result_alone_whatever_becomes_of_stderr(stderr: str, told: str) -> None:
    done = _run_alone("{'a': [print('noise')] and 5}", f"2>{stderr}")
    assert told in done.stdout
    assert json.loads(done.stdout)["command"] == "x"


def test_a_closed_stdout_is_no_file_s() -> None:
    """The next file to be opened would have taken its number, and with it what is printed."""
    done = _run_alone("{'a': print(os.open('/dev/null', 0), file=sys.stderr)}", ">&-")
    assert done.returncode == 0
    assert int(done.stderr) > 2


def test_the_two_commands_and_what_is_around_them(lorsa: Lorsa, harvest_args: list[object]) -> None:
    """harvest, store info, train, eval: each prints one JSON object on stdout and nothing else."""
    harvested = json.loads(lorsa(*harvest_args, "--layers", "0-1", "--json").stdout)
    assert harvested["layers"] == [0, 1]
    assert harvested["n_tokens"] == 60 * N_CTX
    info = json.loads(lorsa("store", "info", "./acts", "--json").stdout)
    assert info["complete"]
    assert list(info["layers"]) == ["0", "1"]
    train_args = ["train", "--store", "./acts", "--top-k", 6, "--batch-tokens", 4 * N_CTX]
    trained = json.loads(lorsa(*train_args, "--json").stdout)
    assert [run["layer"] for run in trained["runs"]] == [0, 1]
    assert [run["run"] for run in trained["runs"]] == ["runs/layer-0", "runs/layer-1"]
    model = harvest_args[2]
    eval_args = ["eval", "runs/layer-1", "--store", "acts", "--model", model, "--ce-tokens", 64]
    measured = json.loads(lorsa(*eval_args, "--json").stdout)
    assert measured["fvu"] == pytest.approx(trained["runs"][1]["fvu"], rel=1e-5)
    assert set(measured["cross_entropy"]) >= {"original", "replaced", "recovered_from_zero"}


def test_results_are_tables_for_people(lorsa: Lorsa, harvest_args: list[object]) -> None:
    harvested = lorsa(*harvest_args, "--layers", "1")
    assert "lorsa train --store acts" in harvested.stdout
    assert "per token" in harvested.stderr
    assert "self-check" in harvested.stderr
    info = lorsa("store", "info", "acts")
    assert "heads 4 x 8" in info.stdout
    trained = lorsa("train", "--store", "acts", "--top-k", 6, "--batch-tokens", 4 * N_CTX)
    assert "runs/layer-1" in trained.stdout
    assert "data wait" in trained.stderr
    measured = lorsa("eval", "runs/layer-1", "--store", "acts", "--model", harvest_args[2])
    assert "loss recovered" in measured.stdout


def test_a_damaged_store_is_found_repaired_and_finished_by_what_is_shown(
    lorsa: Lorsa, harvest_args: list[object], tmp_path: Path
) -> None:
    """verify, verify --repair, store info and the harvest: each says the next command."""
    assert lorsa(*harvest_args, "--layers", "0-1", "--dtype", "float32").exit_code == 0
    assert lorsa("store", "verify", "acts").exit_code == 0
    before = digests(tmp_path / "acts")
    name = "layers/1/attn_in/c/3/0/0"
    data = bytearray((tmp_path / "acts" / name).read_bytes())
    data[100] ^= 1
    (tmp_path / "acts" / name).write_bytes(data)
    assert lorsa("store", "verify", "acts").exit_code == 0  # sizes are right
    found = lorsa("store", "verify", "acts", "--full")
    assert found.exit_code == 1
    assert f"{name} is damaged (checksum); its shard can be written again" in found.stdout
    result = lorsa("store", "verify", "acts", "--full", "--json")
    assert result.exit_code == 1
    verified = json.loads(result.stdout)
    assert [damage["path"] for damage in verified["damages"]] == [name]
    repaired = lorsa(*shlex.split(verified["next"])[1:], "--json")
    assert repaired.exit_code == 1  # it is unfinished now
    info = json.loads(lorsa("store", "info", "acts", "--json").stdout)
    assert (info["complete"], info["n_missing_shards"]) == (False, 1)
    assert "is unfinished" in _one_line_error(lorsa("train", "--store", "acts"))
    assert info["next"] == json.loads(repaired.stdout)["next"]
    assert f"next: {info['next']}\n" in lorsa("store", "info", "acts").stdout
    again = json.loads(lorsa(*shlex.split(info["next"])[1:], "--json").stdout)
    assert again["tokens_per_second"] > 0
    assert digests(tmp_path / "acts") == before
    assert lorsa("store", "verify", "acts", "--full").exit_code == 0


def test_layers_are_removed_and_the_rest_trains(
    lorsa: Lorsa, harvest_args: list[object], tmp_path: Path
) -> None:
    assert lorsa(*harvest_args, "--layers", "0-2").exit_code == 0
    result = json.loads(lorsa("store", "rm", "acts", "--layers", "0,2", "--json").stdout)
    assert (result["removed"], result["layers"]) == ([0, 2], [1])
    assert "nothing but layer 1" in _one_line_error(lorsa("store", "rm", "acts", "--layers", "1"))
    trained = lorsa("train", "--store", "acts", "--top-k", 6, "--batch-tokens", 4 * N_CTX)
    assert trained.exit_code == 0
    again = json.loads(lorsa(*harvest_args, "--layers", "1", "--json").stdout)
    assert again["tokens_per_second"] == 0
    whole = json.loads(lorsa(*harvest_args, "--layers", "0-2", "--json").stdout)
    assert whole["layers"] == [0, 1, 2]


def test_a_layer_is_added_with_nothing_else_given(
    lorsa: Lorsa, harvest_args: list[object], tmp_path: Path
) -> None:
    """Text, length and dtype are the store's; what is given and differs is refused."""
    assert lorsa(*harvest_args, "--layers", "1", "--dtype", "float32").exit_code == 0
    short = ["harvest", "--model", harvest_args[2], "--device", "cpu"]
    added = lorsa(*short, "--layers", "2")
    assert added.exit_code == 0, added.output
    assert "not given, and so as acts has it: " in added.stderr
    assert f"n_ctx {N_CTX}" in added.stderr
    assert "layers 1-2" in " ".join(added.stdout.split())
    again = json.loads(lorsa(*short, "--json").stdout)  # no layers given either
    assert (again["layers"], again["tokens_per_second"]) == ([1, 2], 0)
    error = _one_line_error(lorsa(*short, "--layers", "0", "--dtype", "bfloat16"))
    assert "holds another harvest (dtype was 'float32', is 'bfloat16')" in error
    trained = lorsa("train", "--store", "acts", "--top-k", 6, "--batch-tokens", 4 * N_CTX)
    assert trained.exit_code == 0, trained.output


def test_a_dry_run_writes_nothing(lorsa: Lorsa, harvest_args: list[object], tmp_path: Path) -> None:
    table = lorsa(*harvest_args, "--layers", "0-1", "--dry-run")
    assert table.exit_code == 0, table.output
    assert "256 bytes of activations" in table.stdout  # x and y of two layers, 32 bfloat16
    assert "about" in table.stdout
    assert "per token" not in table.stderr
    plan = json.loads(lorsa(*harvest_args, "--layers", "0-1", "--dry-run", "--json").stdout)
    assert plan["bytes_per_token"] == 256
    assert plan["n_tokens"] == 60 * N_CTX
    assert plan["estimate"]["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_stores_are_merged_and_trained_on(
    lorsa: Lorsa, harvest_args: list[object], tmp_path: Path
) -> None:
    (tmp_path / "other.txt").write_text("no other words than these stand here " * 200)
    assert lorsa(*harvest_args, "--layers", "1", "--store", "a").exit_code == 0
    args = [*harvest_args, "--layers", "1", "--data", "other.txt", "--store", "b"]
    assert lorsa(*args, "--tokens", 20 * N_CTX).exit_code == 0
    merge = ["store", "merge", "a", "b", "--out", "acts"]
    table = lorsa(*merge)
    assert "80 sequences" in table.stdout, table.output
    merged = json.loads(lorsa(*merge, "--json").stdout)
    assert merged["n_tokens"] == 80 * N_CTX
    assert lorsa("store", "verify", "acts", "--full").exit_code == 0
    trained = lorsa("train", "--store", "acts", "--top-k", 6, "--batch-tokens", 4 * N_CTX)
    assert trained.exit_code == 0, trained.output
    error = _one_line_error(lorsa(*harvest_args, "--layers", "1"))
    assert "acts holds another harvest (data was" in error
    assert "such as" in _one_line_error(lorsa("store", "merge", "a", "a", "--out", "c"))
    assert not (tmp_path / "c").exists()


def test_import_lorsa_loads_no_torch() -> None:
    code = (
        "import lorsa, sys; assert 'torch' not in sys.modules\n"
        "lorsa.Lorsa; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_toml_file_gives_the_rest_and_options_win(
    lorsa: Lorsa, store_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(
        f"top_k = 5\nlr = 0.002\nbatch_tokens = {4 * N_CTX}\ntrain_tokens = {40 * N_CTX}\n"
    )
    args = ["train", "--store", store_folder, "--layer", 1, "--config", "run.toml", "--top-k", 7]
    assert lorsa(*args).exit_code == 0
    config = json.loads((tmp_path / "runs/layer-1/run.json").read_text())["config"]
    assert (config["top_k"], config["lr"]) == (7, 0.002)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top_kk = 5", "unknown setting 'top_kk'; did you mean top_k?"),
        ("top_k = -5", "top_k is -5"),
        ("top_k", "config run.toml:"),
        ("layer = 2", "layer cannot stand here; use --layers"),
        ("top_k = 'many'", "top_k is 'many'; it must be a whole number"),
        ("betas = ['a', 'b']", "betas are ('a', 'b'); allowed: two numbers"),
        ("lr = true", "lr is True; it must be a number"),
    ],
)
def test_a_bad_toml_file_is_one_line(
    lorsa: Lorsa, store_folder: Path, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "run.toml").write_text(text)
    error = _one_line_error(lorsa("train", "--store", store_folder, "--config", "run.toml"), 2)
    assert message in error


# Bad input: what is given, exit code, what the one line says.


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--model", "qwen2-8b"], 1, "did you mean qwen"),
        (["--model", "./nowhere"], 1, "no such folder"),
        (["--model", "Qwen/Qwen2-7B"], 1, "the Hub cannot be reached"),
        (["--n-ctx", "129"], 1, "use --n-ctx 128 or less"),
        (["--layers", "3"], 1, "layer 3 is not in"),
        (["--layers", "0-9"], 1, "it has layers 0-2"),
        (["--layers", "first"], 1, "not of the form 0-27"),
        (["--data", "nowhere.txt"], 1, "no such file or folder"),
        (
            ["--data", "HuggingFaceFW/fineweb"],
            1,
            "the Hub cannot be reached; connect and try again",
        ),
        (["--data-config", "x"], 1, "is no Hub dataset (owner/name): leave out --data-config"),
        (["--tokens-column", "ids"], 1, "no column 'ids'; there is none"),
        (["--tokens-column", "ids", "--text-column", "x"], 2, "allowed: one of them"),
        (["--packing", "mix"], 2, "packing is 'mix'; allowed: pack, no-pack"),
        (["--tokens", "40"], 1, "do not make two sequences of 32"),
        (["--n-ctx", "4096"], 1, "reads at most 128 tokens"),
        (["--n-ctx", "1"], 2, "n_ctx is 1; allowed: 2 or more"),
        (["--dtype", "int3"], 2, "dtype is 'int3'; allowed: bfloat16, float16, float32"),
        (["--bos", "always"], 1, "has no BOS token"),
        (["--tokens", "10000000000000"], 1, "what fits: --tokens"),
    ],
)
def test_harvest_refuses_in_one_line(
    lorsa: Lorsa,
    harvest_args: list[object],
    tmp_path: Path,
    args: list[str],
    code: int,
    message: str,
) -> None:
    error = _one_line_error(lorsa(*harvest_args, *args), code)
    assert message in error
    assert not (tmp_path / "acts").exists()


def test_harvest_refuses_a_folder_without_text(
    lorsa: Lorsa, harvest_args: list[object], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no .txt" in _one_line_error(lorsa(*harvest_args, "--data", "empty"))
    (tmp_path / "empty" / "a.txt").write_text("  \n")
    assert "holds no text" in _one_line_error(lorsa(*harvest_args, "--data", "empty"))
    assert not (tmp_path / "acts").exists()


@pytest.fixture
def broken_args(harvest_args: list[object], tmp_path: Path) -> list[object]:
    """A harvest of a model whose activations are NaN from the first token on."""
    from tiny import make_model, make_tokenizer

    model = make_model("llama-gqa")
    model.model.embed_tokens.weight.data[100:] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    make_tokenizer().save_pretrained(tmp_path / "broken")
    return [*harvest_args, "--model", "broken", "--layers", "1"]


def test_harvest_refuses_activations_that_are_not_finite(
    lorsa: Lorsa, broken_args: list[object], tmp_path: Path
) -> None:
    args = broken_args
    error = _one_line_error(lorsa(*args))
    assert "nan" in error or "not finite" in error
    error = _one_line_error(lorsa(*args, "--no-selfcheck"))
    assert "layer 1: its activations are not finite" in error
    assert "--keep-nonfinite" in error
    error = _one_line_error(lorsa(*args, "--keep-nonfinite", "--outputs", "derive"))
    assert "--outputs store" in error
    assert not (tmp_path / "acts").exists()


def test_activations_that_are_not_finite_are_kept_and_said_so(
    lorsa: Lorsa, broken_args: list[object]
) -> None:
    """--keep-nonfinite was refused by the self-check, info showed no counts, harvest ended with a
    training that cannot be, and training advised the precision that the model had."""
    harvested = lorsa(*broken_args, "--keep-nonfinite")
    assert harvested.exit_code == 0, harvested.output
    assert "layers 1 have NaN or Inf and were not checked" in harvested.stderr
    assert "layers 1, which cannot be trained on" in harvested.stdout
    assert "lorsa train" not in harvested.stdout
    info = json.loads(lorsa("store", "info", "acts", "--json").stdout)["layers"]["1"]
    reason = "its activations are not finite"
    expected = {"passed": False, "error": None, "noise": None, "reason": reason}
    assert info["self_check"] == expected
    table = lorsa("store", "info", "acts").stdout
    assert f"{info['n_nonfinite']:,} tokens with NaN or Inf" in table
    error = _one_line_error(lorsa("train", "--store", "acts"))
    assert "computed in float32: check its weights" in error
    assert "--model-dtype" not in error


def test_the_layers_that_can_be_trained_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The next command of a harvest was one that fails where some layer has NaN."""
    facts = {"model": "m", "layers": [0, 1, 2], "nonfinite_layers": [1], "store": "my acts"}
    facts["sites"] = [f"{n}.{name}" for n in range(3) for name in ("attn_in", "attn_out")]
    sizes = {"n_tokens": 8, "n_seq": 2, "n_bytes": 9, "seconds": 1.0, "tokens_per_second": 0.0}
    found = facts | sizes
    display.show("harvest", found | {"next": next_of_harvest(found)})
    assert "next: lorsa train --store 'my acts' --layers 0,2\n" in capsys.readouterr().out
    assert next_of_harvest(found | {"nonfinite_layers": [0, 1, 2]}) is None


def test_info_shows_the_scales_of_int8(lorsa: Lorsa, harvest_args: list[object]) -> None:
    """The docs said so, and only --json did."""
    assert lorsa(*harvest_args, "--layers", "1", "--dtype", "int8").exit_code == 0
    table = lorsa("store", "info", "acts").stdout
    for name in ("attn_in", "attn_out"):
        assert re.search(rf"{name} scales \S+, largest \S+", table)


def test_harvest_refuses_what_is_in_the_way(
    lorsa: Lorsa, harvest_args: list[object], tmp_path: Path
) -> None:
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts" / "thesis.tex").touch()
    assert "other things in it" in _one_line_error(lorsa(*harvest_args))
    assert [p.name for p in (tmp_path / "acts").iterdir()] == ["thesis.tex"]


def test_harvest_of_something_else_into_a_finished_store_names_the_difference(
    lorsa: Lorsa, harvest_args: list[object], tmp_path: Path
) -> None:
    assert lorsa(*harvest_args, "--layers", "1").exit_code == 0
    again = json.loads(lorsa(*harvest_args, "--layers", "1", "--json").stdout)
    assert again["tokens_per_second"] == 0
    error = _one_line_error(lorsa(*harvest_args, "--layers", "1", "--seed", "3"))
    assert "holds another harvest (seed was 0, is 3)" in error
    shutil.copytree(str(harvest_args[2]), tmp_path / "other")
    error = _one_line_error(lorsa(*harvest_args, "--layers", "1", "--model", "other"))
    assert "acts holds another harvest (model was " in error


SAE = ["--kind", "sae", "--site", "attn_out"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--top-k", "300"], 1, "top_k is 300; allowed: 1..256 (n_ov_heads)"),
        (["--n-ov-heads", "50"], 1, "not a multiple of n_qk_heads 16; use 48 or 64"),
        (["--layers", "0"], 1, "layer 0 is not in"),
        (["--layers", "one"], 1, "not of the form"),
        (["--lr", "0"], 2, "lr is 0.0; allowed: above 0"),
        (["--init", "zero"], 2, "init is 'zero'; allowed: layer, layer-weighted, random"),
        (["--device", "cuda"], 1, "torch sees no GPU"),
        (["--kind", "sea"], 2, "kind is 'sea'; allowed: lorsa, sae, transcoder or all"),
        (["--kind", "transcoder"], 1, "lorsa harvest --model"),
        (["--kind", "sae", "--site", "resid_oot"], 2, "'resid_oot' is no site; near: resid_out"),
        (["--skip"], 2, "skip is a setting of kind transcoder, and only kind lorsa is trained"),
        ([*SAE, "--n-qk-heads", "4"], 2, "n_qk_heads is a setting of kind lorsa"),
        ([*SAE, "--prefixes", "0.5,0.2,1"], 2, "ascend and end at 1"),
    ],
)
def test_train_refuses_in_one_line(
    lorsa: Lorsa, store_folder: Path, tmp_path: Path, args: list[str], code: int, message: str
) -> None:
    if "cuda" in args:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    error = _one_line_error(lorsa("train", "--store", store_folder, *args), code)
    assert message in error
    assert not (tmp_path / "runs").exists()


def test_a_setting_of_another_kind_in_a_file_is_refused(
    lorsa: Lorsa, store_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text('kind = "sae"\nsite = "attn_out"\nskip = true\n')
    error = _one_line_error(lorsa("train", "--store", store_folder, "--config", "run.toml"), 2)
    assert "skip is a setting of kind transcoder" in error
    assert "options and run.toml" in error


def test_dictionaries_of_every_kind_are_trained_and_swept(lorsa: Lorsa, sited: Path) -> None:
    args = ["--store", sited, "--top-k", "4", "--batch-tokens", 4 * N_CTX, "--device", "cpu"]
    args += ["--train-tokens", 8 * N_CTX, "--json"]
    trained = lorsa("train", "--kind", "all", "--skip", *args)
    assert " 1.mlp: 256 features, top_k 4; " in trained.stderr
    assert "1.mlp: 1.mlp" not in trained.stderr
    assert "best FVU" not in trained.stderr  # of runs of several sites
    found = json.loads(trained.stdout)
    assert [(run["run"], run["kind"], run["site"]) for run in found["runs"]] == [
        ("runs/layer-1", "lorsa", None),
        ("runs/1.resid_out", "sae", "resid_out"),
        ("runs/1.mlp", "transcoder", None),
        ("runs/layer-2", "lorsa", None),
        ("runs/2.mlp", "transcoder", None),
    ]
    swept = ["sweep", "--kind", "transcoder", "--skip", "true,false", *args]
    found = json.loads(lorsa(*swept, "--prefixes", "0.25,1").stdout)
    assert [(row["layer"], row["skip"], row["n_features"]) for row in found["rows"]] == [
        (1, True, 256), (1, False, 256), (2, True, 256), (2, False, 256)
    ]  # fmt: skip
    assert (found["n_groups"], found["ok"]) == (2, True)
    config = json.loads(Path("sweep/layer=1,skip=True/config.json").read_text())["config"]
    assert (config["skip"], config["prefixes"]) == (True, [0.25, 1.0])
    found = json.loads(lorsa("sweep", "--kind", "all", "--out", "every", *args).stdout)
    places = [("lorsa", 1), ("sae", 1), ("transcoder", 1), ("lorsa", 2), ("transcoder", 2)]
    assert sorted((row["kind"], row["layer"]) for row in found["rows"]) == sorted(places)
    assert found["next"].count("every/") == len(places)  # each is the best of its place


SWEEP = ["--layer", 1, "--tokens", 8 * N_CTX, "--batch-tokens", 4 * N_CTX, "--device", "cpu"]
SWEEP += ["--set", f"init_tokens={16 * N_CTX}"]


def test_a_sweep_is_a_table_and_files(lorsa: Lorsa, store_folder: Path, tmp_path: Path) -> None:
    args = ["sweep", "--store", store_folder, *SWEEP, "--top-k", "4,8", "--lr", "1e-3,2e-3"]
    shown = lorsa(*args)
    assert shown.exit_code == 0
    assert "top_k=8,lr=0.002: finished" in shown.stderr
    assert "0.002" in shown.stdout
    names = {path.name for path in (tmp_path / "sweep").iterdir()}
    assert names >= {"sweep.json", "sweep.csv", "pareto.png", "top_k=4,lr=0.001"}
    again = json.loads(lorsa(*args, "--json").stdout)
    assert [row["top_k"] for row in again["rows"]] == [4, 4, 8, 8]
    assert again["bytes_read"] == 0  # all were finished before


def test_a_sweep_tells_which_runs_failed(lorsa: Lorsa, store_folder: Path, tmp_path: Path) -> None:
    """The others are trained; the exit code says that not all were."""
    args = ["sweep", "--store", store_folder, *SWEEP, "--top-k", "4,100000,0", "--json"]
    done = lorsa(*args)
    assert done.exit_code == 1
    rows = json.loads(done.stdout)["rows"]
    assert rows[0]["error"] is None
    assert "top_k is 100000; allowed: 1..256 (n_ov_heads)" in rows[1]["error"]
    assert "top_k is 0; allowed: 1 or more" in rows[2]["error"]
    assert not (tmp_path / "sweep" / "top_k=100000").exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--top-k", "few"], 2, "--top-k: top_k is 'few'; it must be a whole number"),
        (["--set", "top_kk=3"], 2, "--set: unknown setting 'top_kk'; did you mean top_k?"),
        (["--set", "top_k"], 2, "--set top_k: write NAME=VALUE"),
        (["--lr", ""], 2, "--lr: lr has no value"),
        (["--config", "none.toml"], 2, "none.toml: No such file"),
        (["--top-k", "0"], 2, "no run of the sweep can begin; the first: top_k is 0"),
        (["--layers", "9"], 1, "layers 1-2"),
    ],
)
def test_sweep_refuses_in_one_line(
    lorsa: Lorsa, store_folder: Path, tmp_path: Path, args: list[str], code: int, message: str
) -> None:
    error = _one_line_error(lorsa("sweep", "--store", store_folder, *args), code)
    assert message in error
    assert not (tmp_path / "sweep").exists()


def test_layers_that_fail_do_not_stop_the_others(
    lorsa: Lorsa, store_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorsa.errors import TrainError
    from lorsa.train.run import Run

    begin = Run.begin

    def fail_of_layer_1(run: Run) -> None:
        if run.config.layer == 1:
            raise TrainError("no luck")
        begin(run)

    monkeypatch.setattr(Run, "begin", fail_of_layer_1)
    args = ["--tokens", 8 * N_CTX, "--batch-tokens", 4 * N_CTX, "--device", "cpu", "--top-k", 4]
    done = lorsa("train", "--store", store_folder, *args, "--json")
    assert done.exit_code == 1
    result = json.loads(done.stdout)
    assert [run["layer"] for run in result["runs"]] == [2]
    assert result["failed"] == [{"run": "runs/layer-1", "layer": 1, "error": "no luck"}]


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--store"],
        ["sweep", "--store"],
        ["store", "info"],
        ["store", "verify"],
        ["store", "verify", "--repair"],
        ["store", "rm", "--layers", "1"],
        ["store", "merge", "--out", "out", "acts"],
        ["eval", "r", "--store"],
    ],
)
def test_a_folder_that_is_no_store_is_one_line(
    lorsa: Lorsa, command: list[str], tmp_path: Path, store_folder: Path, trained: Path
) -> None:
    command = [str(trained) if part == "r" else part for part in command]
    (tmp_path / "folder").mkdir()
    (tmp_path / "acts").symlink_to(store_folder)
    assert "does not exist" in _one_line_error(lorsa(*command, "nowhere"))
    assert "is no activation store" in _one_line_error(lorsa(*command, "folder"))


@pytest.fixture(scope="session")
def trained(store_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on layer 1."""
    from lorsa.train.train import train

    out = tmp_path_factory.mktemp("runs") / "layer-1"
    settings: dict[str, Any] = {"top_k": 6, "batch_tokens": 4 * N_CTX, "train_tokens": 40 * N_CTX}
    train(TrainConfig(store=store_folder, layer=1, out=out, device="cpu", **settings))
    return out


def test_layers_that_cannot_train_are_named_before_the_first_begins(
    lorsa: Lorsa, store_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs/layer-2").mkdir(parents=True)
    (tmp_path / "runs/layer-2/notes.txt").touch()
    error = _one_line_error(lorsa("train", "--store", store_folder, "--top-k", 4))
    assert "layer-2 holds other things" in error
    assert not (tmp_path / "runs/layer-1").exists()


def test_eval_refuses_in_one_line(
    lorsa: Lorsa, store_folder: Path, trained: Path, tmp_path: Path
) -> None:
    from tiny import make_model

    assert "holds no dictionary" in _one_line_error(
        lorsa("eval", tmp_path, "--store", store_folder)
    )
    make_model("llama-gqa", seed=5).save_pretrained(tmp_path / "other")
    args = ["eval", trained, "--store", store_folder, "--ce-tokens", 64]
    error = _one_line_error(lorsa(*args, "--model", "other"))
    assert "was made with another model: layer 1 has another W_" in error
    assert "no known alias" in _one_line_error(lorsa(*args, "--model", "gpt9"))
    assert "ce_tokens is 0" in _one_line_error(lorsa(*args, "--ce-tokens", 0), 2)


def test_an_error_in_json_is_one_object_too(lorsa: Lorsa) -> None:
    result = lorsa("store", "info", "nowhere", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert (told["lorsa"], told["command"]) == (__version__, "store info")
    assert "does not exist" in told["error"]


def test_debug_shows_the_trace(lorsa: Lorsa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORSA_DEBUG", "1")
    result = lorsa("store", "info", "nowhere")
    assert type(result.exception).__name__ == "StoreError"


@pytest.fixture
def bug(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let `lorsa store info` fail as nobody foresaw, with text of a stranger's."""
    from lorsa.store.care import info

    def broken(_root: Path) -> None:
        raise KeyError("no\x1b[2J\nkey")

    monkeypatch.setattr(info, "store_info", broken)
    (tmp_path / "traces").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "traces"))


@pytest.mark.usefixtures("bug")
def test_a_bug_is_one_line_that_names_its_trace(lorsa: Lorsa, tmp_path: Path) -> None:
    """A bug printed its whole trace, and in JSON nothing."""
    result = lorsa("store", "info", "x", "--json")
    line = _one_line_error(result, 70)
    (trace,) = (tmp_path / "traces").iterdir()
    assert str(trace) in line
    assert "LORSA_DEBUG=1" in line
    assert line.isprintable()
    assert "KeyError" in trace.read_text()
    assert "in broken" in trace.read_text()
    told = json.loads(result.stdout)
    assert told["command"] == "store info"
    assert str(trace) in told["error"]


@pytest.mark.usefixtures("bug")
def test_a_bug_whose_trace_cannot_be_kept_says_so(
    lorsa: Lorsa, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    line = _one_line_error(lorsa("store", "info", "x"), 70)
    assert "its trace cannot be kept (No such file" in line


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (MemoryError(), 1, "this machine's memory is full"),
        (PermissionError(13, "Permission denied", "a\nb"), 1, "a↵b: Permission denied"),
        (RuntimeError("x" * 999), 70, "a bug of lorsa (RuntimeError: x"),
        (KeyboardInterrupt(), 130, "stopped"),
        (typer.Abort(), 130, "stopped"),
    ],
)
def test_every_end_of_a_command_is_one_line(
    error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as end, told_in_a_line("store info", as_json=True):
        raise error
    assert end.value.exit_code == code
    out, err = capsys.readouterr()
    assert told in err
    assert len(err.splitlines()) == 1
    assert set(json.loads(out)) == {"lorsa", "command", "ok", "error"}


@pytest.mark.parametrize("end", ["| true", "> /dev/full"])
@pytest.mark.parametrize("form", ["", "--json"])
def test_output_that_nobody_takes_is_no_trace(end: str, form: str, store_folder: Path) -> None:
    """A full disk or a pager that was closed gave a trace, or a line of Python's own."""
    line = f"{shlex.quote(sys.executable)} -m lorsa store info {store_folder} {form} {end}"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert len(done.stderr.splitlines()) == ("full" in end)


def test_an_encoding_without_our_characters_is_no_trace(store_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorsa", "store", "info", str(store_folder)],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    assert done.stdout.isascii()


def test_sigterm_ends_a_command_as_ctrl_c_does() -> None:
    """A process that was asked to end while its model loaded printed nothing, also not in JSON."""
    done = _run_alone("{'a': os.kill(os.getpid(), 15)}")
    assert done.returncode == 130
    assert json.loads(done.stdout)["error"] == "stopped"


@pytest.mark.parametrize(
    "args",
    [
        ["harvest", "--model", "m", "--sites", "mlp_inn"],
        ["train", "--kind", "sae", "--site", "mlp_inn"],
        ["sweep", "--kind", "sae", "--site", "mlp_inn", "--top-k", "4,8"],
        ["store", "rm", "--sites", "3.mlp_inn"],
    ],
)
def test_a_wrong_site_is_exit_code_2_in_every_command(
    lorsa: Lorsa, store_folder: Path, args: list[str]
) -> None:
    store = [store_folder] if args[0] == "store" else ["--store", store_folder]
    assert "'mlp_inn' is no site; near: mlp_in" in _one_line_error(lorsa(*args, *store), 2)


@pytest.mark.parametrize("args", [[], ["harvest"], ["train", "--nonsense"], ["nonsense"]])
def test_wrong_usage_is_exit_code_2(lorsa: Lorsa, args: list[str]) -> None:
    assert lorsa(*args).exit_code == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["harvest", "--model", "m", "--xyz", "--json"], "No such option: --xyz"),
        (["harvest", "--model", "m", "--tokens", "abc", "--json"], "--tokens"),
        (["harvest", "--json"], "--model"),
        (["nonsense", "--json"], "nonsense"),
    ],
)
def test_wrong_usage_is_one_line_and_one_object(args: list[str], message: str) -> None:
    """The option parser drew a box, and printed nothing on stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "lorsa", *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    told = json.loads(done.stdout)
    assert message in told["error"]
    assert told["command"] == (args[0] if args[0] == "harvest" else "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("--help")


@pytest.mark.parametrize("layers", ["1"])
def test_a_killed_harvest_goes_on(
    harvest_args: list[object], layers: str, tmp_path: Path, lorsa: Lorsa
) -> None:
    """SIGKILL once the first shards are committed, then the same command again."""
    args = [str(a) for a in [*harvest_args, "--layers", layers]]
    command = [sys.executable, "-m", "lorsa", *args]
    child = subprocess.Popen(command, cwd=tmp_path, env=os.environ, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    shard = tmp_path / "acts/layers/1/attn_in_norm/c/1/0"
    while not shard.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    child.kill()
    child.wait()
    assert shard.exists()
    killed_early = not (tmp_path / "acts/manifest.json").exists()
    assert child.returncode in (-signal.SIGKILL, 0)
    done = json.loads(lorsa(*args, "--json").stdout)
    assert done["n_tokens"] == 60 * N_CTX
    whole = json.loads(lorsa(*args, "--store", "whole", "--json").stdout)
    assert whole["n_bytes"] == done["n_bytes"]
    assert killed_early or done["tokens_per_second"] == 0
    assert digests(tmp_path / "acts") == digests(tmp_path / "whole")


def test_a_rank_without_a_launcher_does_not_silence_a_command(store_folder: Path) -> None:
    """RANK of a pod or a script, alone in the environment, kept every command from printing."""
    told = subprocess.run(
        [sys.executable, "-m", "lorsa", "store", "info", str(store_folder), "--json"],
        env={k: v for k, v in os.environ.items() if k != "WORLD_SIZE"} | {"RANK": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(told.stdout)
