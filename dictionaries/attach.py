"""Dictionaries in place of what they stand in for, in a language model that runs.

The model computes as ever, and a dictionary's output takes the place of the activations at the site
that it writes before the model goes on with them. Several are blocks within blocks, of any kinds
and layers, and what was attached first acts first where two meet:

    with lorsa_12.attach(model), transcoder_12.attach(model), sae_12.attach(model):
        logits = model(input_ids=ids, use_cache=False).logits
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import AttachError, LorsaError
from ..language.blocks import text_config
from ..language.edit import changed, places_of, watched
from .config import DictionaryConfig


@contextmanager
def attached(
    dictionary: nn.Module, config: DictionaryConfig, model: Any, layer: int | None = None
) -> Iterator[None]:
    """Run a language model with a dictionary in its place; see `Dictionary.attach`."""
    at = config.layer if layer is None else layer
    if at is None:
        raise AttachError(f"the {config.noun} does not say at which layer it lies; give layer=")
    (read,), (written,) = config.ports_at(at)
    places = places_of(model, {read, written})
    require_stand_in(config, model)
    given: list[Tensor] = []

    def see(x: Tensor) -> None:
        given[:] = [x]

    def stand_in(y: Tensor) -> Tensor:
        x = y if read == written else given.pop()
        _require_device(dictionary, config, x)
        y_hat: Tensor = dictionary(x)
        return y_hat

    with ExitStack() as hooks:
        if read != written:
            hooks.enter_context(watched(places[read], see, whole=config.reads_sequences))
        hooks.enter_context(changed(places[written], stand_in))
        yield


def require_stand_in(config: DictionaryConfig, model: Any) -> None:
    """Raise AttachError if a dictionary can stand in for nothing of a model.

    Either their widths differ, or it does not read one of the model's sites.
    """
    require_layer_input(config)
    width = text_config(model).hidden_size
    if width != config.d_model:
        raise AttachError(
            f"the {config.noun} is of {config.base_model} (d_model {config.d_model}); the "
            f"model given has d_model {width}"
        )


def require_layer_input(
    config: DictionaryConfig, run: Path | None = None, error: type[LorsaError] = AttachError
) -> None:
    """Raise an error if a dictionary reads something else than a site of a language model.

    Args:
        config: of the dictionary.
        run: where it lies, for the message.
        error: kind to raise.
    """
    if config.hook_in is not None:
        raise error(
            f"{run or f'the {config.noun}'} reads {config.hook_in}, not the layer's input after "
            f"the norm's weight; type: lorsa convert {run or 'LORSA'} FOLDER --model MODEL"
        )


def _require_device(dictionary: nn.Module, config: DictionaryConfig, x: Tensor) -> None:
    """Raise AttachError if a dictionary is on another device than the activations it reads."""
    device, wanted = str(next(dictionary.parameters()).device), str(x.device)
    if device != wanted:
        raise AttachError(
            f"the {config.noun} is on {device}, its layer on {wanted}; move it: "
            f"{config.kind}.to({wanted!r})"
        )
