"""Choices of layers, as users write them."""

from collections.abc import Sequence


def choose_layers(text: str, have: Sequence[int], *, where: str) -> list[int]:
    """Read a choice of layers: "0-27", "3,7,12", "0-3,9" or "all"; ends are included.

    Args:
        text: the choice.
        have: layers to choose from.
        where: what has them, for messages.

    Returns:
        The chosen layers, ascending.

    Raises:
        ValueError: not of that form, or a layer that is not there.
    """
    if text == "all":
        return sorted(have)
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"layers {text!r} is not of the form 0-27, 3,7,12 or all")
        chosen.update(range(int(first), int(last if dash else first) + 1))
    outside = sorted(chosen - set(have))
    if outside:
        raise ValueError(
            f"layer {outside[0]} is not in {where}; it has layers {spell_layers(have)}"
        )
    if not chosen:
        raise ValueError(f"layers {text!r} chooses none; write the lower number first, as 0-27")
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
