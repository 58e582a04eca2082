"""Panels of help: groups of commands, and of the options of commands that have many."""

from collections.abc import Mapping

COMMANDS = {
    "Make": ("demo", "harvest", "train", "sweep", "eval"),
    "Read": ("analyze", "view", "find", "explain", "ablate", "trace"),
    "Share": ("push", "convert", "verify"),
    "Store": ("store",),
}
"""Commands, in the order in which they are shown."""
PAGES = {
    "demo": "tutorial",
    "harvest": "harvest",
    "train": "recipe",
    "sweep": "sweeps",
    "eval": "fidelity",
    "analyze": "analysis",
    "view": "page",
    "find": "analysis",
    "explain": "explain",
    "ablate": "fidelity",
    "trace": "circuits",
    "push": "publish",
    "convert": "exchange",
    "verify": "verify",
    "store": "store",
}
"""Page of docs/ that says more of a command."""

_TRAIN = {
    "What": ("store", "kind", "site", "layer", "out"),
    "Dictionary": (
        "expansion",
        "n_features",
        "n_ov_heads",
        "n_qk_heads",
        "skip",
        "prefixes",
        "top_k",
        "select",
        "activation",
        "init",
    ),
    "Training": ("train_tokens", "minutes", "batch_tokens", "lr", "loss_mask", "seed"),
    "Speed and memory": ("precision", "device", "micro_batch_tokens"),
    "Processes": ("apart", "shard", "exact"),
    "Command": ("others", "config", "tracker", "as_json", "help"),
}
OPTIONS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "harvest": {
        "What": ("model", "layers", "sites", "store"),
        "Text": (
            "data", "text_column", "tokens_column", "data_config", "data_split", "bos", "packing",
            "seed",
        ),
        "Size": ("tokens", "budget", "n_ctx", "dtype", "outputs", "compression", "force"),
        "Speed and memory": ("batch_size", "model_dtype", "device", "buffer_gb"),
        "Checks": ("selfcheck", "keep_nonfinite"),
        "Command": ("dry_run", "config", "as_json", "help"),
    },
    "train": _TRAIN,
    "sweep": _TRAIN,
    "ablate": {
        "What": ("features", "model", "prompt", "tokens"),
        "Change": ("scale", "value", "error"),
        "Command": ("top", "device", "as_json", "help"),
    },
    "trace": {
        "What": ("model", "prompt", "tokens", "tokens_file", "target", "less"),
        "Graph": ("max_logits", "logit_prob", "keep", "explore", "qk"),
        "What is written": ("node_threshold", "edge_threshold", "out", "name"),
        "Command": ("device", "as_json", "help"),
    },
    "explain": {
        "What": ("model", "endpoint", "heads", "sort", "top", "seed"),
        "Cost": ("max_tokens", "price_in", "price_out", "dry_run", "yes"),
        "Speed": ("concurrency", "requests_per_minute", "timeout"),
        "Command": ("as_json", "help"),
    },
}  # fmt: skip
"""Parameters of commands with many options, by panel."""


def panel_of_command(name: str) -> str | None:
    """Return the panel of a command; None takes the usual one."""
    return next((panel for panel, names in COMMANDS.items() if name in names), None)


def panel_of_option(command: str, name: str) -> str | None:
    """Return the panel of a parameter of a command; None takes the usual one."""
    panels = OPTIONS.get(command, {})
    return next((panel for panel, names in panels.items() if name in names), None)


def footer(command: str) -> str | None:
    """Return the last line of a command's help: which page says more."""
    page = PAGES.get(command)
    return None if page is None else f"More: docs/{page}.md"
