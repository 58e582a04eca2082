"""Devices to compute on."""

import torch


def choose_device(name: str) -> str:
    """Return "cpu" or "cuda" for one of `choices.DEVICES`; "auto" is a GPU if there is one.

    Raises:
        ValueError: "cuda" where torch sees no GPU.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError("device is cuda, but torch sees no GPU; use --device cpu")
    return "cuda" if there and name != "cpu" else "cpu"
