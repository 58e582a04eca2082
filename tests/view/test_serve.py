import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
from lorsa import cli
from lorsa.errors import AnalyzeError
from lorsa.view.serve import PageServer
from typer.testing import CliRunner

from reading import make_analysis


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    folder = tmp_path / "page"
    folder.mkdir()
    (folder / "index.html").write_text("the page")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "inner").mkdir()
    found = PageServer(folder, 0)
    thread = Thread(target=found.run)
    thread.start()
    yield found
    found.stop()
    thread.join()


def _ask(server: PageServer, path: str, *, method: str = "GET", host: str | None = None) -> str:
    """Send a request as it is, so that no client tidies its path."""
    port = int(server.url.rstrip("/").rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as line:
        asked = f"{method} {path} HTTP/1.1\r\nHost: {host or f'127.0.0.1:{port}'}\r\n"
        line.sendall(f"{asked}Connection: close\r\n\r\n".encode())
        found = b""
        while part := line.recv(65536):
            found += part
    return found.decode()


def test_page_is_given_out(server: PageServer) -> None:
    assert _ask(server, "/").endswith("\r\n\r\nthe page")
    assert " 200 " in _ask(server, "/index.html?x=1", method="HEAD").splitlines()[0]
    assert "nosniff" in _ask(server, "/")


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "/%2e%2e%2f%2e%2e%2fetc/passwd",
        "/inner/..%5c..%5csecret.txt",
        "/link.txt",
        "/x%00y",
    ],
)
def test_what_lies_outside_is_refused(server: PageServer, path: str) -> None:
    answer = _ask(server, path)
    assert answer.splitlines()[0].split(" ", 1)[1] in (
        "403 that is outside of the page's folder",
        "403 Forbidden",
    )
    assert "root:" not in answer
    assert "\r\n\r\nsecret" not in answer
    assert len(answer.split("\r\n\r\n", 1)[1].splitlines()) == 1


@pytest.mark.parametrize("path", ["/nothing.js", "/inner/", "//etc/passwd", "/etc/passwd"])
def test_what_is_not_there_is_a_line(server: PageServer, path: str) -> None:
    answer = _ask(server, path)
    assert " 404 " in answer.splitlines()[0]
    assert len(answer.split("\r\n\r\n", 1)[1].splitlines()) == 1


def test_a_browser_that_leaves_is_no_error(
    server: PageServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It left a traceback in the terminal."""
    (tmp_path / "page" / "large.js").write_bytes(bytes(1 << 26))
    port = int(server.url.rstrip("/").rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as line:
        line.sendall(f"GET /large.js HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        line.recv(100)
        reset = struct.pack("ii", 1, 0)  # closing tells the server at once
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    time.sleep(0.5)
    assert _ask(server, "/").endswith("the page")
    assert capfd.readouterr().err == ""


def test_other_methods_and_other_hosts_are_refused(server: PageServer) -> None:
    assert " 501 " in _ask(server, "/", method="POST").splitlines()[0]
    assert " 403 " in _ask(server, "/", host="evil.example").splitlines()[0]


def test_taken_port_is_reported(server: PageServer, tmp_path: Path) -> None:
    port = int(server.url.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(AnalyzeError, match=f"port {port} is taken; choose another --port"):
        PageServer(tmp_path, port)


def heed_ctrl_c() -> None:
    """Undo what a shell does to commands in its background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_serving_with_zero(number: signal.Signals, tmp_path: Path) -> None:
    make_analysis(tmp_path / "analysis")
    words = ["view", str(tmp_path), "--serve", "--port", "0", "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "lorsa", *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
        preexec_fn=heed_ctrl_c,
    ) as process:
        try:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["url"].startswith("http://127.0.0.1:")
            time.sleep(0.5)  # until it serves
            process.send_signal(number)
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_view_tells_where_the_page_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: bool(opened.append(url)))
    make_analysis(tmp_path / "analysis")
    result = CliRunner().invoke(cli.app, ["view", str(tmp_path), "--open"])
    assert result.exit_code == 0, result.output
    for part in (str(tmp_path / "page/index.html"), "24", "files", "none found here"):
        assert part in result.stdout
    assert opened == [(tmp_path / "page/index.html").as_uri()]


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["view", "nothing"], 1, "nothing/analysis is not there: lorsa analyze nothing"),
        (["view", "nothing", "--port", "80"], 2, "--port does nothing without --serve"),
    ],
)
def test_wrong_requests_are_a_line(
    words: list[str], code: int, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == code
    assert line in result.stderr
    assert len(result.stderr.splitlines()) == 1
