"""lorsa ablate."""

from typing import Annotated, Any

from .common import Json, perform
from .options import FromConfig, Given
from .settings import make_config


def ablate(
    given: Annotated[Given, FromConfig("circuits.config.AblateConfig", arguments=("run",))],
    as_json: Json = False,
) -> None:
    """Ablate or scale heads in the language model, and see what it then predicts for a prompt.

    Example: lorsa ablate runs/layer-12 --heads 17,301 --model smollm2-135m --prompt "Once upon"
    """

    def work() -> dict[str, Any]:
        from ..circuits.ablate import ablate as change
        from ..circuits.config import AblateConfig
        from ..display.bars import say

        return change(make_config(AblateConfig, given), report=say).to_dict()

    perform("ablate", work, as_json)
