"""Request of a trace, opened: dictionaries, language model and prompt that fit together."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch

from ...dictionaries.dictionary import Dictionary
from ...dictionaries.kinds import load
from ...errors import AnalyzeError
from ...evaluate.kept import weights_sha256
from ...evaluate.opened import device_for, layer_of
from ...language.aliases import canonical
from ...language.blocks import text_config
from ...language.spelling import parse_ids, token_text
from ...language.subject import Subject
from ...version import __version__
from ..prompts import ids_of_file, prompt_ids, require_readable, token_texts
from .config import TraceConfig
from .files import VERSION, is_trace, read_facts
from .freeze import freeze
from .frozen import Frozen

UNDECISIVE = ("runs", "model", "prompt", "tokens", "tokens_file", "out", "name", "device")
"""Settings that do not change a trace, or that are named by what they lead to."""
LEAST_TOKENS = 2
PATTERN_BYTES = 4
"""Bytes of a query and key in the pattern of a head."""
NAME_LETTERS = 40
"""Letters of a prompt in the name of its trace."""
NAME_DIGITS = 6


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A request whose parts fit together; the language model is not loaded yet."""

    config: TraceConfig
    subject: Subject
    tokenizer: Any
    """Tokenizer of the model; None without one"""
    ids: list[int]
    """Token ids of the prompt"""
    dictionaries: list[Dictionary]
    """Dictionaries of the runs, in their order"""

    @cached_property
    def asked(self) -> str:
        """Checksum of all that a trace depends on."""
        content = {
            "version": VERSION,
            "lorsa": __version__,
            "model": [canonical(self.config.model), self.subject.path.revision],
            "ids": self.ids,
            "weights": [weights_sha256(run) for run in self.config.runs],
            **self._settings(),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def root(self) -> Path:
        """Folder of the trace."""
        words = re.sub(r"[^a-z0-9]+", "-", (self.config.prompt or "tokens").lower())
        slug = words[:NAME_LETTERS].strip("-") or "prompt"
        return self.config.out / (self.config.name or f"{slug}-{self.asked[:NAME_DIGITS]}")

    @property
    def is_made(self) -> bool:
        """Whether the same was asked before, and its trace is there.

        Raises:
            AnalyzeError: there is something else under its name.
        """
        if not self.root.exists():
            return False
        if not is_trace(self.root):
            raise AnalyzeError(
                f"{self.root} is there and is no whole trace; remove it, or give another --name"
            )
        if read_facts(self.root).get("asked") != self.asked:
            raise AnalyzeError(
                f"{self.root} is a trace of another request; give another --name, or remove it"
            )
        return True

    def freeze(self, report: Callable[[str], None]) -> Frozen:
        """Load the language model and run it on the prompt.

        Raises:
            AttachError: the model has no such layer or site, or another width.
            LanguageModelError: it cannot be loaded.
            AnalyzeError: it gives NaN or Inf, or its patterns do not fit the memory.
        """
        device = device_for(self.config.device)
        report(f"loading {self.subject.id} on {device}")
        model = self.subject.load(devices=[device], dtype="float32")
        n_lorsas = sum(each.kind == "lorsa" for each in self.dictionaries)
        n_heads = text_config(model).num_attention_heads * (self.subject.n_layers - n_lorsas)
        require_patterns(len(self.ids), n_heads)
        placed = {each.config.ports: each.to(device) for each in self.dictionaries}
        return freeze(model, placed, torch.tensor(self.ids, device=device))

    def spell(self, token: int) -> str | None:
        """Return the text of a token; None without a tokenizer."""
        return None if self.tokenizer is None else token_text(self.tokenizer, token)

    def token(self, text: str) -> int:
        """Return the token that is written as its text, or as #17.

        Raises:
            AnalyzeError: it is no token.
        """
        if re.fullmatch(r"#\d{1,18}", text):
            return int(text[1:])
        if self.tokenizer is None:
            raise AnalyzeError(f"{self.subject.id} has no tokenizer; give the token's id as #17")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            spelled = " ".join(f"#{i} {self.spell(i)!r}" for i in ids)
            raise AnalyzeError(f"{text!r} is no token but {len(ids)}: {spelled}; give one of them")
        return int(ids[0])

    def facts(self) -> dict[str, Any]:
        """Return the request as trace.json has it."""
        texts = token_texts(self.ids, self.spell)
        runs = zip(self.config.runs, self.dictionaries, strict=True)
        return {
            "name": self.root.name,
            "asked": self.asked,
            "model": {
                "id": self.subject.id,
                "revision": self.subject.path.revision,
                "n_layers": self.subject.n_layers,
            },
            "prompt": self.config.prompt,
            "tokens": [{"token": i, "text": text} for i, text in zip(self.ids, texts, strict=True)],
            "runs": [_run_facts(run, dictionary) for run, dictionary in runs],
            "replaced": {
                what: sorted(layer for layer, site in self._written() if site == f"{what}_out")
                for what in ("attn", "mlp")
            },
            "settings": self._settings(),
        }

    def _written(self) -> list[tuple[int, str]]:
        return [(s.layer, s.name) for each in self.dictionaries for s in each.config.ports.writes]

    def _settings(self) -> dict[str, Any]:
        named = [field.name for field in fields(self.config) if field.name not in UNDECISIVE]
        return {name: getattr(self.config, name) for name in named}


def require_patterns(n_tokens: int, n_heads: int) -> None:
    """Raise AnalyzeError if attention patterns may take more memory than there is.

    Args:
        n_tokens: tokens of the prompt.
        n_heads: heads, over all layers, whose patterns are kept.
    """
    needed, free = PATTERN_BYTES * n_heads * n_tokens**2, psutil.virtual_memory().available
    if needed > free:
        raise AnalyzeError(
            f"the attention patterns of {n_tokens:,} tokens take {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free; give a prompt of "
            f"{math.isqrt(free // (PATTERN_BYTES * n_heads)):,} tokens at most, or Lorsas of more "
            "layers"
        )


def open_request(config: TraceConfig, report: Callable[[str], None]) -> Opened:
    """Find all parts of a request; what is quick to refuse comes first.

    Raises:
        CheckpointError: a run holds no dictionary.
        AnalyzeError: the runs are of different models or write one site, or the prompt does not fit
            the model.
        LanguageModelError: there is no such model, or no tokenizer for the prompt.
    """
    given = None if config.tokens_file is None else ids_of_file(config.tokens_file)
    if config.tokens is not None:
        given = parse_ids("tokens", config.tokens)
    dictionaries = [load(run) for run in config.runs]
    _require_together(config.runs, dictionaries)
    shape = dictionaries[0].config
    subject = Subject.find(config.model, revisions={shape.base_model: shape.base_revision})
    if shape.base_model not in (None, subject.path.name, subject.id):
        report(f"the runs are of {shape.base_model}; taking {subject.id} for the same model")
    tokenizer = subject.tokenizer(needed=given is None)
    ids = prompt_ids(config.prompt or "", tokenizer) if given is None else given
    require_readable(ids, subject.n_vocab, subject.longest)
    if len(ids) < LEAST_TOKENS:
        raise AnalyzeError(f"the prompt has {len(ids)} token; a trace takes {LEAST_TOKENS} or more")
    return Opened(
        config=config, subject=subject, tokenizer=tokenizer, ids=ids, dictionaries=dictionaries
    )


def _require_together(runs: tuple[Path, ...], dictionaries: list[Dictionary]) -> None:
    """Raise AnalyzeError unless dictionaries are of one model and write sites of their own."""
    places: dict[Any, Path] = {}
    first = dictionaries[0].config
    for run, dictionary in zip(runs, dictionaries, strict=True):
        config = dictionary.config
        layer_of(dictionary, run)
        for what in ("base_model", "base_revision"):
            ours, theirs = getattr(first, what), getattr(config, what)
            if None not in (ours, theirs) and _plain(ours) != _plain(theirs):
                name = "revision" if what == "base_revision" else "model"
                raise AnalyzeError(
                    f"{runs[0]} is of {name} {ours}, {run} of {theirs}: give runs of one {name}"
                )
        for site in config.ports.writes:
            if site in places:
                raise AnalyzeError(f"{places[site]} and {run} both write {site}; give one of them")
            places[site] = run


def _plain(name: str) -> str:
    """Return a model's name without the folder that a file lies in: shared runs have it so."""
    return Path(name).name if name.endswith(".gguf") else name


def _run_facts(run: Path, dictionary: Dictionary) -> dict[str, Any]:
    config = dictionary.config
    return {
        "run": str(run),
        "name": run.name,
        "kind": config.kind,
        "layer": config.layer,
        "place": config.place,
        "reads": [str(site) for site in config.ports.reads],
        "writes": [str(site) for site in config.ports.writes],
        "n_features": config.n_features,
        "n_qk_heads": getattr(config, "n_qk_heads", None),
        "weights_sha256": weights_sha256(run),
    }
