"""python -m lorsa, and accelerate launch -m lorsa."""

from .cli import main

main()
