"""Write the list of files in docs/architecture.md from the first lines of the modules.

`python docs/files.py` writes it; a test compares.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- files: python docs/files.py -->", "<!-- end of files -->"
ELSEWHERE = {"tests", "benchmarks", "examples", "docs", "build", "dist"}


def modules() -> list[Path]:
    """Return the modules of the package, those of a folder before those of its subfolders."""
    found = [
        path.relative_to(ROOT)
        for path in ROOT.rglob("*.py")
        if not {part for part in path.relative_to(ROOT).parts if part.startswith(".")}
        and path.relative_to(ROOT).parts[0] not in ELSEWHERE
    ]
    return sorted(found, key=lambda path: (path.parent.parts, path.name))


def listed() -> Iterator[str]:
    """Yield the lines of the list: a heading for each folder, a row for each of its files."""
    folder: Path | None = None
    for path in modules():
        lines = (ast.get_docstring(ast.parse((ROOT / path).read_text("utf-8"))) or "").splitlines()
        first = lines[0] if lines else ""
        if path.parent != folder:
            folder = path.parent
            about = first if path.name == "__init__.py" and folder.parts else ""
            yield ""
            yield f"### {folder.as_posix() + '/' if folder.parts else 'At the top'}"
            yield ""
            if about:
                yield about
                yield ""
            yield "| file | holds |"
            yield "|---|---|"
        if path.name != "__init__.py" or not path.parent.parts:
            yield f"| [`{path.name}`](../{path.as_posix()}) | {first} |"


def page() -> str:
    """Return the page with the list as it should be."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, *listed(), "", END + after])


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
