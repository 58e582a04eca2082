"""Lorsas shared with others: on the Hugging Face Hub, or in a folder laid out like there."""

from .config import PushConfig
from .errors import PublishError
from .push import Pushed, push

__all__ = ["PublishError", "PushConfig", "Pushed", "push"]
