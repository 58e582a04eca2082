"""Choices of layers, as people write them."""

import pytest
from lorsa.store.layers import choose_layers, spell_layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("0-4", [0, 1, 2, 3, 4]),
        ("3", [3]),
        ("4,1", [1, 4]),
        ("0-1, 3", [0, 1, 3]),
        ("2-2,2", [2]),
    ],
)
def test_choose_layers_reads(text: str, layers: list[int]) -> None:
    assert choose_layers(text, range(5), where="m") == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "layer 5 is not in m; it has layers 0-4"),
        ("0-99", "layer 5 is not in m"),
        ("x", "not of the form 0-27"),
        ("", "not of the form"),
        ("1-", "not of the form"),
        ("-1", "not of the form"),
        ("3-1", "write the lower number first"),
        ("0-99999999999", "layer 5 is not in m"),
    ],
)
def test_choose_layers_names_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_layers(text, range(5), where="m")


def test_spell_layers_is_read_back() -> None:
    assert spell_layers([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert spell_layers([4]) == "4"
