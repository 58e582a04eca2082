"""The command that follows another, to be pasted: with real paths, quoted for a shell."""

import os
import shlex
import shutil
import sys
from pathlib import Path

PROGRAM = "lorsa"


def following(*words: object) -> str:
    """Return a command line of lorsa; paths are relative where that is shorter."""
    return shlex.join([_program(), *(_spelled(word) for word in words)])


def _spelled(word: object) -> str:
    """Return a word as it is typed: an absolute path from the folder that we are in, if shorter."""
    text = str(word)
    return _shortest(text) if os.path.isabs(text) else text


def _shortest(path: str) -> str:
    return min(path, os.path.relpath(path), key=len)


def _program() -> str:
    """Return what starts this program in the user's shell: its name, or its path off PATH."""
    own = Path(sys.argv[0])
    if shutil.which(PROGRAM) is None and own.name == PROGRAM and own.is_file():
        return _shortest(str(own.absolute()))
    return PROGRAM
