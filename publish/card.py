"""The model card of a repository of Lorsas: README.md, with front matter for the Hub."""

from typing import Any

from huggingface_hub import ModelCardData

from ..hub import HUB_ID
from .markdown import block, code, one_line, python_text, shown

TAGS = ("lorsa", "low-rank-sparse-attention", "sparse-attention", "interpretability")
PAPER = "https://arxiv.org/abs/2504.20938"
NONE = "-"
COLUMNS = {
    "layer": "of the language model, counted from 0; its Lorsa is in the folder of that name",
    "OV heads": "rank-1 heads: each reads one direction and writes one",
    "QK heads": "attention patterns, each shared by as many OV heads as the others",
    "L0": "heads that fire on a token, on average",
    "FVU": "share of the variance of the layer's output that the Lorsa does not explain, on tokens "
    "that were held out from training",
    "dead heads": "share of OV heads that did not fire on the last tokens of training, or, where "
    "training says nothing, on the held-out tokens",
    "loss recovered": "how much of the next-token loss that the layer's removal costs (its output "
    "replaced by zero) the Lorsa gives back when it stands in for the layer: 100 % is as good as "
    "the layer",
    "tokens": "how many it was trained on",
    "text": "the corpus that they are of",
}
CITATION = """\
@article{he2025lorsa,
  title   = {Towards Understanding the Nature of Attention with Low-Rank Sparse Decomposition},
  author  = {Zhengfu He and Junxuan Wang and Rui Lin and Xuyang Ge and Wentao Shu and Qiong Tang
             and Junping Zhang and Xipeng Qiu},
  journal = {arXiv preprint arXiv:2504.20938},
  year    = {2025}
}"""


def card(
    repo: str, layers: list[dict[str, Any]], *, revision: str | None, license_id: str | None
) -> str:
    """Return the model card.

    Args:
        repo: argument of `Lorsa.from_pretrained`: owner/name, or a folder's name.
        layers: training.json of every Lorsa there, by layer.
        revision: branch of the repository; None is the main one.
        license_id: the Hub's identifier, if a license is known.
    """
    parts = [
        _front_matter(layers, license_id),
        f"# {shown(repo.rpartition('/')[2])}",
        _introduction(layers),
        _table(layers),
        "## Loading one",
        _loading(repo, layers, revision),
        "## What the columns mean",
        "\n".join(f"- **{name}**: {meaning}" for name, meaning in COLUMNS.items())
        + f"\n\nWhat was not measured is a dash ({NONE}).",
        *_training(layers),
        "## Citation",
        f"Low-Rank Sparse Attention is due to He et al. 2025 ([arXiv:2504.20938]({PAPER})):",
        block("bibtex", CITATION),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(layers: list[dict[str, Any]], license_id: str | None) -> str:
    model = _model(layers)
    names = {facts["corpus"]["data"] for facts in layers if _is_hub_data(facts["corpus"])}
    datasets = sorted({part for name in names for part in name.split(" + ")})
    data = ModelCardData(
        library_name="lorsa",
        base_model=model if model is not None and HUB_ID.fullmatch(model) else None,
        datasets=[name for name in datasets if HUB_ID.fullmatch(name)] or None,
        license=None if license_id is None else one_line(license_id),
        tags=list(TAGS),
    )
    return f"---\n{data.to_yaml()}\n---"


def _is_hub_data(corpus: dict[str, Any] | None) -> bool:
    return corpus is not None and corpus.get("data_revision") is not None


def _model(layers: list[dict[str, Any]]) -> str | None:
    model: str | None = layers[0]["model"]["id"]
    return model


def _introduction(layers: list[dict[str, Any]]) -> str:
    model = _model(layers)
    of = "a language model" if model is None else code(model)
    if model is not None and HUB_ID.fullmatch(model):
        of = f"[{model}](https://huggingface.co/{model})"
    revisions = sorted({r for facts in layers if (r := facts["model"]["revision"]) is not None})
    at = f" (commit {', '.join(code(r[:12]) for r in revisions)})" if revisions else ""
    return (
        f"Attention layers of {of}{at}, taken apart by "
        f"[Low-Rank Sparse Attention]({PAPER}) (*Lorsa*). A Lorsa stands in for one layer: it has "
        "thousands of rank-1 heads, of which a few fire on a token, so that each can be read. "
        f"Made with {_versions(layers)}."
    )


def _versions(layers: list[dict[str, Any]]) -> str:
    known = sorted({facts["versions"]["lorsa"] for facts in layers if facts["versions"]})
    return f"`lorsa` {', '.join(map(shown, known))}" if known else "`lorsa`"


def _table(layers: list[dict[str, Any]]) -> str:
    head = [f"| {' | '.join(COLUMNS)} |", "|" + "---:|" * (len(COLUMNS) - 1) + "---|"]
    return "\n".join(head + [f"| {' | '.join(_row(facts))} |" for facts in layers])


def _row(facts: dict[str, Any]) -> list[str]:
    trained, evaluated = facts["trained"] or {}, facts["evaluated"] or {}
    measured = {**evaluated, **{k: v for k, v in trained.items() if v is not None}}
    losses, corpus = evaluated.get("cross_entropy") or {}, facts["corpus"] or {}
    data = " ".join(str(corpus[n]) for n in ("data", "data_config") if corpus.get(n) is not None)
    return [
        str(facts["layer"]),
        f"{facts['shape']['n_ov_heads']:,}",
        f"{facts['shape']['n_qk_heads']:,}",
        _spelled(measured.get("l0"), "{:.1f}"),
        _spelled(measured.get("fvu"), "{:.4f}"),
        _spelled(measured.get("dead_fraction"), "{:.1%}"),
        _spelled(losses.get("recovered_from_zero"), "{:.1%}"),
        _spelled(measured.get("train_tokens"), "{:,}"),
        shown(data) or NONE,
    ]


def _spelled(value: float | None, form: str) -> str:
    return NONE if value is None else form.format(value)


def _loading(repo: str, layers: list[dict[str, Any]], revision: str | None) -> str:
    first = layers[0]
    words = [python_text(repo), f'subfolder="layer-{first["layer"]}"']
    words += [] if revision is None else [f"revision={python_text(revision)}"]
    lines = (
        "from lorsa import Lorsa\n\n"
        f"lorsa = Lorsa.from_pretrained({', '.join(words)})\n"
        "acts, ids = lorsa.encode(x)  # which heads fire, and how much\n"
        "y_hat = lorsa.decode(acts, ids)  # in place of y"
    )
    return (
        f"{block('python', lines)}\n\n"
        f"`x` is the {shown(first['x'])}; `y`, which `y_hat` approximates, the "
        f"{shown(first['y'])}. Both are `[batch, seq, {first['shape']['d_model']}]`, as the model "
        "computes them: nothing is to be scaled."
    )


def _training(layers: list[dict[str, Any]]) -> list[str]:
    """Return the section of training commands; nothing if no run is known."""
    given = [facts["command"] for facts in layers if facts["command"] is not None]
    commands = [text if text.isprintable() else one_line(text) for text in given]
    if not commands:
        return []
    note = (
        "`--store` is the folder of the model's activations, made by `lorsa harvest`; all settings "
        "and figures are in each `training.json`."
    )
    return ["## Training", note, block("sh", "\n".join(commands))]
