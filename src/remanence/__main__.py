"""`python -m remanence` is the command `remanence`."""

from .cli import main

main()
