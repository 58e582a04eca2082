"""What a prompt's predictions become when single Lorsa heads are ablated, scaled or set.

With error "keep" the change is from the model as it is; with "drop" from the model with the
unchanged Lorsa in place, so that either way it is the heads' alone.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dictionaries.attach import require_stand_in
from ..dictionaries.dictionary import Code
from ..dictionaries.lorsa.module import Lorsa
from ..errors import AnalyzeError
from ..evaluate.in_model import logits_of, token_figures
from ..evaluate.opened import device_for, layer_of
from ..language.blocks import attention_sites
from ..language.capture import Capture
from ..language.spelling import numbers, token_text
from ..language.subject import Subject
from ..language.tokenizer import starts_with_bos
from .config import AblateConfig
from .intervene import activations_of, intervene, require_heads

BEFORE = {"keep": "the model as it is", "drop": "the model with the unchanged Lorsa in place"}

N_STRONGEST = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptToken:
    """A token of the prompt."""

    position: int
    id: int
    text: str | None
    """None without a tokenizer."""
    acts: dict[int, float]
    """Activations of the chosen heads that fire here, before the change."""
    loss_before: float | None
    """Of the prompt's next token, nats; None at the last."""
    loss_after: float | None
    kl: float
    """KL(before || after) of the next token's distribution, nats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NextToken:
    """A token that may come after the prompt."""

    id: int
    text: str | None
    before: float
    """Probability."""
    after: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation:
    """What `ablate` finds."""

    run: str
    model: str
    layer: int
    heads: list[int]
    change: str
    """In words: "scaled by 0", "set to 2.5"."""
    error: str
    """"keep" or "drop"."""
    before: str
    """What the predictions before the change are of."""
    silent: list[int]
    """Chosen heads that fire on no token of the prompt."""
    strongest: dict[int, float]
    """Of all heads, those that write most at the prompt's last token, |z| ||w_O||, with their z."""
    prompt_nmse: float
    """Mean over the prompt's tokens of ||y - y_hat||^2 / ||y||^2, of the unchanged Lorsa."""
    kl: float
    """KL(before || after) after the prompt, nats."""
    tokens: list[PromptToken]
    likeliest_before: list[NextToken]
    likeliest_after: list[NextToken]
    most_changed: list[NextToken]
    """By the difference of the probabilities, whichever sign."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-able data."""
        return asdict(self)


class _Prompted(NamedTuple):
    """A Lorsa, its language model and a prompt, ready to run."""

    lorsa: Lorsa
    layer: int
    heads: list[int]
    model_id: str
    model: Any
    tokenizer: Any
    ids: list[int]
    """Token ids of the prompt"""


class _Seen(NamedTuple):
    """The chosen heads on the prompt."""

    z: Tensor
    """[seq, n_heads]"""
    strongest: dict[int, float]
    nmse: float


def ablate(config: AblateConfig, *, report: Callable[[str], None] = lambda text: None) -> Ablation:
    """Change heads of a Lorsa in its language model and compare what it predicts for a prompt.

    Args:
        config: the request.
        report: is told, in a line of text, what is being done.

    Raises:
        CheckpointError: the run holds no Lorsa.
        AnalyzeError: a head or token is out of range, the model takes no such prompt, or the
            figures are not finite.
        AttachError: the model is of another width, or has no such layer.
        LanguageModelError: the language model, or the tokenizer that a prompt needs, cannot be
            loaded.
    """
    subject = _load(config, report)
    before, after, seen = _run(subject, config)
    spell = _speller(subject.tokenizer)
    prompt = _prompt_tokens(subject.ids, before, after, subject.heads, seen.z, spell)
    return Ablation(
        run=str(config.run),
        model=subject.model_id,
        layer=subject.layer,
        heads=subject.heads,
        change=f"scaled by {config.scale or 0:g}"
        if config.value is None
        else f"set to {config.value:g}",
        error=config.error,
        before=BEFORE[config.error],
        silent=[head for i, head in enumerate(subject.heads) if not seen.z[:, i].any()],
        strongest=seen.strongest,
        prompt_nmse=seen.nmse,
        kl=prompt[-1].kl,
        tokens=prompt,
        **_next_tokens(before[0, -1], after[0, -1], config.top, spell),
    )


def _load(config: AblateConfig, report: Callable[[str], None]) -> _Prompted:
    """Load Lorsa, tokenizer and model, what is quick to refuse first."""
    lorsa = Lorsa.from_pretrained(config.run)
    layer = layer_of(lorsa, config.run)
    heads = list(dict.fromkeys(numbers("heads", config.heads)))
    require_heads(lorsa, heads)
    device = device_for(config.device)
    base, revision = lorsa.config.base_model, lorsa.config.base_revision
    subject = Subject.find(config.model, revisions={base: revision})
    if base not in (None, subject.path.name, subject.id):
        report(f"the run is of {base}; taking {subject.id} for the same model")
    tokenizer = subject.tokenizer(needed=config.prompt is not None)
    ids = _ids(config, tokenizer)
    report(f"loading {subject.id} on {device}")
    model = subject.load(devices=[device])
    require_stand_in(lorsa.config, model)
    _require_readable(ids, model)
    return _Prompted(lorsa.to(device), layer, heads, subject.id, model, tokenizer, ids)


def _run(subject: _Prompted, config: AblateConfig) -> tuple[Tensor, Tensor, _Seen]:
    """Return the logits before and after the change, [1, seq, n_vocab], and what was seen.

    Raises:
        AnalyzeError: they are not finite.
    """
    lorsa, layer, model = subject.lorsa, subject.layer, subject.model
    tokens = torch.tensor([subject.ids], device=lorsa.W_O.device)
    seen = _look(model, lorsa, layer, subject.heads, tokens)
    same: AbstractContextManager[None] = nullcontext()
    if config.error == "drop":
        same = intervene(model, lorsa, layer, {}, error="drop")
    how, number = ("scale", config.scale or 0.0) if config.value is None else ("set", config.value)
    changes = dict.fromkeys(subject.heads, number)
    changed = intervene(model, lorsa, layer, changes, how=how, error=config.error)
    before, after = _logits(model, tokens, same), _logits(model, tokens, changed)
    if not (before.isfinite().all() and after.isfinite().all()):
        raise AnalyzeError(
            f"{subject.model_id} predicts NaN or Inf for this prompt; check the model and the run"
        )
    return before, after, seen


def _ids(config: AblateConfig, tokenizer: Any) -> list[int]:
    """Return the token ids of the prompt."""
    if config.tokens is not None:
        return numbers("tokens", config.tokens)
    assert config.prompt is not None
    bos = [tokenizer.bos_token_id] if starts_with_bos(tokenizer, "auto") else []
    return [*bos, *tokenizer(config.prompt, add_special_tokens=False)["input_ids"]]


def _require_readable(ids: list[int], model: Any) -> None:
    """Raise AnalyzeError unless a model can read these token ids."""
    n_vocab = model.get_input_embeddings().num_embeddings
    outside = [i for i in ids if i >= n_vocab]
    if outside:
        raise AnalyzeError(f"token {outside[0]} is outside the vocabulary; it has 0-{n_vocab - 1}")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and len(ids) > longest:
        raise AnalyzeError(f"the prompt has {len(ids):,} tokens; the model takes {longest:,}")
    if not ids:
        raise AnalyzeError("the prompt has no tokens; give some text")


@torch.inference_mode()
def _look(model: Any, lorsa: Lorsa, layer: int, heads: list[int], tokens: Tensor) -> _Seen:
    """Return what the chosen heads do in the unchanged model, and how well the Lorsa fits."""
    with Capture(model, attention_sites(model, [layer])) as capture:
        x, y = capture.run(tokens)[layer]
    encoding = lorsa.encode(x.float())
    wanted = torch.tensor(heads, device=x.device)
    z = activations_of(encoding, wanted, lorsa.config.n_ov_heads)[0]
    y, y_hat = y.double(), lorsa.decode(*encoding).double()
    nmse = ((y - y_hat).square().sum(dim=2) / y.square().sum(dim=2)).mean()
    if not nmse.isfinite():
        raise AnalyzeError("the Lorsa gives NaN or Inf for this prompt; check the run")
    return _Seen(z, _strongest(lorsa, encoding), float(nmse))


def _strongest(lorsa: Lorsa, encoding: Code) -> dict[int, float]:
    """Return the heads that write most at the last token, and their activations."""
    acts, ids = encoding.acts[0, -1], encoding.ids[0, -1].long()
    written = acts.abs() * lorsa.W_O[ids].norm(dim=1)
    best = [i for i in written.argsort(descending=True)[:N_STRONGEST].tolist() if written[i] > 0]
    return {int(ids[i]): float(acts[i]) for i in best}


@torch.inference_mode()
def _logits(model: Any, tokens: Tensor, changed: AbstractContextManager[None]) -> Tensor:
    with changed:
        return logits_of(model, tokens)


def _speller(tokenizer: Any) -> Callable[[int], str | None]:
    """Return what spells a token."""
    if tokenizer is None:
        return lambda i: None
    return lambda i: token_text(tokenizer, i)


def _prompt_tokens(
    ids: list[int],
    before: Tensor,
    after: Tensor,
    heads: list[int],
    z: Tensor,
    spell: Callable[[int], str | None],
) -> list[PromptToken]:
    """Return what happens at each token of the prompt.

    Args:
        ids: of the prompt.
        before, after: logits, [1, seq, n_vocab].
        heads, z: chosen heads and their activations, [seq, n_heads].
        spell: spells a token.
    """
    targets = torch.tensor([ids], device=before.device).roll(-1, dims=1)  # the last has none
    first = token_figures(before, before, targets)
    then = token_figures(after, before, targets)
    last = len(ids) - 1
    return [
        PromptToken(
            position=t,
            id=i,
            text=spell(i),
            acts={head: a for head, a in zip(heads, z[t].tolist(), strict=True) if a != 0},
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
        top: tokens of each.
        spell: spells a token.
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
