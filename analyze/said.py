"""What may be said of a head: of what is listed of it, that which chance does not explain."""

from typing import Any

from .choices import BAR, LIST_BAR, TOKEN_BAR


def beyond_chance(row: dict[str, Any], name: str) -> list[bool] | None:
    """Return of what is listed of a head whether it may be said.

    Args:
        row: of heads.parquet; `name` and its columns of z are enough.
        name: one of LISTED.

    Returns:
        In the order of the list. None where it is not known, or comes from a version that did not
        compare it with chance.
    """
    scores, of_list = row[f"{name}_z"], row.get(f"{name}_list_z")
    if row[name] is None or scores is None:
        return None
    if of_list is None:
        return [z >= BAR for z in scores]
    return [of_list >= LIST_BAR and z >= TOKEN_BAR for z in scores]


def said(row: dict[str, Any], name: str) -> list[dict[str, Any]] | None:
    """Return what is listed of a head beyond chance, each with its `z`; see `beyond_chance`."""
    beyond = beyond_chance(row, name)
    if beyond is None:
        return None
    rows = zip(row[name], row[f"{name}_z"], beyond, strict=True)
    return [{**each, "z": z} for each, z, is_beyond in rows if is_beyond]
