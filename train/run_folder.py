"""Run folder: the settings of a run, its metrics and its result.

run.json                        settings, versions, corpus; the result of a finished run
metrics.jsonl                   a line per report
config.json, lorsa.safetensors  the Lorsa of a finished run
seal.json                       sizes and checksums of these files of a finished run
curves.png                      a picture of the metrics
checkpoints/                    checkpoints of a run that is not finished

run.json and each line of metrics.jsonl have a checksum of their own, as they are written before the
run is finished.
"""

import json
import os
import shutil
from dataclasses import fields
from itertools import compress
from pathlib import Path
from typing import Any

import torch

from ..dictionaries.choices import CONFIG, WEIGHTS
from ..errors import TrainError, unreadable
from ..seal import SEAL, first_damage, read_summed, summed, unsummed, write_seal, write_summed
from ..version import __version__
from ..whole import lock_folder, partial_of, write_json, write_whole
from .checkpoint import CHECKPOINTS, checkpoints
from .config import TrainConfig
from .origin import RUN

METRICS = "metrics.jsonl"
RUN_VERSION = 1


class RunFolder:
    """The files of one run."""

    def __init__(self, root: Path) -> None:
        """Choose a folder."""
        self.root = root
        self._lock: int | None = None

    def begin(
        self, config: TrainConfig, facts: dict[str, Any], corpus: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Begin a run here, or resume one with the same settings; `release` frees the lock.

        Args:
            config: settings of the run.
            facts: facts that the run depends on besides: the store's uuid, sizes.
            corpus: facts of the store's text, kept with the run when the store is gone.

        Returns:
            The result, if the run is already finished.

        Raises:
            TrainError: the folder holds another run or other things, it is damaged, or a process
                writes it.
        """
        self.require_same(config, facts)
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.root)
        if self._lock is None:
            raise TrainError(
                f"{self.root} is being written by another process; "
                "wait for it or choose another folder by --out"
            )
        if not self._is_begun():
            for name in (SEAL, METRICS):
                (self.root / name).unlink(missing_ok=True)
            begun = {**self._header(config, facts), "corpus": corpus, "result": None}
            write_summed(self.root / RUN, begun)
        result: dict[str, Any] | None = self._read().get("result")
        if result is not None:
            if (problem := first_damage(self.root)) is not None:
                raise TrainError(
                    f"{problem}; restore it from a copy, or train again into another --out"
                )
            shutil.rmtree(self.root / CHECKPOINTS, ignore_errors=True)  # the end was a kill
        return result

    def release(self) -> None:
        """Let others write."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def require_same(self, config: TrainConfig, facts: dict[str, Any]) -> None:
        """Raise TrainError unless this run may begin or go on here; nothing is written."""
        if not self._is_begun():
            self._require_free()
            return
        asked = config.decisive() | facts
        defaults = {field.name: field.default for field in fields(config)}
        known = defaults | self._read().get("decisive", {})  # older versions knew fewer settings
        different = [
            f"{name} was {known[name]!r}, is {value!r}"
            for name, value in asked.items()
            if name in known and known[name] != value
        ]
        if different:
            raise TrainError(
                f"{self.root} holds another run ({'; '.join(different)}): "
                "give the same settings, choose another --out, or delete it"
            )

    def _is_begun(self) -> bool:
        """Return whether a run here is finished, or has a checkpoint to resume from."""
        if not (self.root / RUN).exists():
            return False
        return self._read().get("result") is not None or bool(checkpoints(self.root))

    def _require_free(self) -> None:
        """Raise TrainError if the folder holds other things, or is a file."""
        if self.root.exists() and not self.root.is_dir():
            raise TrainError(f"{self.root} is a file; choose a folder by --out")
        names = {path.name for path in self.root.iterdir()} if self.root.is_dir() else set()
        if names - {partial_of(Path(RUN)).name} and RUN not in names:
            raise TrainError(f"{self.root} holds other things; choose another folder by --out")

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl.

        Raises:
            TrainError: the disk does not take it.
        """
        path = self.root / METRICS
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(summed(line)) + "\n")
        except OSError as error:
            raise TrainError(
                f"{path} cannot be written ({error.strerror or error}); put it right and run the "
                "same command again"
            ) from None

    def drop_after(self, step: int) -> list[int]:
        """Drop the metrics of steps after `step`, which are about to be done again.

        Returns:
            Numbers of the lines, from 1, that are damaged; they are dropped too. A last line that
            was torn by a crash is not among them.
        """
        path = self.root / METRICS
        if not path.exists():
            return []
        damaged = damaged_lines(path)
        lines = path.read_text("utf-8", "replace").split("\n")
        steps = [_step_of(line) for line in lines]
        done = [at is not None and at <= step for at in steps]
        write_whole(path, "".join(f"{line}\n" for line in compress(lines, done)))
        return damaged

    def finish(self, result: dict[str, Any]) -> None:
        """Seal the files, write the result into run.json, and remove the checkpoints."""
        content = summed({**self._read(), "result": result})
        write_seal(self.root, (CONFIG, WEIGHTS, METRICS), {RUN: content})
        write_json(self.root / RUN, content)
        shutil.rmtree(self.root / CHECKPOINTS, ignore_errors=True)

    def _header(self, config: TrainConfig, facts: dict[str, Any]) -> dict[str, Any]:
        return {
            "format": "lorsa-run",
            "schema_version": RUN_VERSION,
            "config": config.to_dict(),
            "decisive": config.decisive() | facts,
            "versions": {"lorsa": __version__, "torch": torch.__version__},
        }

    def _read(self) -> dict[str, Any]:
        path = self.root / RUN
        try:
            content = read_summed(path)
        except OSError as error:
            raise TrainError(unreadable(path, error)) from None
        except ValueError as error:
            raise TrainError(
                f"{path} is damaged ({error}); restore it from a copy, or choose another folder by "
                "--out"
            ) from None
        if not isinstance(content, dict) or content.get("schema_version") != RUN_VERSION:
            raise TrainError(f"{path} is of another version; choose another folder by --out")
        if not isinstance(content.get("decisive", {}), dict):
            raise TrainError(
                f"{path} is damaged (no settings); restore it from a copy, or choose another "
                "folder by --out"
            )
        return content


def damaged_lines(path: Path) -> list[int]:
    """Return the numbers of the lines of metrics.jsonl, from 1, that are not what was written.

    A last line that was torn by a crash is not among them.

    Raises:
        OSError: the file is there and cannot be read.
    """
    try:
        lines = path.read_text("utf-8", "replace").split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [number for number, line in enumerate(lines, 1) if _step_of(line) is None]


def _step_of(line: str) -> float | None:
    """Return the step of a metrics line; None if it is not what was written."""
    try:
        return float(unsummed(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
