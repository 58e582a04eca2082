"""A server on loopback that speaks the Hugging Face Hub's protocol, as much of it as Lorsas need.

huggingface_hub reads HF_ENDPOINT when it is imported, so what talks to the stub runs in a process
of its own: `python hub_stub.py '[step, ...]'` does steps one after the other and prints a list of
what came of each.

    {"lorsa": ["push", ...]}                     a command: exit code, stdout, stderr
    {"load": "me/lorsas", "save": folder, ...}   Lorsa.from_pretrained, and save_pretrained
    {"env": {"HF_TOKEN": ...}, ...}              beside either: its token
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import unquote, urlsplit

import yaml

WRITER, READER = "hf_writer", "hf_reader"
USERS = {WRITER: "me", READER: "you"}


class Repo(NamedTuple):
    """A repository: its commits hold all files of it, each as content and whether it is LFS's."""

    private: bool
    gated: bool
    commits: dict[str, dict[str, tuple[bytes, bool]]]
    branches: dict[str, list[str]]
    """Commits of each, oldest first"""
    messages: dict[str, str]

    def commit(self, branch: str, files: dict[str, tuple[bytes, bool]], message: str) -> str:
        sha = hashlib.sha1(f"{id(self)}{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[sha] = files
        self.messages[sha] = message
        self.branches.setdefault(branch, []).append(sha)
        return sha

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return {path: data for path, (data, _) in self.commits[self.branches[branch][-1]].items()}


class Hub(ThreadingHTTPServer):
    """Repositories in memory, and what was asked of them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        """Method and path of each request"""
        self.down: set[str] = set()
        """Repositories of which all is answered with 503"""
        self.gone: set[str] = set()
        """Repositories of which nothing is answered"""
        self.meanwhile: Callable[[str], object] = lambda name: None
        """Is told the name of a repository between the look at it and the commit to it."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def make(self, name: str, *, private: bool = False, gated: bool = False) -> Repo:
        repo = self.repos[name] = Repo(private, gated, {}, {}, {})
        repo.commit("main", {".gitattributes": (b"*.safetensors filter=lfs\n", False)}, "initial")
        return repo

    def put(self, name: str, files: dict[str, bytes], **kind: bool) -> Repo:
        """Make a repository of files."""
        repo = self.make(name, **kind)
        repo.commit("main", {p: (d, p.endswith(".safetensors")) for p, d in files.items()}, "files")
        return repo

    def fetched(self) -> list[str]:
        """Return the files that were asked for."""
        paths = [r.partition(" /")[2] for r in self.requests if "/resolve/" in r]
        return sorted({path.split("/", 4)[4] for path in paths})

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _RefusedError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._do()

    do_HEAD = do_POST = do_PUT = do_GET

    def _do(self) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.server.requests.append(f"{self.command} {url.path}")
        self.body = self._read()
        if any(name in url.path for name in self.server.gone):
            self.close_connection = True
            return
        try:
            if any(name in url.path for name in self.server.down):
                raise _RefusedError(503)
            self._answer(parts)
        except _RefusedError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self._send(error.status, b"{}", {k: v for k, v in headers.items() if v})

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    @property
    def user(self) -> str | None:
        word = self.headers.get("Authorization")
        if word is None:
            return None
        user = USERS.get(word.removeprefix("Bearer "))
        if user is None:
            raise _RefusedError(401, message="Invalid credentials in Authorization header")
        return user

    def _answer(self, parts: list[str]) -> None:
        user = self.user
        match parts:
            case ["api", "repos", "create"]:
                self._create(json.loads(self.body), user)
            case ["api", "validate-yaml"]:
                self._check_card(json.loads(self.body)["content"])
            case ["api", "models", owner, name, *rest]:
                self._api(f"{owner}/{name}", rest, user)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self._require_writer(owner, user)
                self._batch()
            case ["lfs", oid]:
                self._take(oid)
            case ["cdn", oid]:
                self._send(200, self.server.lfs[oid], {"ETag": f'"{oid}"'})
            case [owner, name, "resolve", revision, *path]:
                self._resolve(self._repo(f"{owner}/{name}", user), revision, "/".join(path))
            case _:
                raise _RefusedError(404)

    def _repo(self, name: str, user: str | None) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and user != name.partition("/")[0]):
            raise _RefusedError(401 if user is None else 404, "RepoNotFound")
        return repo

    def _require_writer(self, owner: str, user: str | None) -> None:
        if user != owner:
            raise _RefusedError(401 if user is None else 403, message="you may not write here")

    def _create(self, asked: dict[str, Any], user: str | None) -> None:
        self._require_writer(asked["organization"], user)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repos:
            raise _RefusedError(409)
        self.server.make(name, private=asked.get("visibility") == "private" or asked.get("private"))
        self._json({"url": f"{self.server.url}/{name}"})

    def _check_card(self, text: str) -> None:
        data = yaml.safe_load(text.split("---\n")[1])
        good = isinstance(data, dict) and all(isinstance(tag, str) for tag in data["tags"])
        self._json({"errors": [] if good else [{"message": "bad tags"}], "warnings": []})

    def _api(self, name: str, rest: list[str], user: str | None) -> None:
        repo = self._repo(name, user)
        match rest:
            case [] | ["revision", _]:
                sha = self._sha(repo, rest[1] if rest else "main")
                self._json({"id": name, "sha": sha, "private": repo.private, "siblings": [
                    {"rfilename": path} for path in repo.commits[sha]
                ]})  # fmt: skip
            case ["tree", revision, *_]:
                files = repo.commits[self._sha(repo, revision)]
                self._json([_entry(path, *file) for path, file in files.items()])
            case ["branch", branch]:
                self._require_writer(name.partition("/")[0], user)
                repo.branches[branch] = list(repo.branches["main"])
                self._json({})
            case ["preupload", _]:
                self._require_writer(name.partition("/")[0], user)
                paths = [file["path"] for file in json.loads(self.body)["files"]]
                modes = {p: "lfs" if p.endswith(".safetensors") else "regular" for p in paths}
                self._json({"files": [
                    {"path": p, "uploadMode": mode, "shouldIgnore": False}
                    for p, mode in modes.items()
                ]})  # fmt: skip
            case ["commit", branch]:
                self._require_writer(name.partition("/")[0], user)
                self.server.meanwhile(name)
                self._commit(repo, branch, name)
            case _:
                raise _RefusedError(404)

    def _sha(self, repo: Repo, revision: str) -> str:
        if revision in repo.branches:
            return repo.branches[revision][-1]
        if revision not in repo.commits:
            raise _RefusedError(404, "RevisionNotFound")
        return revision

    def _batch(self) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.server.url}/lfs/{wanted['oid']}"}
            actions = {} if wanted["oid"] in self.server.lfs else {"actions": {"upload": upload}}
            objects.append({**wanted, **actions})
        self._json({"transfer": "basic", "objects": objects})

    def _take(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _RefusedError(400, message="the checksum is another")
        self.server.lfs[oid] = self.body
        self._json({})

    def _commit(self, repo: Repo, branch: str, name: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.branches[branch][-1]):
            raise _RefusedError(412, message="A commit has happened since")
        files = dict(repo.commits[repo.branches[branch][-1]])
        for line in lines[1:]:
            value = line["value"]
            is_lfs = line["key"] == "lfsFile"
            data = self.server.lfs[value["oid"]] if is_lfs else base64.b64decode(value["content"])
            files[value["path"]] = (data, is_lfs)
        sha = repo.commit(branch, files, header["summary"])
        where = f"{self.server.url}/{name}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": where})

    def _resolve(self, repo: Repo, revision: str, path: str) -> None:
        if repo.gated:
            raise _RefusedError(403, "GatedRepo")
        sha = self._sha(repo, revision)
        if path not in repo.commits[sha]:
            raise _RefusedError(404, "EntryNotFound")
        data, is_lfs = repo.commits[sha][path]
        headers = {"X-Repo-Commit": sha}
        if not is_lfs:
            etag = hashlib.sha1(data).hexdigest()
            return self._send(200, data, headers | {"ETag": f'"{etag}"'})
        oid = hashlib.sha256(data).hexdigest()
        self.server.lfs[oid] = data
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        elsewhere = self.server.url.replace("127.0.0.1", "localhost")
        return self._send(302, b"", headers | {"Location": f"{elsewhere}/cdn/{oid}"})

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _entry(path: str, data: bytes, is_lfs: bool) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data)}
    entry["oid"] = hashlib.sha1(data).hexdigest()
    if is_lfs:
        oid = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
    return entry


def do(
    steps: list[dict[str, Any]], *, url: str, home: Path, token: str | None = WRITER, **env: str
) -> list[dict[str, Any]]:
    """Do steps in a process of their own; return what came of each.

    Args:
        steps: see above.
        url: of the Hub.
        home: HF_HOME: cache and, without a token, nothing else.
        token: in HF_TOKEN.
        env: more variables.
    """
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    keep |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    keep |= {"HF_HUB_DISABLE_TELEMETRY": "1"} | ({} if token is None else {"HF_TOKEN": token})
    command = [sys.executable, __file__, json.dumps(steps, default=str)]
    done = subprocess.run(command, env=keep | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return told


def _step(step: dict[str, Any]) -> dict[str, Any]:
    from lorsa import Lorsa, cli
    from lorsa.errors import CheckpointError
    from typer.testing import CliRunner

    before = dict(os.environ)
    for name, value in step.pop("env", {}).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    try:
        if "lorsa" in step:
            result = CliRunner().invoke(cli.app, [str(word) for word in step["lorsa"]])
            return {"code": result.exit_code, "out": result.stdout, "err": result.stderr}
        save = step.pop("save", None)
        try:
            lorsa = Lorsa.from_pretrained(step.pop("load"), **step)
        except CheckpointError as error:
            return {"error": str(error)}
        if save is not None:
            lorsa.save_pretrained(save)
        return {"layer": lorsa.config.layer}
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    print("\n" + json.dumps([_step(step) for step in json.loads(sys.argv[1])]))
