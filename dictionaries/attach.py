"""Dictionaries in their places in a language model that runs.

What a dictionary replaces is computed as ever, and what it writes is put in its place before the
model goes on. Several dictionaries are blocks within blocks:

    with lorsa_3.attach(model), transcoder_12.attach(model):
        logits = model(input_ids=ids, use_cache=False).logits
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import AttachError, LorsaError
from ..language.blocks import text_config
from ..language.edit import Gap, gaps, replaced
from .config import DictionaryConfig


@contextmanager
def attached(
    dictionary: nn.Module, config: DictionaryConfig, model: Any, layer: int | None = None
) -> Iterator[None]:
    """Run a language model with a dictionary in its place; see `Dictionary.attach`."""
    at = config.layer if layer is None else layer
    if at is None:
        raise AttachError(f"the {config.noun} does not say at which layer it lies; give layer=")
    gap = stand_in_gap(config, model, at)
    with replaced(gap, on_its_device(dictionary, config)):
        yield


def stand_in_gap(config: DictionaryConfig, model: Any, layer: int) -> Gap:
    """Return a dictionary's place in a model.

    Raises:
        AttachError: there is no such layer or site, the widths differ, or the dictionary does not
            read what the site has.
    """
    (gap,) = gaps(model, [config.ports_at(layer)])
    require_site_read(config)
    require_width(config, model)
    return gap


def require_width(config: DictionaryConfig, model: Any) -> None:
    """Raise AttachError unless a dictionary is as wide as a model."""
    width = text_config(model).hidden_size
    if width != config.d_model:
        raise AttachError(
            f"the {config.noun} is of {config.base_model} (d_model {config.d_model}); the "
            f"model given has d_model {width}"
        )


def require_site_read(
    config: DictionaryConfig, run: Path | None = None, error: type[LorsaError] = AttachError
) -> None:
    """Raise an error if a dictionary reads something else than the site that its kind reads.

    Args:
        config: of the dictionary.
        run: where it lies, for the message.
        error: kind to raise.
    """
    if config.hook_in is not None:
        what = "layer's input after the norm's weight" if config.kind == "lorsa" else "site itself"
        remedy = ""
        if config.kind == "lorsa":  # the one kind whose input can be changed
            remedy = f"; type: lorsa convert {run or 'LORSA'} FOLDER --model MODEL"
        raise error(f"{run or f'the {config.noun}'} reads {config.hook_in}, not the {what}{remedy}")


def on_its_device(dictionary: nn.Module, config: DictionaryConfig) -> Callable[[Tensor], Tensor]:
    """Return a dictionary as a function; AttachError if it is given what is on another device."""

    def stand_in(x: Tensor) -> Tensor:
        device, wanted = str(next(dictionary.parameters()).device), str(x.device)
        if device != wanted:
            what = "its layer" if config.kind == "lorsa" else "what it reads"
            raise AttachError(
                f"the {config.noun} is on {device}, {what} on {wanted}; move it: "
                f"{config.kind}.to({wanted!r})"
            )
        y_hat: Tensor = dictionary(x)
        return y_hat

    return stand_in
