"""Conversion of dictionaries from one tool's format to another's."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..dictionaries.config import DictionaryConfig
from ..dictionaries.dictionary import Dictionary
from ..dictionaries.fetch import local_folder
from ..dictionaries.formats.llamascopium_write import write as write_llamascopium
from ..dictionaries.kinds import load
from ..dictionaries.lorsa.config import LorsaConfig
from ..dictionaries.lorsa.module import Lorsa
from ..errors import ExchangeError
from ..language.blocks import attention_sites
from ..language.norms import Norm
from ..language.subject import Subject
from ..seal import write_seal
from ..whole import whole
from .config import ConvertConfig
from .norm import norm_before, read_after, read_before

NORMALIZED = "blocks.{}.ln1.hook_normalized"


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """What a conversion made."""

    out: str
    """Folder that was written"""
    to: str
    """Format of what was written"""
    kind: str
    """Kind of dictionary: lorsa, sae or transcoder"""
    layer: int | None
    """Layer at which it lies"""
    base_model: str | None
    """Language model of that layer"""
    n_features: int
    """Features; of a Lorsa its OV heads"""
    n_ov_heads: int | None
    """OV heads of a Lorsa; None of other kinds"""
    n_qk_heads: int | None
    """QK heads of a Lorsa; None of other kinds"""
    top_k: int
    activation: str
    hook_in: str
    """What it reads: "x" is the layer's input after the norm, with the norm's weight"""
    notes: list[str]
    """What to know before use"""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able data."""
        return asdict(self)


def convert(
    config: ConvertConfig, *, report: Callable[[str], None] = lambda line: None
) -> Converted:
    """Write a dictionary of any format in another.

    Formats of other tools, and models whose norm is folded, are for Lorsas.

    Args:
        config: what is asked for.
        report: is called with a line of text on what happens.

    Returns:
        What was written.

    Raises:
        CheckpointError: the source is none, has no such subfolder or revision, or cannot be
            expressed in the other format.
        ExchangeError: the folder to write is not empty, the subfolder is not inside, a revision of
            a folder is asked for, the model's norm cannot be folded, or something is asked for that
            is for Lorsas.
        LanguageModelError: the model cannot be found or loaded.
        AttachError: it has no such layer.
    """
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise ExchangeError(f"{config.out} is there already; give a new folder")
    dictionary = _read(config)
    hook = None
    if isinstance(dictionary, Lorsa) and config.model is not None:
        hook = _fold(dictionary, config, report)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with whole(config.out.resolve()) as partial:
        if config.to == "lorsa":
            dictionary.save_pretrained(partial)
        else:
            write_llamascopium(dictionary.saved(), partial, hook)
            write_seal(partial, sorted(path.name for path in partial.iterdir()))
    shape = dictionary.config
    heads = (shape.n_ov_heads, shape.n_qk_heads) if isinstance(shape, LorsaConfig) else (None, None)
    return Converted(
        out=str(config.out),
        to=config.to,
        kind=shape.kind,
        layer=shape.layer,
        base_model=shape.base_model,
        n_features=shape.n_features,
        n_ov_heads=heads[0],
        n_qk_heads=heads[1],
        top_k=shape.top_k,
        activation=shape.activation,
        hook_in=hook or shape.hook_in or "x",
        notes=_notes(shape, config, hook),
    )


def _read(config: ConvertConfig) -> Dictionary:
    """Return the dictionary to convert, with the limit that is asked for."""
    try:
        folder = local_folder(config.source, revision=config.revision, subfolder=config.subfolder)
        dictionary = load(folder)
        if config.max_l0 is not None:
            dictionary.config = replace(dictionary.config, max_l0=config.max_l0)
    except ValueError as error:
        raise ExchangeError(str(error)) from None
    _require_for_kind(dictionary.config, config)
    return dictionary


def _require_for_kind(shape: DictionaryConfig, config: ConvertConfig) -> None:
    """Raise ExchangeError if something is asked for that only Lorsas have."""
    if shape.kind == "lorsa":
        return
    if config.to != "lorsa":
        raise ExchangeError(
            f"{config.source} holds {shape.title}; --to {config.to} is for Lorsas: leave it out, "
            "and it is written in lorsa's own format"
        )
    if config.model is not None:
        raise ExchangeError(
            f"{config.source} holds {shape.title}; a model's norm is folded into Lorsas alone: "
            "leave --model out"
        )


def _fold(lorsa: Lorsa, config: ConvertConfig, report: Callable[[str], None]) -> str | None:
    """Change in place what a Lorsa reads; return the hook of theirs that gives it."""
    shape = lorsa.config
    if shape.layer is None:
        raise ExchangeError(f"{config.source} does not say which layer it replaces")
    theirs = NORMALIZED.format(shape.layer)
    if shape.hook_in not in (None, theirs):
        raise ExchangeError(
            f"{config.source} reads {shape.hook_in}; with a model, only {theirs} can be changed"
        )
    if (config.to == "lorsa") == (shape.hook_in is None):
        return shape.hook_in  # it reads what it should
    norm, name, revision = _norm(config, shape, report)
    after_weight = config.weighted and norm.centred
    if config.to == "lorsa":
        if not after_weight:
            read_after(lorsa, norm)
        lorsa.config = replace(shape, hook_in=None, base_model=name, base_revision=revision)
        return None
    if not after_weight:
        read_before(lorsa, norm)
    lorsa.config = replace(shape, hook_in=theirs)
    return theirs


def _norm(
    config: ConvertConfig, shape: LorsaConfig, report: Callable[[str], None]
) -> tuple[Norm, str, str | None]:
    """Return the norm before a Lorsa's layer, and which model it is of."""
    assert config.model is not None
    assert shape.layer is not None
    subject = Subject.find(config.model, revisions={shape.base_model: shape.base_revision})
    if shape.base_model not in (None, subject.path.name, subject.id):
        report(f"the Lorsa is of {shape.base_model}; taking {subject.id} for the same model")
    if subject.d_model != shape.d_model:
        raise ExchangeError(
            f"{config.source} has d_model {shape.d_model}; the model given has {subject.d_model}"
        )
    report(f"loading {subject.id} as far as layer {shape.layer}")
    # float32 holds every weight as it is in the file; a CPU is slow in half precision
    model = subject.load(devices=["cpu"], dtype="float32", n_layers=shape.layer + 1)
    (site,) = attention_sites(model, [shape.layer])
    return norm_before(model, site), subject.id, subject.path.revision


def _notes(shape: DictionaryConfig, config: ConvertConfig, hook: str | None) -> list[str]:
    notes = []
    if config.to == "lorsa" and shape.hook_in is not None:
        notes.append(
            f"it reads {shape.hook_in}; give --model to fold the norm in, or no layer can be "
            "replaced by it"
        )
    if config.to == "llamascopium" and hook is None and shape.hook_in is None:
        notes.append(
            "it reads the layer's input after the norm's weight, which no hook there gives; give "
            "--model to fold the norm out"
        )
    if not shape.has_threshold:
        notes.append(
            "its threshold is not known: the largest of all tokens given fire, until "
            "set_threshold has seen a sample"
        )
    if shape.activation == "batchtopk" and shape.has_threshold and config.to == "llamascopium":
        notes.append("there, the largest of all tokens given fire; the threshold is not used")
    if shape.max_l0 == shape.n_features and shape.activation != "topk":
        notes.append(
            f"all {shape.unit}s may fire on a token, which takes memory; --max-l0 sets a limit"
        )
    return notes
