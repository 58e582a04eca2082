"""The page: an analysis as a folder of files that any browser opens, without a server."""

from .build import Page, build_page
from .serve import PageServer

__all__ = ["Page", "PageServer", "build_page"]
