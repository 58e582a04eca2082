"""Docstrings, and how long files and functions are: what the tests of style read.

`python tests/prose.py [FOLDER ...]` lists what does not keep to the rules.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
ELSEWHERE = {"tests", "benchmarks", "examples", "docs"}
FRAGMENTS = {
    "Of", "As", "With", "Without", "Where", "That", "How", "In", "On", "By", "From", "For", "To",
    "At", "If", "So", "And", "Or", "But", "Also", "Then", "Else", "Its", "Their", "It",
    "Because", "Than", "Like", "Into", "Until", "While", "Due",
}  # fmt: skip
"""Words that begin a docstring which cannot be read without the name before it."""
MODULE_LINE = 90
FUNCTION_LINES = 60
FILE_LINES = 350
KERNELS = "kernels"


class Docstring(NamedTuple):
    """A docstring, of a module, class, function or of the name before it."""

    path: Path
    line: int
    text: str

    @property
    def opening(self) -> str:
        """Return its first word."""
        words = self.text.split()
        return words[0].strip("\"'`.,:;") if words else ""


def product_files(*folders: str) -> list[Path]:
    """Return the files of the package; of some folders or files of it only, if named."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if parts[0] in ELSEWHERE or parts[0].startswith(".") or parts[0] in ("build", "dist"):
            continue
        name = path.relative_to(ROOT).as_posix()
        if not folders or any(name.startswith(folder) for folder in folders):
            found.append(path)
    return found


def docstrings(path: Path) -> Iterator[Docstring]:
    """Yield every docstring of a file; of names, those that stand alone as an expression."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        body = getattr(node, "body", None)
        for each in body if isinstance(body, list) else []:
            match each:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield Docstring(path, each.lineno, text)


def functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, line and length of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            yield node.name, node.lineno, node.end_lineno - node.lineno + 1


def problems(path: Path) -> Iterator[str]:
    """Yield what of a file does not keep to the rules, a line each."""
    name = path.relative_to(ROOT).as_posix()
    text = path.read_text("utf-8")
    first = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    is_empty = not text.strip()
    if not is_empty and (len(first) > MODULE_LINE or not first.endswith(".")):
        yield f"{name}:1: the first line is no sentence of at most {MODULE_LINE} characters"
    for each in docstrings(path):
        if each.opening in FRAGMENTS:
            yield f"{name}:{each.line}: a docstring begins with {each.opening!r}"
    if name.startswith(KERNELS):
        return
    n_lines = text.count("\n")
    if n_lines > FILE_LINES:
        yield f"{name}: {n_lines} lines, more than {FILE_LINES}"
    for function, line, length in functions(path):
        if length > FUNCTION_LINES:
            yield f"{name}:{line}: {function} has {length} lines, more than {FUNCTION_LINES}"


if __name__ == "__main__":
    for file in product_files(*sys.argv[1:]):
        for problem in problems(file):
            print(problem)
