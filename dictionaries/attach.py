"""Lorsas in place of attention layers, in a language model that runs.

The layer is computed as ever, and its output is replaced before the model goes on with it. Lorsas
in several layers are blocks within blocks:

    with lorsa_3.attach(model), lorsa_12.attach(model):
        logits = model(input_ids=ids, use_cache=False).logits
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import AttachError, LorsaError
from ..language.blocks import attention_sites, text_config
from ..language.edit import replaced
from .config import DictionaryConfig
from .dictionary import Dictionary


@contextmanager
def attached(lorsa: Dictionary, model: Any, layer: int | None = None) -> Iterator[None]:
    """Run a language model with a Lorsa in place of a layer's attention; see `Lorsa.attach`."""
    config = lorsa.config
    at = config.layer if layer is None else layer
    if at is None:
        raise AttachError("the Lorsa does not say which layer it replaces; give layer=")
    (site,) = attention_sites(model, [at])
    require_stand_in(config, model)

    def stand_in(x: Tensor) -> Tensor:
        _require_device(lorsa, x)
        y_hat: Tensor = lorsa(x)
        return y_hat

    with replaced(site, stand_in):
        yield


def require_stand_in(config: DictionaryConfig, model: Any) -> None:
    """Raise AttachError if a Lorsa can stand in for no layer of a model.

    Either their widths differ, or the Lorsa does not read a layer's input.
    """
    require_layer_input(config)
    width = text_config(model).hidden_size
    if width != config.d_model:
        raise AttachError(
            f"the Lorsa is of {config.base_model} (d_model {config.d_model}); the "
            f"model given has d_model {width}"
        )


def require_layer_input(
    config: DictionaryConfig, run: Path | None = None, error: type[LorsaError] = AttachError
) -> None:
    """Raise an error if a Lorsa reads something else than its layer's input after the norm.

    Args:
        config: of the Lorsa.
        run: where it lies, for the message.
        error: kind to raise.
    """
    if config.hook_in is not None:
        raise error(
            f"{run or 'the Lorsa'} reads {config.hook_in}, not the layer's input after the norm's "
            f"weight; type: lorsa convert {run or 'LORSA'} FOLDER --model MODEL"
        )


def _require_device(lorsa: Dictionary, x: Tensor) -> None:
    """Raise AttachError if a Lorsa is on another device than the activations that it reads."""
    device, wanted = str(lorsa.W_O.device), str(x.device)
    if device != wanted:
        raise AttachError(
            f"the Lorsa is on {device}, its layer on {wanted}; move it: lorsa.to({wanted!r})"
        )
