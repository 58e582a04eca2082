"""Lorsas from and for other tools."""

from .config import ConvertConfig
from .convert import Converted, convert
from .errors import ExchangeError

__all__ = ["ConvertConfig", "Converted", "ExchangeError", "convert"]
