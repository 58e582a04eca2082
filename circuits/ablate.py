"""Predictions for a prompt before and after single features are ablated, scaled or set.

With error "keep" the comparison is with the model as it is. With "drop" it is with the model with
the unchanged dictionary in place. Either way the difference is the features' alone.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dictionaries.attach import stand_in_gap
from ..dictionaries.code import Code
from ..dictionaries.dictionary import Dictionary
from ..dictionaries.kinds import load
from ..errors import AnalyzeError
from ..evaluate.in_model import logits_of, token_figures
from ..evaluate.opened import device_for, layer_of
from ..language.edit import Gap, edited
from ..language.spelling import parse_ids, token_text
from ..language.subject import Subject
from .config import AblateConfig
from .intervene import activations_of, intervene, require_features
from .prompts import prompt_ids, require_readable, token_texts

BEFORE = {"keep": "the model as it is", "drop": "the model with the unchanged {} in place"}
"""What predictions before the change are of, by `error`."""
N_STRONGEST = 10
"""Features at the last token that are listed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptToken:
    """A token of the prompt."""

    position: int
    id: int
    text: str | None
    """Text of the token; None without a tokenizer. The first piece of a character has it whole."""
    acts: dict[int, float]
    """Activations of the chosen features that fire here, before the change."""
    loss_before: float | None
    """Loss of the prompt's next token, nats; None at the last."""
    loss_after: float | None
    """The same after the change."""
    kl: float
    """KL(before || after) of the next token's distribution, nats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NextToken:
    """A token that may come after the prompt."""

    id: int
    text: str | None
    """Text of the token; None without a tokenizer."""
    before: float
    """Probability before the change."""
    after: float
    """Probability after the change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """Predictions before and after a change of features, from `ablate`."""

    run: str
    model: str
    kind: str
    """Kind of dictionary: lorsa, sae or transcoder."""
    layer: int
    writes: list[str]
    """Sites that it writes."""
    features: list[int]
    change: str
    """Change of the features, in words: "scaled by 0", "set to 2.5"."""
    error: str
    """"keep" or "drop"."""
    before: str
    """Model that the predictions before the change are of, in words."""
    silent: list[int]
    """Chosen features that fire on no token of the prompt."""
    strongest: dict[int, float]
    """Activations of the features that write most, |z| ||w_O||, at the prompt's last token."""
    prompt_nmse: float
    """Mean over the prompt's tokens of ||y - y_hat||^2 / ||y||^2, of the unchanged dictionary."""
    kl: float
    """KL(before || after) after the prompt, nats."""
    tokens: list[PromptToken]
    likeliest_before: list[NextToken]
    likeliest_after: list[NextToken]
    most_changed: list[NextToken]
    """Tokens whose probability changes most, in either direction."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return asdict(self)


class _Prompted(NamedTuple):
    """A dictionary, its language model and a prompt, ready to run."""

    dictionary: Dictionary
    layer: int
    features: list[int]
    model_id: str
    model: Any
    gap: Gap
    """Place of the dictionary in the model"""
    tokenizer: Any
    ids: list[int]
    """Token ids of the prompt"""


def ablate(config: AblateConfig, *, report: Callable[[str], None] = lambda text: None) -> Ablation:
    """Change features of a dictionary in its language model; compare predictions for a prompt.

    Args:
        config: the request.
        report: called with lines of text.

    Raises:
        CheckpointError: the run holds no dictionary.
        AnalyzeError: a feature or token is out of range, the model takes no such prompt, or the
            figures are not finite.
        AttachError: the model is of another width, or has no such layer or site.
        LanguageModelError: the language model, or the tokenizer that a prompt needs, cannot be
            loaded.
    """
    subject = _load(config, report)
    tokens = torch.tensor([subject.ids], device=subject.dictionary.W_O.device)
    z, strongest, nmse = _measure(subject, tokens)
    before, after = _predictions(subject, config, tokens)

    def spell(i: int) -> str | None:
        return None if subject.tokenizer is None else token_text(subject.tokenizer, i)

    prompt = _prompt_tokens(subject, before, after, z, spell)
    return Ablation(
        run=str(config.run),
        model=subject.model_id,
        kind=subject.dictionary.kind,
        layer=subject.layer,
        writes=[str(subject.gap.writes.site)],
        features=subject.features,
        change=f"scaled by {config.scale or 0:g}"
        if config.value is None
        else f"set to {config.value:g}",
        error=config.error,
        before=BEFORE[config.error].format(subject.dictionary.config.noun),
        silent=[id_ for i, id_ in enumerate(subject.features) if not z[:, i].any()],
        strongest=strongest,
        prompt_nmse=nmse,
        kl=prompt[-1].kl,
        tokens=prompt,
        **_next_tokens(before[0, -1], after[0, -1], config.top, spell),
    )


def _load(config: AblateConfig, report: Callable[[str], None]) -> _Prompted:
    """Load dictionary, tokenizer and model, what is quick to refuse first."""
    dictionary = load(config.run)
    layer = layer_of(dictionary, config.run)
    features = list(dict.fromkeys(parse_ids("features", config.features)))
    require_features(dictionary, features)
    device = device_for(config.device)
    base, revision = dictionary.config.base_model, dictionary.config.base_revision
    subject = Subject.find(config.model, revisions={base: revision})
    if base not in (None, subject.path.name, subject.id):
        report(f"the run is of {base}; taking {subject.id} for the same model")
    tokenizer = subject.tokenizer(needed=config.prompt is not None)
    ids = _ids(config, tokenizer)
    report(f"loading {subject.id} on {device}")
    model = subject.load(devices=[device])
    gap = stand_in_gap(dictionary.config, model, layer)
    n_vocab = model.get_input_embeddings().num_embeddings
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    require_readable(ids, n_vocab, longest)
    placed = dictionary.to(device)
    return _Prompted(placed, layer, features, subject.id, model, gap, tokenizer, ids)


def _predictions(subject: _Prompted, config: AblateConfig, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits before and after the change, [1, seq, n_vocab].

    Raises:
        AnalyzeError: a prediction is no distribution.
    """
    dictionary, layer, model = subject.dictionary, subject.layer, subject.model
    same: AbstractContextManager[None] = nullcontext()
    if config.error == "drop":
        same = intervene(model, dictionary, layer, {}, error="drop")
    how, number = ("scale", config.scale or 0.0) if config.value is None else ("set", config.value)
    changes = dict.fromkeys(subject.features, number)
    changed = intervene(model, dictionary, layer, changes, how=how, error=config.error)
    before, after = _logits(model, tokens, same), _logits(model, tokens, changed)
    best = torch.cat([before, after]).amax(dim=2)  # a token may be ruled out by -inf, but not all
    if not best.isfinite().all():
        raise AnalyzeError(
            f"{subject.model_id} predicts NaN or Inf for this prompt; check the model and the run"
        )
    return before, after


def _ids(config: AblateConfig, tokenizer: Any) -> list[int]:
    """Return the token ids of the prompt."""
    if config.tokens is not None:
        return parse_ids("tokens", config.tokens)
    assert config.prompt is not None
    return prompt_ids(config.prompt, tokenizer)


@torch.inference_mode()
def _measure(subject: _Prompted, tokens: Tensor) -> tuple[Tensor, dict[int, float], float]:
    """Return what the unchanged dictionary does on the prompt; AnalyzeError if it is not finite.

    Returns:
        Activations of the chosen features, [seq, n]; the strongest features; the NMSE of y_hat.
    """
    dictionary, seen = subject.dictionary, []

    def see(x: Tensor, y: Tensor) -> Tensor:
        seen.append((x.clone(), y.clone()))
        return y

    _logits(subject.model, tokens, edited(subject.gap, see))
    ((x, y),) = seen
    code = dictionary.encode(x.float())
    wanted = torch.tensor(subject.features, device=x.device)
    z = activations_of(code, wanted, dictionary.config.n_features)[0]
    y, y_hat = y.double(), dictionary.decode(*code, x.float()).double()
    nmse = ((y - y_hat).square().sum(dim=2) / y.square().sum(dim=2)).mean()
    if not nmse.isfinite():
        noun = dictionary.config.noun
        raise AnalyzeError(f"the {noun} gives NaN or Inf for this prompt; check the run")
    return z, _strongest(dictionary, code), float(nmse)


def _strongest(dictionary: Dictionary, code: Code) -> dict[int, float]:
    """Return the features that write most at the last token, and their activations."""
    acts, ids = code.acts[0, -1], code.ids[0, -1].long()
    written = acts.abs() * dictionary.norms()[ids]
    best = [i for i in written.argsort(descending=True)[:N_STRONGEST].tolist() if written[i] > 0]
    return {int(ids[i]): float(acts[i]) for i in best}


@torch.inference_mode()
def _logits(model: Any, tokens: Tensor, changed: AbstractContextManager[None]) -> Tensor:
    with changed:
        return logits_of(model, tokens)


def _prompt_tokens(
    subject: _Prompted, before: Tensor, after: Tensor, z: Tensor, spell: Callable[[int], str | None]
) -> list[PromptToken]:
    """Return the features and the predictions at each token of the prompt.

    Args:
        subject: the prompt and the chosen features.
        before, after: logits, [1, seq, n_vocab].
        z: activations of the chosen features, [seq, n].
        spell: from a token's id to its text.
    """
    ids, features = subject.ids, subject.features
    targets = torch.tensor([ids], device=before.device).roll(-1, dims=1)  # the last has none
    first = token_figures(before, before, targets)
    then = token_figures(after, before, targets)
    last = len(ids) - 1
    texts = token_texts(ids, spell)
    return [
        PromptToken(
            position=t,
            id=i,
            text=texts[t],
            acts={id_: a for id_, a in zip(features, z[t].tolist(), strict=True) if a != 0},
            loss_before=float(first.loss[0, t]) if t < last else None,
            loss_after=float(then.loss[0, t]) if t < last else None,
            kl=float(then.kl[0, t]),
        )
        for t, i in enumerate(ids)
    ]


def _next_tokens(
    before: Tensor, after: Tensor, top: int, spell: Callable[[int], str | None]
) -> dict[str, list[NextToken]]:
    """Return the likeliest next tokens before and after, and those that changed most.

    Args:
        before, after: logits after the prompt, [n_vocab].
        top: number of tokens of each.
        spell: from a token's id to its text.
    """
    p, q = before.float().softmax(dim=0), after.float().softmax(dim=0)

    def largest(values: Tensor) -> list[NextToken]:
        ids = values.topk(min(top, len(values))).indices.tolist()
        return [NextToken(id=i, text=spell(i), before=float(p[i]), after=float(q[i])) for i in ids]

    return {
        "likeliest_before": largest(p),
        "likeliest_after": largest(q),
        "most_changed": largest((q - p).abs()),
    }
