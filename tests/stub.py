"""The type stub of the package, made from its table of public names.

`python tests/stub.py` writes it; a test compares.
"""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
STUB = ROOT / "__init__.pyi"
HEAD = (
    '"""Public names, for type checkers; made by tests/stub.py from the table in __init__.py."""\n'
)


def public_names() -> dict[str, str]:
    """Return the table of `__init__.py` without importing it: public name to module.name."""
    for node in ast.parse((ROOT / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PUBLIC":
            table: dict[str, str] = ast.literal_eval(node.value)
            return table
    raise ValueError("__init__.py has no table PUBLIC")


def stub() -> str:
    """Return what the stub should hold."""
    names = public_names()
    by_module: dict[str, list[str]] = defaultdict(list)
    for public, where in names.items():
        module, _, name = where.rpartition(".")
        by_module[module].append(name if name == public else f"{name} as {public}")
    lines = [HEAD]
    for module, found in sorted(by_module.items()):
        lines += [f"from .{module} import {name}" for name in found]
    lines += ["from .version import __version__", "", "PUBLIC: dict[str, str]", "", "__all__ = ["]
    lines += [f'    "{name}",' for name in ["__version__", *names]]
    return "\n".join([*lines, "]"]) + "\n"


if __name__ == "__main__":
    STUB.write_text(stub(), "utf-8")
