"""The first steps of somebody who has installed lorsa, in an environment with nothing else.

Run by that environment's python in an empty folder. No network: the model is a tiny one, random.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import lorsa
from tiny import N_CTX, TEXT, make_model, make_tokenizer


def lorsa_says(*words: object) -> str:
    """Run the installed command and return what it prints."""
    command = [str(Path(sys.executable).with_name("lorsa")), *(str(word) for word in words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, f"{done.returncode}: {words}"
    return done.stdout


def main() -> None:
    installed = Path(lorsa.__file__)
    assert Path(sys.prefix) in installed.parents, f"{installed} is not the wheel's"
    assert lorsa_says("--version") == f"lorsa {lorsa.__version__}\n"
    assert "harvest" in lorsa_says("--help")
    make_model("llama-gqa").save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    for i in range(12):
        Path(f"{i}.txt").write_text(TEXT[i:] + TEXT[:i], "utf-8")
    sizes = ("--n-ctx", N_CTX, "--tokens", 130 * N_CTX)
    told = {
        name: json.loads(lorsa_says(*words, "--json"))
        for name, words in {
            "harvest": ("harvest", "--model", "model", "--layers", 1, "--data", ".", *sizes),
            "info": ("store", "info", "acts"),
            "train": ("train", "--store", "acts", "--top-k", 6, "--batch-tokens", 4 * N_CTX),
            "eval": ("eval", "runs/layer-1", "--store", "acts", "--model", "model"),
            "analyze": ("analyze", "runs/layer-1", "--store", "acts", "--model", "model"),
            "find": ("find", "previous-token", "runs/layer-1"),
            "view": ("view", "runs/layer-1"),
        }.items()
    }
    assert told["info"]["complete"]
    assert told["eval"]["fvu"] < 1
    assert told["eval"]["cross_entropy"]
    assert Path(told["view"]["file"]).is_file()
    saved = lorsa.Lorsa.from_pretrained("runs/layer-1")
    assert saved.config.top_k == 6


if __name__ == "__main__":
    main()
