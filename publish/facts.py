"""The facts that are shared with a dictionary: training.json, made from its run.

    {"format": "lorsa-training", "schema_version": 1, "layer", "model", "x", "y", "shape", "corpus",
     "trained", "evaluated", "settings", "command", "weights_sha256", "versions"}

Of another kind than a Lorsa it has "kind" besides, and schema version 2, which versions of lorsa
that know no other kind do not read.

`trained` holds the measures at the end of training, `evaluated` those that `lorsa eval` kept;
either is null where it was not done. Of a path only the last part is written, so that nothing names
a folder of the machine that it comes from.
"""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..dictionaries.choices import place_of, ports_of
from ..dictionaries.config import DictionaryConfig
from ..errors import PublishError, StoreError, unreadable
from ..evaluate.kept import kept_evaluation, weights_sha256
from ..hub import HUB_ID
from ..seal import first_damage, read_summed
from ..store.read.reader import ActivationStore
from ..train.config import TrainConfig
from ..train.origin import RUN
from ..train.run_folder import RUN_VERSION

FACTS_VERSIONS = {1: ("lorsa",), 2: ("sae", "transcoder")}
"""Kinds that facts of each schema version are of."""
FORMAT = "lorsa-training"
SITES_IN_WORDS = {
    "attn_in": "input of the attention layer, after the norm before it",
    "attn_out": "output of the attention layer, after its output projection and before it is added "
    "to the residual stream",
    "mlp_in": "input of the MLP, after the norm before it",
    "mlp_out": "output of the MLP, before it is added to the residual stream",
    "resid_in": "residual stream before the layer",
    "resid_mid": "residual stream between the layer's attention and its MLP",
    "resid_out": "residual stream after the layer",
}
RULE = ("top_k", "activation", "n_ctx")
SHAPES = {
    "lorsa": ("d_model", "n_ov_heads", "n_qk_heads", "d_qk_head", *RULE),
    "sae": ("d_model", "n_features", "site", "prefixes", *RULE),
    "transcoder": ("d_model", "n_features", "skip", "prefixes", *RULE),
}
"""Facts of the shape, by kind."""
CORPUS = ("data_config", "data_split", "data_revision", "packing", "bos", "n_documents")
TRAINED = (
    "train_tokens",
    "fvu",
    "fvu_all",
    "masked_fraction",
    "l0",
    "dead_fraction",
    "dead_window_tokens",
    "held_out_tokens",
)
EVALUATED = (
    "fvu",
    "fvu_usual",
    "nmse",
    "cosine",
    "l0",
    "dead_fraction",
    "n_tokens",
    "cross_entropy",
)
OPTIONS = (
    "kind",
    "site",
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
    "train_tokens",
    "batch_tokens",
    "lr",
    "seed",
    "minutes",
    "exact",
    "loss_mask",
    "precision",
)
"""Settings that decide the weights and are options of `lorsa train`; others go into a file."""
NUMBER = int | float | None
TYPES: dict[str, Any] = {
    "layer": int,
    "model": dict,
    "model.id": str | None,
    "model.revision": str | None,
    "x": str,
    "y": str,
    "shape": dict,
    "shape.d_model": int,
    "corpus": dict | None,
    "corpus.data": str,
    "corpus.data_config": str | None,
    "corpus.data_revision": str | None,
    "trained": dict | None,
    **{f"trained.{name}": NUMBER for name in ("train_tokens", "fvu", "l0", "dead_fraction")},
    **{f"trained.{name}": NUMBER for name in ("fvu_all", "masked_fraction")},
    "evaluated": dict | None,
    **{f"evaluated.{name}": NUMBER for name in ("fvu", "l0", "dead_fraction")},
    "evaluated.cross_entropy": dict | None,
    "evaluated.cross_entropy.recovered_from_zero": NUMBER,
    "command": str | None,
    "versions": dict | None,
    "versions.lorsa": str,
}
"""Types of the facts that a card shows; what is inside a null is not asked for."""
TYPES_BY_KIND: dict[str, dict[str, Any]] = {
    "lorsa": {"shape.n_ov_heads": int, "shape.n_qk_heads": int},
    "sae": {"shape.n_features": int, "shape.site": str},
    "transcoder": {"shape.n_features": int},
}
"""Types of more of them, by kind of dictionary."""


def training_facts(folder: Path, config: DictionaryConfig) -> dict[str, Any]:
    """Return the content of training.json.

    Args:
        folder: a finished run; or one with a saved dictionary alone, of which only its shape is
            known and the measures that `lorsa eval` kept.
        config: the dictionary's.

    Raises:
        PublishError: the run is not finished, of another version, or says what no run says.
    """
    run = read_run(folder)
    evaluated = kept_evaluation(folder)
    (read,), (written,) = config.ports
    version = next(n for n, kinds in FACTS_VERSIONS.items() if config.kind in kinds)
    facts = {
        "format": FORMAT,
        "schema_version": version,
        **({} if version == 1 else {"kind": config.kind}),
        "layer": config.layer,
        "model": {"id": public_model(config), "revision": config.base_revision},
        "x": SITES_IN_WORDS[read.name],
        "y": SITES_IN_WORDS[written.name],
        "shape": {name: _as_json(getattr(config, name)) for name in SHAPES[config.kind]},
        "corpus": None if run is None else _corpus(run),
        "trained": None if run is None else _some(run["result"], TRAINED),
        "evaluated": None if evaluated is None else _some(evaluated, EVALUATED),
        "settings": None if run is None else _settings(run),
        "command": None if run is None else _command(run, config.kind),
        "weights_sha256": weights_sha256(folder),
        "versions": None if run is None else run.get("versions"),
    }
    if (wrong := wrong_fact(facts)) is not None:
        raise PublishError(f"{folder}: {wrong}, which lorsa does not write; restore its files")
    return facts


def kind_of(facts: dict[str, Any]) -> str:
    """Return the kind of dictionary that facts are of."""
    return str(facts.get("kind", "lorsa"))


def folder_of(facts: dict[str, Any]) -> str:
    """Return the name of the folder of a dictionary: layer-12, 12.mlp or 12.resid_out."""
    kind = kind_of(facts)
    ports = ports_of(kind, facts["layer"], facts["shape"].get("site"))
    return place_of(kind, ports.writes[0])


def place_in_words(facts: dict[str, Any]) -> str:
    """Return the place of a dictionary in a sentence: layer 12, or 12.mlp."""
    return folder_of(facts).replace("-", " ")


def by_layer(facts: dict[str, Any]) -> tuple[int, str]:
    """Return the key to sort facts by: their layer, then their folder."""
    return facts["layer"], folder_of(facts)


def wrong_fact(facts: Any) -> str | None:
    """Return which of the facts that a card shows is of the wrong kind, in words; None if none."""
    for path, kind in (TYPES | TYPES_BY_KIND[kind_of(facts)]).items():
        *sections, name = path.split(".")
        inside = facts
        for section in sections:
            inside = None if inside is None else inside[section]
        if inside is None:
            continue
        if not isinstance(inside, dict) or (name not in inside and kind != NUMBER):
            return f"{path} is missing"
        value = inside.get(name)
        if isinstance(value, bool) or not isinstance(value, kind):
            return f"{path} is {value!r:.80}"
    return None


def read_run(folder: Path) -> dict[str, Any] | None:
    """Return the run.json of a finished run; None if a folder has none.

    Raises:
        PublishError: the run is not finished, of another version, or damaged.
    """
    path = folder / RUN
    try:
        content = read_summed(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PublishError(unreadable(path, error)) from None
    except ValueError as error:
        raise PublishError(f"{path} is damaged ({error}); restore it from a copy") from None
    if not isinstance(content, dict) or content.get("schema_version") != RUN_VERSION:
        raise PublishError(
            f"{path} is of another version of lorsa; push with the one that wrote it"
        )
    if (missing := _missing(content)) is not None:
        raise PublishError(f"{path} is damaged (no {missing}); restore it from a copy")
    if content.get("result") is None:
        raise PublishError(
            f"{folder} is not finished; the lorsa train command that began it goes on with it"
        )
    if (problem := first_damage(folder)) is not None:
        raise PublishError(f"{problem}; restore it from a copy")
    return content


def _missing(content: dict[str, Any]) -> str | None:
    """Return which section of a run.json is not there; None if all are."""
    for name in ("config", "decisive"):
        if not isinstance(content.get(name), dict):
            return name
    if not isinstance(content["config"].get("store"), str):
        return "config.store"
    is_result = isinstance(content.get("result"), dict | None)
    return None if is_result else "result"


def public_model(config: DictionaryConfig) -> str | None:
    """Return the language model's id on the Hub, or the last part of its path."""
    if config.base_model is None:
        return None
    is_hub = config.base_revision is not None or not Path(config.base_model).exists()
    return public_name(config.base_model, is_hub=is_hub)


def public_name(name: str, *, is_hub: bool) -> str:
    """Return an id of the Hub as it is, or the last part of a path alone."""
    if is_hub and HUB_ID.fullmatch(name):
        return name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _some(data: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: data.get(name) for name in names}


def _corpus(run: dict[str, Any]) -> dict[str, Any] | None:
    """Return the corpus: from the run, or, of older runs, from their store if it is there."""
    corpus = run.get("corpus")
    if corpus is None:
        try:
            manifest = ActivationStore.open(run["config"]["store"]).manifest
        except (StoreError, OSError):
            return None
        if manifest.uuid != run["decisive"].get("store_uuid"):
            return None
        corpus = manifest.corpus
    is_hub = corpus.get("data_revision") is not None
    parts = [public_name(part, is_hub=is_hub) for part in str(corpus.get("data")).split(" + ")]
    return {"data": " + ".join(parts), **_some(corpus, CORPUS)}


def _settings(run: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide the weights, as they were asked for."""
    asked = run["config"]
    names = [field.name for field in fields(TrainConfig)]
    return {n: asked[n] for n in names if n in run["decisive"] and n in asked}


def _command(run: dict[str, Any], kind: str) -> str:
    """Return the command that trains the same weights, with the store's name for its path."""
    settings = _settings(run) | {"kind": kind}
    defaults = TrainConfig(store=Path(), layer=0, out=Path(), kind=kind).to_dict()
    defaults["kind"] = "lorsa"
    changed = {
        name: value
        for name, value in settings.items()
        if name != "layer" and value != defaults[name]
    }
    store = public_name(run["config"]["store"], is_hub=False)
    words = ["lorsa", "train", "--store", store, "--layers", str(run["config"]["layer"])]
    for name in OPTIONS:
        if (value := changed.pop(name, None)) is not None:
            option = "--" + name.replace("_", "-")
            words += [option] if value is True else [option, _as_word(value)]
    if not changed:
        return shlex.join(words)
    others = ", ".join(f"{name} = {json.dumps(value)}" for name, value in changed.items())
    return f"{shlex.join([*words, '--config', 'run.toml'])}  # run.toml: {others}"


def _as_word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
