"""A page over HTTP, to this machine alone.

Only files inside the page's folder are served, without links that lead outside. Only requests that
name this machine are answered, so that no other site in the same browser can read the page.
"""

import errno
import sys
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..errors import AnalyzeError
from ..stop import stop_at_once

HOST = "127.0.0.1"
PORT = 8321


class PageServer:
    """A server of one folder at http://127.0.0.1:PORT/."""

    def __init__(self, folder: Path, port: int = PORT) -> None:
        """Bind the port.

        Args:
            folder: served, with all inside.
            port: 0 takes any that is free.

        Raises:
            AnalyzeError: the port cannot be bound.
        """
        handler = partial(_Handler, directory=str(folder.resolve()))
        try:
            self._server = _Server((HOST, port), handler)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "is taken" if taken else f"cannot be used ({error.strerror})"
            raise AnalyzeError(f"port {port} {reason}; choose another --port") from None
        self.url = f"http://{HOST}:{self._server.server_port}/"

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM."""
        try:
            with stop_at_once():
                self._server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            pass
        finally:
            self._server.server_close()

    def stop(self) -> None:
        """End `run` from another thread."""
        self._server.shutdown()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report no error of a browser that leaves in the middle of an answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(SimpleHTTPRequestHandler):
    server_version = "lorsa"
    sys_version = ""

    def send_head(self) -> Any:
        """Open the requested file, or answer with a line why not."""
        port = self.connection.getsockname()[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            return self.send_error(HTTPStatus.FORBIDDEN, "this page is for this machine alone")
        if not self._is_inside():
            return self.send_error(HTTPStatus.FORBIDDEN, "that is outside of the page's folder")
        return super().send_head()

    def list_directory(self, path: Any) -> Any:
        """Refuse: a page has no lists of files."""
        return self.send_error(HTTPStatus.NOT_FOUND, "no such file")

    def end_headers(self) -> None:
        """Keep the browser from guessing types and from caching."""
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with one line of text."""
        text = f"{int(code)} {message or HTTPStatus(code).phrase}\n".encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Log no requests."""

    def _is_inside(self) -> bool:
        asked = unquote(urlsplit(self.path).path)
        if ".." in asked.replace("\\", "/").split("/") or "\0" in asked:
            return False
        return Path(self.translate_path(self.path)).resolve().is_relative_to(self.directory)
