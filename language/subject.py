"""The one door to a language model: found without its weights, loaded as far as asked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ..errors import LanguageModelError
from .aliases import ModelPath, resolve
from .blocks import Block
from .choices import DEVICES, MODEL_DTYPES
from .device import choose_device
from .families import attention_names, attention_of, blocks_of
from .load import attempt, load_config, load_model
from .strangers import own_code
from .traced import Found

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True, eq=False)
class Subject:
    """A language model as its configuration describes it; no weights are loaded to know this."""

    path: ModelPath
    """Place at which transformers finds the model"""
    config: Any
    """transformers' config"""

    @classmethod
    def find(
        cls, name: str, *, revisions: Mapping[str | None, str | None] | None = None
    ) -> "Subject":
        """Find a language model and read its configuration.

        Args:
            name: an alias (qwen2-7b), a Hub id, a folder, or a .gguf file.
            revisions: commit to take, by Hub id; a model that is not named, or whose commit is
                None, is taken at its present one.

        Raises:
            LanguageModelError: there is no such model, or its configuration cannot be read.
        """
        path = resolve(name)
        path = path._replace(revision=(revisions or {}).get(path.name) or path.revision)
        return cls(path, load_config(path))

    @property
    def id(self) -> str:
        """Return what names this model again: its Hub id, folder or file."""
        return self.path.id

    @property
    def d_model(self) -> int:
        """Return the width of the residual stream."""
        return int(self._text.hidden_size)

    @property
    def d_mlp(self) -> int | None:
        """Return how many neurons an MLP has, where the configuration says so."""
        return getattr(self._text, "intermediate_size", None)

    @property
    def n_layers(self) -> int:
        """Return how many layers the model has."""
        return int(self._text.num_hidden_layers)

    @property
    def n_vocab(self) -> int:
        """Return how many token ids the model knows."""
        return int(self._text.vocab_size)

    @property
    def longest(self) -> int | None:
        """Return how many tokens the model reads at most; None where nothing limits them."""
        return getattr(self._text, "max_position_embeddings", None)

    @cached_property
    def found(self) -> dict[int, Found]:
        """What computes attention in each layer, where there is such a module.

        Raises:
            LanguageModelError: it is no causal language model, or has no attention that is found.
        """
        return attention_of(self.config)

    @property
    def attention(self) -> dict[int, str]:
        """Return the layers whose attention can be stored, with their modules' dotted names.

        Raises:
            LanguageModelError: there is none.
        """
        return attention_names(self.found)

    @cached_property
    def blocks(self) -> dict[int, Block]:
        """Sites of every layer; none where they do not show without weights."""
        return blocks_of(self.config)

    @property
    def has_tokenizer(self) -> bool:
        """Return whether there is a tokenizer; a folder may hold nothing but config.json."""
        if self.path.gguf_file is not None or not Path(self.path.name).is_dir():
            return True
        return any((Path(self.path.name) / name).is_file() for name in TOKENIZER_FILES)

    @property
    def has_weights(self) -> bool:
        """Return whether the weights are on this machine."""
        return self.path.has_weights

    def left_out(self) -> list[str]:
        """Return a line for each kind of code that the model's files name and that is not run."""
        lines = []
        if files := own_code(self.config):
            lines.append(
                f"config.json of {self.id} names code of its own ({', '.join(files)}), which is "
                f"not run: transformers' own {self._text.model_type} is used"
            )
        if files := own_code(self._tokenizer_settings()):
            lines.append(
                f"tokenizer_config.json of {self.id} names code of its own ({', '.join(files)}), "
                "which is not run: transformers' own tokenizer is used"
            )
        return lines

    def _tokenizer_settings(self) -> dict[str, Any]:
        """Return what a tokenizer_config.json says; nothing where there is none."""
        name, gguf_file, revision, offline = self.path
        if gguf_file is not None:
            return {}
        try:
            return get_tokenizer_config(name, revision=revision, local_files_only=offline)
        except Exception:  # whatever a damaged file leads to; loading the tokenizer names it
            return {}

    def tokenizer(self, *, needed: bool = True) -> Any:
        """Return transformers' tokenizer; without one, None where it is not needed.

        Raises:
            LanguageModelError: it has none, and one is needed.
        """
        try:
            tokenizer = attempt(self.path, _working_tokenizer, what="the tokenizer of ")
            if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
                # transformers makes an empty one where there are no files
                raise LanguageModelError(
                    f"model {self.id} has no tokenizer; add its tokenizer.json"
                )
        except LanguageModelError:
            if needed:
                raise
            return None
        return tokenizer

    def load(
        self, *, devices: Sequence[str], dtype: str = "auto", n_layers: int | None = None
    ) -> Any:
        """Load the model for inference.

        Args:
            devices: "cpu", or GPUs, of which it takes as many as it needs.
            dtype: of weights and arithmetic, one of MODEL_DTYPES; "auto" is the model's own on a
                GPU and float32 on a CPU.
            n_layers: how many of the first layers to load; None loads all.

        Returns:
            transformers' model, in eval mode.

        Raises:
            LanguageModelError: it cannot be loaded, its files lack weights, or the GPUs do not
                hold it.
        """
        return load_model(self.path, self.config, dtype=dtype, devices=devices, n_layers=n_layers)

    def facts(self, model: Any) -> dict[str, Any]:
        """Return the facts of the whole model, as JSON-able data for a store's manifest.

        Args:
            model: as `load` returned it; it may have the first layers only.
        """
        return {
            "id": self.id,
            "revision": self.path.revision,
            "architecture": type(model).__name__,
            "model_type": self._text.model_type,
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "n_vocab": self.n_vocab,
            "dtype": str(model.dtype).removeprefix("torch."),
            "attn_implementation": model.config.get_text_config()._attn_implementation,
            "transformers_version": transformers.__version__,
        }

    @property
    def _text(self) -> Any:
        """Return the configuration of the part that reads text."""
        return self.config.get_text_config()


def _working_tokenizer(name: str, **settings: Any) -> Any:
    """Load a tokenizer and use it once: some settings are only read then."""
    tokenizer = AutoTokenizer.from_pretrained(name, **settings)
    tokenizer("a")
    return tokenizer


class ModelAndTokenizer(NamedTuple):
    """A language model and its tokenizer, from `load_language_model`."""

    model: Any
    """transformers' causal language model, in eval mode on its device"""
    tokenizer: Any
    """transformers' tokenizer; None where the model has none"""


def load_language_model(
    model: str, *, device: str = "auto", dtype: str = "auto"
) -> ModelAndTokenizer:
    """Load a language model and its tokenizer, as `--model` of every command does.

    Args:
        model: an alias (qwen2-7b), a Hub id, a folder, or a .gguf file.
        device: "auto", "cpu" or "cuda".
        dtype: of weights and arithmetic: "auto" (the model's own on a GPU, float32 on a CPU),
            "float32", "bfloat16" or "float16".

    Raises:
        ValueError: device or dtype is none of these.
        LanguageModelError: there is no such model or no GPU, or it cannot be loaded.
    """
    for name, value, allowed in (("device", device, DEVICES), ("dtype", dtype, MODEL_DTYPES)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
    try:
        devices = [choose_device(device)]
    except ValueError as error:
        raise LanguageModelError(str(error)) from None
    subject = Subject.find(model)
    tokenizer = subject.tokenizer(needed=False)
    return ModelAndTokenizer(subject.load(devices=devices, dtype=dtype), tokenizer)
