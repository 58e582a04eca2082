"""A place in an S3 bucket, with the methods of `pathlib.Path` that a store uses.

    path = BucketPath.parse("s3://bucket/acts") / "manifest.json"
    path.write_bytes(b"...")        # atomic, as every PUT of S3
    path.read_bytes()

An object that is missing raises FileNotFoundError as on a disk. Every other failure of a server or
of the network is an UnreachableError with the URL, after the retries of obstore. Folders are only
prefixes: they exist while an object is below them.

Credentials and endpoint come from the usual AWS_* variables. A process that has used a bucket must
not be forked: the copy would lack the threads of obstore.
"""

import errno
import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ..errors import StoreError, UnreachableError
from .waiting import waiting_for

if TYPE_CHECKING:
    from obstore.store import S3Store

PART_BYTES = 8 << 20
"""Bytes of a part of an upload, and of a block of a download that is not kept."""
PARTS_AT_ONCE = 4
SLOW_BYTES_PER_S = 5e6
"""Least rate of an upload that is not taken for a wait."""
_URL = re.compile(r"s3:/+([^/]+)(/.*)?")
_REMEDY = "check the URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL"


class Version(NamedTuple):
    """One version of an object."""

    content: bytes
    etag: str
    modified: float
    """Time of its last write, by the server's clock, seconds since 1970"""


@dataclass(frozen=True, slots=True, order=True)
class BucketPath:
    """Object, or folder of objects, in a bucket."""

    bucket: str
    key: str

    @classmethod
    def parse(cls, url: str) -> "BucketPath":
        """Read s3://bucket/folder, also as `Path` spells it, s3:/bucket/folder.

        Raises:
            StoreError: no bucket or no folder is named, or obstore is not installed.
        """
        match = _URL.fullmatch(url)
        parts = [part for part in (match[2] or "").split("/") if part] if match else []
        if match is None or not parts or {".", ".."} & set(parts):
            raise StoreError(f"{url} is no place for a store; use s3://BUCKET/FOLDER")
        _obstore()
        return cls(match[1], "/".join(parts))

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    def __truediv__(self, name: str) -> "BucketPath":
        return self.joinpath(name)

    def joinpath(self, *names: str) -> "BucketPath":
        """Return a place below this one."""
        return BucketPath(self.bucket, "/".join([self.key, *names]))

    @property
    def name(self) -> str:
        """Last part of the key."""
        return PurePosixPath(self.key).name

    @property
    def stem(self) -> str:
        """Last part of the key without its suffix."""
        return PurePosixPath(self.key).stem

    @property
    def parent(self) -> "BucketPath":
        """Place above this one."""
        return BucketPath(self.bucket, self.key.rpartition("/")[0])

    def relative_to(self, other: "BucketPath") -> PurePosixPath:
        """Return the relative path from another place to this one."""
        return PurePosixPath(self.key).relative_to(other.key)

    def is_symlink(self) -> bool:
        """Return False: a bucket has no links."""
        return False

    def mkdir(self, *, parents: bool = True, exist_ok: bool = True) -> None:
        """Do nothing: a folder is only a name."""

    def is_file(self) -> bool:
        """Return whether there is an object with this key."""
        return self.size() is not None

    def is_dir(self) -> bool:
        """Return whether there are objects below."""
        return next(self.iterdir(), None) is not None

    def exists(self) -> bool:
        """Return whether there is an object with this key, or any below."""
        return self.is_file() or self.is_dir()

    def size(self) -> int | None:
        """Return the bytes of an object, None if there is none."""
        try:
            with self._talk():
                return int(_obstore().head(self.client(), self.key)["size"])
        except FileNotFoundError:
            return None

    def sizes(self) -> dict["BucketPath", int]:
        """Return the bytes of every object below; a thousand objects take one request."""
        return {self / name: size for name, size in self.sizes_by_name().items()}

    def sizes_by_name(self) -> dict[str, int]:
        """Return the bytes of every object below, by its path relative to this place."""
        skip = len(self.key) + 1
        with self._talk():
            pages = _obstore().list(self.client(), self.key, chunk_size=1000)
            return {str(each["path"])[skip:]: int(each["size"]) for page in pages for each in page}

    def iterdir(self) -> Iterator["BucketPath"]:
        """Yield objects and folders right below."""
        with self._talk():
            found = _obstore().list_with_delimiter(self.client(), self.key)
        for key in [*found["common_prefixes"], *(each["path"] for each in found["objects"])]:
            yield BucketPath(self.bucket, str(key))

    def files(self) -> dict["BucketPath", int]:
        """Return the objects right below with their bytes; a thousand of them take one request."""
        with self._talk():
            found = _obstore().list_with_delimiter(self.client(), self.key)
        return {BucketPath(self.bucket, str(o["path"])): int(o["size"]) for o in found["objects"]}

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yield the objects and folders right below whose names match a pattern."""
        return (path for path in self.iterdir() if fnmatch(path.name, pattern))

    def read_bytes(self) -> bytes:
        """Return the content of an object."""
        with self._talk():
            return bytes(_obstore().get(self.client(), self.key).bytes())

    def read_text(self, encoding: str) -> str:
        """Return the content of an object as text."""
        return self.read_bytes().decode(encoding)

    def read_tail(self, n_bytes: int) -> bytes:
        """Return the last bytes of an object; all of them if it is shorter."""
        options = {"range": {"suffix": n_bytes}}
        try:
            with self._talk():
                return bytes(_obstore().get(self.client(), self.key, options=options).bytes())
        except EOFError:
            return b""

    def read_from(self, start: int) -> bytes:
        """Return the bytes of an object from an offset on; empty if it has no more."""
        try:
            with self._talk():
                options = {"range": {"offset": start}} if start else {}
                return bytes(_obstore().get(self.client(), self.key, options=options).bytes())
        except EOFError:
            return b""

    def read_blocks(self) -> Iterator[Any]:
        """Yield the content of an object block by block."""
        import numpy as np  # here, so that a config with a place imports none

        with self._talk():
            blocks = iter(_obstore().get(self.client(), self.key).stream(PART_BYTES))
        while True:
            with self._talk():
                block = next(blocks, None)
            if block is None:
                return
            yield np.frombuffer(block, dtype=np.uint8)

    def preadv(self, buffers: list[memoryview], offset: int) -> int:
        """Fill buffers from an offset of an object, by one request, as `os.preadv` of a file.

        Returns:
            Number of bytes read: 0 at the end of the object, fewer than asked for close to it.
        """
        import numpy as np

        wanted = sum(len(buffer) for buffer in buffers)
        try:
            with self._talk():
                found = _obstore().get_range(self.client(), self.key, start=offset, length=wanted)
        except EOFError:
            return 0
        data = np.frombuffer(found, dtype=np.uint8)
        first = 0
        for buffer in buffers:
            part = data[first : first + len(buffer)]
            np.frombuffer(buffer, dtype=np.uint8)[: len(part)] = part
            first += len(part)
        return len(data)

    def write_bytes(self, content: bytes) -> None:
        """Put an object; one that exists is replaced."""
        with self._talk(writing=True):
            _obstore().put(self.client(), self.key, content)

    def upload(self, file: IO[bytes]) -> None:
        """Put a file's content as an object, in parts; it becomes visible when it is whole."""
        with self._talk(writing=True, n_bytes=file.seek(0, os.SEEK_END)):
            file.seek(0)
            _obstore().put(
                self.client(),
                self.key,
                file,
                chunk_size=PART_BYTES,
                max_concurrency=PARTS_AT_ONCE,
            )

    def read_version(self) -> Version:
        """Return the current version of an object."""
        with self._talk():
            got = _obstore().get(self.client(), self.key)
            meta = got.meta
            return Version(
                bytes(got.bytes()), str(meta["e_tag"]), meta["last_modified"].timestamp()
            )

    def write_version(self, content: bytes, over: str | None) -> str:
        """Put an object on condition that the current one is a version; None: that there is none.

        Returns:
            The etag of the new version.

        Raises:
            FileExistsError: there is another version.
        """
        with self._talk(writing=True):
            mode: Any = "create" if over is None else {"e_tag": over}
            return str(_obstore().put(self.client(), self.key, content, mode=mode)["e_tag"])

    def unlink(self, *, missing_ok: bool = True) -> None:
        """Delete an object; one that is not there is no error."""
        with self._talk(writing=True):
            _obstore().delete(self.client(), self.key)

    def remove_tree(self) -> None:
        """Delete every object below."""
        keys = [path.key for path in self.sizes()]
        with self._talk(writing=True):
            _obstore().delete(self.client(), keys)

    def client(self) -> "S3Store":
        """Return the client of the bucket, with its connections."""
        return _client(self.bucket)

    @contextmanager
    def _talk(self, *, writing: bool = False, n_bytes: int = 0) -> Iterator[None]:
        """Turn errors of obstore into ours; EOFError is a read past the end.

        A wait is named when it is longer than so many bytes take.
        """
        try:
            with waiting_for(f"the server of {self}", n_bytes / SLOW_BYTES_PER_S):
                yield
        except FileNotFoundError:
            if writing:  # only a bucket can be missing then
                raise UnreachableError(f"{self} cannot be written: no such bucket") from None
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self)) from None
        except _failures() as error:
            kind, text = type(error).__name__, str(error)
            if kind in ("AlreadyExistsError", "PreconditionError"):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self)) from None
            if "<Code>InvalidRange</Code>" in text or "status code: 416" in text:
                raise EOFError(str(self)) from None
            verb = "written" if writing else "read"
            raise UnreachableError(
                f"{self} cannot be {verb} ({_reason(kind, text)}); {_REMEDY}"
            ) from None


def _reason(kind: str, text: str) -> str:
    """Return the part of obstore's long message that is of use to people."""
    if code := re.search(r"<Code>(\w+)</Code>", text):
        return code[1]
    if status := re.search(r"status code: (\d+ [\w ]+)", text):
        return status[1]
    lines = [line.strip() for line in text.partition("Debug source")[0].splitlines()]
    return " ".join(line for line in lines if line).rpartition(" - ")[2] or kind


@functools.cache
def _obstore() -> Any:
    try:
        import obstore
    except ImportError:
        raise StoreError("stores in buckets need obstore: pip install 'lorsa[s3]'") from None
    return obstore


def _failures() -> type[Exception]:
    kind: type[Exception] = _obstore().exceptions.BaseError
    return kind


@functools.cache
def _client(bucket: str) -> "S3Store":
    from obstore.store import S3Store

    return S3Store(bucket)
