"""Predictions for a prompt before and after single Lorsa heads are ablated, scaled or set.

With error "keep" the comparison is with the model as it is. With "drop" it is with the model with
the unchanged Lorsa in place. Either way the difference is the heads' alone.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dictionaries.attach import stand_in_gap
from ..dictionaries.code import Code
from ..dictionaries.lorsa.module import Lorsa
from ..errors import AnalyzeError
from ..evaluate.in_model import logits_of, token_figures
from ..evaluate.opened import device_for, layer_of
from ..language.blocks import attention_sites
from ..language.capture import Capture
from ..language.spelling import parse_ids, token_text, whole_characters
from ..language.subject import Subject
from ..language.tokenizer import starts_with_bos
from .config import AblateConfig
from .intervene import activations_of, intervene, require_heads

BEFORE = {"keep": "the model as it is", "drop": "the model with the unchanged Lorsa in place"}
"""What predictions before the change are of, by `error`."""
N_STRONGEST = 10
"""Heads at the last token that are listed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptToken:
    """A token of the prompt."""

    position: int
    id: int
    text: str | None
    """Text of the token; None without a tokenizer. The first piece of a character has it whole."""
    acts: dict[int, float]
    """Activations of the chosen heads that fire here, before the change."""
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
    """Predictions before and after a change of heads, from `ablate`."""

    run: str
    model: str
    layer: int
    heads: list[int]
    change: str
    """Change of the heads, in words: "scaled by 0", "set to 2.5"."""
    error: str
    """"keep" or "drop"."""
    before: str
    """Model that the predictions before the change are of, in words."""
    silent: list[int]
    """Chosen heads that fire on no token of the prompt."""
    strongest: dict[int, float]
    """Activations of the heads that write most, |z| ||w_O||, at the prompt's last token."""
    prompt_nmse: float
    """Mean over the prompt's tokens of ||y - y_hat||^2 / ||y||^2, of the unchanged Lorsa."""
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
    """A Lorsa, its language model and a prompt, ready to run."""

    lorsa: Lorsa
    layer: int
    heads: list[int]
    model_id: str
    model: Any
    tokenizer: Any
    ids: list[int]
    """Token ids of the prompt"""


def ablate(config: AblateConfig, *, report: Callable[[str], None] = lambda text: None) -> Ablation:
    """Change heads of a Lorsa in its language model and compare what it predicts for a prompt.

    Args:
        config: the request.
        report: called with lines of text.

    Raises:
        CheckpointError: the run holds no Lorsa.
        AnalyzeError: a head or token is out of range, the model takes no such prompt, or the
            figures are not finite.
        AttachError: the model is of another width, or has no such layer.
        LanguageModelError: the language model, or the tokenizer that a prompt needs, cannot be
            loaded.
    """
    subject = _load(config, report)
    tokens = torch.tensor([subject.ids], device=subject.lorsa.W_O.device)
    z, strongest, nmse = _measure(subject, tokens)
    before, after = _predictions(subject, config, tokens)

    def spell(i: int) -> str | None:
        return None if subject.tokenizer is None else token_text(subject.tokenizer, i)

    prompt = _prompt_tokens(subject, before, after, z, spell)
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
        silent=[head for i, head in enumerate(subject.heads) if not z[:, i].any()],
        strongest=strongest,
        prompt_nmse=nmse,
        kl=prompt[-1].kl,
        tokens=prompt,
        **_next_tokens(before[0, -1], after[0, -1], config.top, spell),
    )


def _load(config: AblateConfig, report: Callable[[str], None]) -> _Prompted:
    """Load Lorsa, tokenizer and model, what is quick to refuse first."""
    lorsa = Lorsa.from_pretrained(config.run)
    layer = layer_of(lorsa, config.run)
    heads = list(dict.fromkeys(parse_ids("heads", config.heads)))
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
    stand_in_gap(lorsa.config, model, layer)
    _require_readable(ids, model)
    return _Prompted(lorsa.to(device), layer, heads, subject.id, model, tokenizer, ids)


def _predictions(subject: _Prompted, config: AblateConfig, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits before and after the change, [1, seq, n_vocab].

    Raises:
        AnalyzeError: a prediction is no distribution.
    """
    lorsa, layer, model = subject.lorsa, subject.layer, subject.model
    same: AbstractContextManager[None] = nullcontext()
    if config.error == "drop":
        same = intervene(model, lorsa, layer, {}, error="drop")
    how, number = ("scale", config.scale or 0.0) if config.value is None else ("set", config.value)
    changes = dict.fromkeys(subject.heads, number)
    changed = intervene(model, lorsa, layer, changes, how=how, error=config.error)
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
def _measure(subject: _Prompted, tokens: Tensor) -> tuple[Tensor, dict[int, float], float]:
    """Return what the unchanged Lorsa does on the prompt; AnalyzeError if that is not finite.

    Returns:
        Activations of the chosen heads, [seq, n_heads]; the strongest heads; the NMSE of y_hat.
    """
    lorsa, layer, model = subject.lorsa, subject.layer, subject.model
    with Capture(model, attention_sites(model, [layer])) as capture:
        call = capture.calls(tokens)[layer]
    x, y = call.x, call.y
    code = lorsa.encode(x.float())
    wanted = torch.tensor(subject.heads, device=x.device)
    z = activations_of(code, wanted, lorsa.config.n_ov_heads)[0]
    y, y_hat = y.double(), lorsa.decode(*code).double()
    nmse = ((y - y_hat).square().sum(dim=2) / y.square().sum(dim=2)).mean()
    if not nmse.isfinite():
        raise AnalyzeError("the Lorsa gives NaN or Inf for this prompt; check the run")
    return z, _strongest(lorsa, code), float(nmse)


def _strongest(lorsa: Lorsa, code: Code) -> dict[int, float]:
    """Return the heads that write most at the last token, and their activations."""
    acts, ids = code.acts[0, -1], code.ids[0, -1].long()
    written = acts.abs() * lorsa.W_O[ids].norm(dim=1)
    best = [i for i in written.argsort(descending=True)[:N_STRONGEST].tolist() if written[i] > 0]
    return {int(ids[i]): float(acts[i]) for i in best}


@torch.inference_mode()
def _logits(model: Any, tokens: Tensor, changed: AbstractContextManager[None]) -> Tensor:
    with changed:
        return logits_of(model, tokens)


def _prompt_tokens(
    subject: _Prompted, before: Tensor, after: Tensor, z: Tensor, spell: Callable[[int], str | None]
) -> list[PromptToken]:
    """Return the heads and the predictions at each token of the prompt.

    Args:
        subject: the prompt and the chosen heads.
        before, after: logits, [1, seq, n_vocab].
        z: activations of the chosen heads, [seq, n_heads].
        spell: from a token's id to its text.
    """
    ids, heads = subject.ids, subject.heads
    targets = torch.tensor([ids], device=before.device).roll(-1, dims=1)  # the last has none
    first = token_figures(before, before, targets)
    then = token_figures(after, before, targets)
    last = len(ids) - 1
    texts = _texts(ids, spell)
    return [
        PromptToken(
            position=t,
            id=i,
            text=texts[t],
            acts={head: a for head, a in zip(heads, z[t].tolist(), strict=True) if a != 0},
            loss_before=float(first.loss[0, t]) if t < last else None,
            loss_after=float(then.loss[0, t]) if t < last else None,
            kl=float(then.kl[0, t]),
        )
        for t, i in enumerate(ids)
    ]


def _texts(ids: list[int], spell: Callable[[int], str | None]) -> list[str | None]:
    """Return the texts of a prompt's tokens; characters in pieces are whole at the first piece."""
    texts = [spell(i) for i in ids]
    for places, text in whole_characters([text or "" for text in texts]):
        if len(places) > 1:
            texts[places.start] = text
    return texts


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
