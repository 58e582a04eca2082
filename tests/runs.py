"""Many runs in one launch of several processes: they take long to start.

torchrun --nproc-per-node 2 drill.py STORE OUT '{"name": {"field": value}}'
"""

import json
import sys
from pathlib import Path
from typing import Any

from lorsa.train import TrainConfig, group, train
from tiny import N_CTX

STEP = 4 * N_CTX


def settings(store: Path, **changes: Any) -> dict[str, Any]:
    """Return the settings of a small run, but for its folder."""
    return {
        "store": store,
        "layer": 1,
        "top_k": 8,
        "batch_tokens": STEP,
        "train_tokens": 20 * STEP,
        "eval_tokens": 6 * N_CTX,
        "init_tokens": 16 * N_CTX,
        "device": "cpu",
    } | changes


def config(store: Path, out: Path, changes: dict[str, Any]) -> TrainConfig:
    """Return a small run."""
    return TrainConfig(**settings(store, **changes), out=out)


def main() -> None:
    store, out, variants = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    group.LOG_EVERY_STEPS = 1  # every loss is compared; of this process alone
    for name, changes in variants.items():
        train(config(store, out / name, changes))


if __name__ == "__main__":
    main()
