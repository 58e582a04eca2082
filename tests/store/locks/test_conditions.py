"""Servers that ignore conditional writes, by which processes agree who writes a store."""

import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from lorsa.errors import StoreError
from lorsa.store import waiting
from lorsa.store.bucket import BucketPath
from lorsa.store.locks import lease
from lorsa.store.locks.lock import require_conditions, take_lock
from lorsa.store.places import place
from lorsa.store.waiting import waiting_for
from small import create, make_manifest

pytest.importorskip("obstore", reason="obstore is not installed (lorsa[s3])")


@contextmanager
def _serve(monkeypatch: pytest.MonkeyPatch, *ignored: str) -> Iterator[BucketPath]:
    """Serve a bucket that ignores some headers of what is put; yield a place in it."""
    moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    import boto3
    from werkzeug.serving import make_server

    inner = moto.DomainDispatcherApplication(moto.create_backend_app)

    def app(env: dict[str, Any], start: Any) -> Any:
        if env["REQUEST_METHOD"] == "PUT":
            for name in ignored:
                env.pop(name, None)
        return inner(env, start)

    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url, bucket = f"http://127.0.0.1:{server.server_port}", f"lorsa-{uuid.uuid4().hex[:8]}"
    for name, value in (
        ("AWS_ENDPOINT_URL", url),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
        ("AWS_REGION", "us-east-1"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ALLOW_HTTP", "true"),
    ):
        monkeypatch.setenv(name, value)
    try:
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket=bucket)
        found = place(f"s3://{bucket}/acts")
        assert isinstance(found, BucketPath)
        yield found
    finally:
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("ignored", "named"),
    [
        (["HTTP_IF_NONE_MATCH"], "If-None-Match"),
        (["HTTP_IF_MATCH"], "If-Match"),
        (["HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"], "If-None-Match"),
    ],
)
def test_a_server_that_ignores_conditions_is_found_out(
    monkeypatch: pytest.MonkeyPatch, ignored: list[str], named: str
) -> None:
    """Conditions were assumed: two harvests wrote one store, and both ended well."""
    with _serve(monkeypatch, *ignored) as root:
        for ask in (
            lambda: require_conditions(root),
            lambda: take_lock(root, exclusive=False),
            lambda: create(root, make_manifest()),
        ):
            with pytest.raises(StoreError, match=rf"ignores conditional writes \({named}\)"):
                ask()


def test_a_server_with_conditions_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with _serve(monkeypatch) as root:
        require_conditions(root)
        assert {root.bucket} <= lease._TRIED
        lock = take_lock(root, exclusive=False)
        assert lock.claim("7") is not None
        assert lock.claim("7") is None
        lock.release()


def test_a_wait_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A process waited minutes for another's lock without a word."""
    monkeypatch.setattr(waiting, "SAY_AFTER_S", 0.01)
    monkeypatch.setattr(waiting, "POLL_S", 0.01)
    with caplog.at_level(logging.WARNING, "lorsa"):
        with waiting_for("nobody"):
            pass
        with waiting_for("the lock of acts"):
            ends = time.monotonic() + 10
            while not caplog.messages and time.monotonic() < ends:
                time.sleep(0.01)
    assert caplog.messages == ["waiting for the lock of acts, 0 s"]
