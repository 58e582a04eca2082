"""A server on loopback that speaks the protocol of chat completions, well or badly."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self


class Answer(NamedTuple):
    """What the stub sends back."""

    body: str
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012 (never changed)
    after_s: float = 0.0


def says(text: object, *, usage: bool = True, **choice: Any) -> Answer:
    """A model's reply: a text, or an object as JSON."""
    content = text if isinstance(text, str) else json.dumps(text)
    body: dict[str, Any] = {"choices": [{"message": {"content": content}, **choice}]}
    if usage:
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
    return Answer(json.dumps(body))


def obliging(prompt: str) -> Answer:
    """Explain, and find that the head fires nowhere."""
    if '{"explanation"' in prompt:
        return says({"explanation": f"reads <b>{len(prompt)}</b>"})
    return says({"fires": []})


class Stub(ThreadingHTTPServer):
    """Answers by `answer(prompt)` and remembers what it was sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: Callable[[str], Answer] = obliging
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.n_open = self.most_open = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_POST(self) -> None:
        stub = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with stub.lock:
            stub.bodies.append(body)
            stub.headers.append(dict(self.headers))
            stub.paths.append(self.path)
            stub.times.append(time.monotonic())
            stub.n_open += 1
            stub.most_open = max(stub.most_open, stub.n_open)
        try:
            answer = stub.answer(body["messages"][0]["content"])
            time.sleep(answer.after_s)
        finally:
            with stub.lock:
                stub.n_open -= 1
        data = answer.body.encode()
        try:
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(data)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the other side has gone

    def log_message(self, *_: object) -> None:
        """Say nothing."""
