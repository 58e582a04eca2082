"""The model card of a repository of dictionaries: README.md, with front matter for the Hub."""

from typing import Any

from huggingface_hub import ModelCardData

from ..hub import HUB_ID
from .facts import folder_of, kind_of
from .markdown import block, code, one_line, python_text, shown

TAGS = {
    "lorsa": ("low-rank-sparse-attention", "sparse-attention"),
    "sae": ("sparse-autoencoder",),
    "transcoder": ("transcoder",),
}
"""Tags on the Hub, by kind."""
PAPER = "https://arxiv.org/abs/2504.20938"
PAPERS = {
    "sae": "SAEs whose top_k features fire: Gao et al. 2024 "
    "([arXiv:2406.04093](https://arxiv.org/abs/2406.04093)).",
    "transcoder": "Transcoders: Dunefsky et al. 2024 "
    "([arXiv:2406.11944](https://arxiv.org/abs/2406.11944)).",
}
"""Source of each other kind."""
NAMES = {"lorsa": "Lorsa", "sae": "SAE", "transcoder": "transcoder"}
MEANT = {
    "lorsa": "Lorsas stand in for attention layers",
    "sae": "SAEs take the activations of one site apart",
    "transcoder": "transcoders stand in for MLPs",
}
"""What each kind is for."""
NONE = "-"
LOSS = (
    "how much of the next-token loss that the {}'s removal costs (its output replaced by zero) the "
    "{} gives back when it stands in for the {}: 100 % is as good as the {}"
)
CORPUS = {"tokens": "how many it was trained on", "text": "the corpus that they are of"}
COLUMNS = {
    "layer": "of the language model, counted from 0; its Lorsa is in the folder of that name",
    "OV heads": "rank-1 heads: each reads one direction and writes one",
    "QK heads": "attention patterns, each shared by as many OV heads as the others",
    "L0": "heads that fire on a token, on average",
    "FVU": "share of the variance of the layer's output that the Lorsa does not explain, on tokens "
    "that were held out from training",
    "dead heads": "share of OV heads that did not fire on the last tokens of training, or, where "
    "training says nothing, on the held-out tokens",
    "loss recovered": LOSS.format("layer", "Lorsa", "layer", "layer"),
    **CORPUS,
}
"""Columns of a card of Lorsas alone."""
MIXED = {
    "folder": "where it is, which says the layer, counted from 0, and the site",
    "kind": "Lorsa (of an attention layer), SAE (of one site) or transcoder (of an MLP)",
    "features": "each reads one direction and writes one; of a Lorsa they are its OV heads",
    "L0": "features that fire on a token, on average",
    "FVU": "share of the variance of what it approximates that it does not explain, on tokens that "
    "were held out from training and that its loss mask lets count (of an SAE, by default, "
    "those that are not of outlier norm)",
    "dead": "share of features that did not fire on the last tokens of training, or, where "
    "training says nothing, on the held-out tokens",
    "loss recovered": LOSS.format("site", "dictionary", "site", "site"),
    **CORPUS,
}
"""Columns of a card with other kinds."""
CITATION = """\
@article{he2025lorsa,
  title   = {Towards Understanding the Nature of Attention with Low-Rank Sparse Decomposition},
  author  = {Zhengfu He and Junxuan Wang and Rui Lin and Xuyang Ge and Wentao Shu and Qiong Tang
             and Junping Zhang and Xipeng Qiu},
  journal = {arXiv preprint arXiv:2504.20938},
  year    = {2025}
}"""


def card(
    repo: str, shared: list[dict[str, Any]], *, revision: str | None, license_id: str | None
) -> str:
    """Return the model card.

    Args:
        repo: argument of `lorsa.load`: owner/name, or a folder's name.
        shared: training.json of every dictionary there, by layer.
        revision: branch of the repository; None is the main one.
        license_id: the Hub's identifier, if a license is known.
    """
    kinds = _kinds(shared)
    columns = COLUMNS if kinds == ["lorsa"] else MIXED
    parts = [
        _front_matter(shared, license_id),
        f"# {shown(repo.rpartition('/')[2])}",
        _introduction(shared),
        _table(shared, columns),
        "## Loading one",
        _loading(repo, shared, revision),
        "## What the columns mean",
        "\n".join(f"- **{name}**: {meaning}" for name, meaning in columns.items())
        + f"\n\nWhat was not measured is a dash ({NONE}).",
        *_training(shared),
        "## Citation",
        *_citations(kinds),
    ]
    return "\n\n".join(parts) + "\n"


def _kinds(shared: list[dict[str, Any]]) -> list[str]:
    """Return the kinds that are there, in the order of NAMES."""
    there = {kind_of(facts) for facts in shared}
    return [kind for kind in NAMES if kind in there]


def _citations(kinds: list[str]) -> list[str]:
    parts = []
    if "lorsa" in kinds:
        due = f"Low-Rank Sparse Attention is due to He et al. 2025 ([arXiv:2504.20938]({PAPER})):"
        parts += [due, block("bibtex", CITATION)]
    return parts + [PAPERS[kind] for kind in kinds if kind in PAPERS]


def _front_matter(shared: list[dict[str, Any]], license_id: str | None) -> str:
    model = _model(shared)
    names = {facts["corpus"]["data"] for facts in shared if _is_hub_data(facts["corpus"])}
    datasets = sorted({part for name in names for part in name.split(" + ")})
    data = ModelCardData(
        library_name="lorsa",
        base_model=model if model is not None and HUB_ID.fullmatch(model) else None,
        datasets=[name for name in datasets if HUB_ID.fullmatch(name)] or None,
        license=None if license_id is None else one_line(license_id),
        tags=["lorsa", *(tag for kind in _kinds(shared) for tag in TAGS[kind]), "interpretability"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _is_hub_data(corpus: dict[str, Any] | None) -> bool:
    return corpus is not None and corpus.get("data_revision") is not None


def _model(shared: list[dict[str, Any]]) -> str | None:
    model: str | None = shared[0]["model"]["id"]
    return model


def _introduction(shared: list[dict[str, Any]]) -> str:
    model = _model(shared)
    of = "a language model" if model is None else code(model)
    if model is not None and HUB_ID.fullmatch(model):
        of = f"[{model}](https://huggingface.co/{model})"
    revisions = sorted({r for facts in shared if (r := facts["model"]["revision"]) is not None})
    at = f" (commit {', '.join(code(r[:12]) for r in revisions)})" if revisions else ""
    kinds = _kinds(shared)
    if kinds == ["lorsa"]:
        return (
            f"Attention layers of {of}{at}, taken apart by "
            f"[Low-Rank Sparse Attention]({PAPER}) (*Lorsa*). A Lorsa stands in for one layer: it "
            "has thousands of rank-1 heads, of which a few fire on a token, so that each can be "
            f"read. Made with {_versions(shared)}."
        )
    meant = [MEANT[kind] for kind in kinds]
    listed = " and ".join([", ".join(meant[:-1]), meant[-1]] if len(meant) > 1 else meant)
    return (
        f"Parts of {of}{at} as thousands of features, of which a few fire on a token, so that each "
        f"can be read: {listed}. Made with {_versions(shared)}."
    )


def _versions(shared: list[dict[str, Any]]) -> str:
    known = sorted({facts["versions"]["lorsa"] for facts in shared if facts["versions"]})
    return f"`lorsa` {', '.join(map(shown, known))}" if known else "`lorsa`"


def _table(shared: list[dict[str, Any]], columns: dict[str, str]) -> str:
    head = [f"| {' | '.join(columns)} |", "|" + "---:|" * (len(columns) - 1) + "---|"]
    of_lorsas = columns is COLUMNS
    return "\n".join(head + [f"| {' | '.join(_row(facts, of_lorsas))} |" for facts in shared])


def _row(facts: dict[str, Any], of_lorsas: bool) -> list[str]:
    trained, evaluated = facts["trained"] or {}, facts["evaluated"] or {}
    measured = {**evaluated, **{k: v for k, v in trained.items() if v is not None}}
    losses, corpus = evaluated.get("cross_entropy") or {}, facts["corpus"] or {}
    data = " ".join(str(corpus[n]) for n in ("data", "data_config") if corpus.get(n) is not None)
    kind, shape = kind_of(facts), facts["shape"]
    features = f"{shape['n_ov_heads' if kind == 'lorsa' else 'n_features']:,}"
    if of_lorsas:
        what = [str(facts["layer"]), features, f"{shape['n_qk_heads']:,}"]
    else:
        what = [code(folder_of(facts)), NAMES[kind], features]
    return [
        *what,
        _spelled(measured.get("l0"), "{:.1f}"),
        _spelled(measured.get("fvu"), "{:.4f}"),
        _spelled(measured.get("dead_fraction"), "{:.1%}"),
        _spelled(losses.get("recovered_from_zero"), "{:.1%}"),
        _spelled(measured.get("train_tokens"), "{:,}"),
        shown(data) or NONE,
    ]


def _spelled(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)


def _loading(repo: str, shared: list[dict[str, Any]], revision: str | None) -> str:
    first = shared[0]
    kind, is_lorsa = kind_of(first), kind_of(first) == "lorsa"
    words = [python_text(repo), f"subfolder={python_text(folder_of(first))}"]
    words += [] if revision is None else [f"revision={python_text(revision)}"]
    load = "Lorsa.from_pretrained" if is_lorsa else "load"
    things = "heads" if is_lorsa else "features"
    lines = (
        f"from lorsa import {'Lorsa' if is_lorsa else 'load'}\n\n"
        f"{kind} = {load}({', '.join(words)})\n"
        f"acts, ids = {kind}.encode(x)  # which {things} fire, and how much\n"
        f"y_hat = {kind}.decode(acts, ids{'' if is_lorsa else ', x'})  # in place of y"
    )
    others = "" if set(_kinds(shared)) <= {"lorsa"} else " `lorsa.load` reads any of them."
    return (
        f"{block('python', lines)}\n\n"
        f"`x` is the {shown(first['x'])}; `y`, which `y_hat` approximates, the "
        f"{shown(first['y'])}. Both are `[batch, seq, {first['shape']['d_model']}]`, as the model "
        f"computes them: nothing is to be scaled.{others}"
    )


def _training(shared: list[dict[str, Any]]) -> list[str]:
    """Return the section of training commands; nothing if no run is known."""
    given = [facts["command"] for facts in shared if facts["command"] is not None]
    commands = [text if text.isprintable() else one_line(text) for text in given]
    if not commands:
        return []
    note = (
        "`--store` is the folder of the model's activations, made by `lorsa harvest`; all settings "
        "and figures are in each `training.json`."
    )
    return ["## Training", note, block("sh", "\n".join(commands))]
