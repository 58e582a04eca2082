"""Choices of layers in the form that users write: 0-27, 3,7,12 or all."""

from collections.abc import Sequence


def choose_layers(text: str, have: Sequence[int], *, where: str) -> list[int]:
    """Read a choice of layers: "0-27", "3,7,12", "0-3,9" or "all"; ends are included.

    Args:
        text: the choice.
        have: layers to choose from.
        where: name of the store or model that has them, for messages.

    Returns:
        The chosen layers, ascending.

    Raises:
        ValueError: the text has another form, or names a layer that is not there.
    """
    if text == "all":
        return sorted(have)
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"layers {text!r} is not of the form 0-27, 3,7,12 or all")
        run = range(int(first), int(last or first) + 1)
        if not run:
            raise ValueError(f"layers {text!r}: write the lower number first, as 0-27")
        outside = next((layer for layer in run if layer not in have), None)
        if outside is not None:
            raise ValueError(
                f"layer {outside} is not in {where}; it has layers {spell_layers(have)}"
            )
        chosen.update(run)
    return sorted(chosen)


def spell_layers(layers: Sequence[int]) -> str:
    """Write layers as `choose_layers` reads them: 0-3,9."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
