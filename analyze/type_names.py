"""Names of types of heads: previous-token for people, previous_token for columns."""

from difflib import get_close_matches

from .choices import KINDS


def spelled(name: str) -> str:
    """Return a type, or a column of its scores, as people read it."""
    return name.replace("_", "-")


def type_named(text: str) -> str:
    """Return the column of a type that can be searched for, written either way.

    Raises:
        ValueError: there is no such type; the nearest is named, or all are.
    """
    name = text.strip().lower().replace("-", "_").replace(" ", "_")
    if name in KINDS:
        return name
    begun = [kind for kind in KINDS if name and kind.startswith(name)]
    near = begun or get_close_matches(name, KINDS, n=1, cutoff=0.5)
    hint = f"did you mean {spelled(near[0])}? " if near else ""
    raise ValueError(f"type is {text!r}; {hint}allowed: {', '.join(map(spelled, KINDS))}")
