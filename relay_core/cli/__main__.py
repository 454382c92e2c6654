"""`python -m relay_core.cli`: the same as the command `relay`."""

from relay_core.cli import main

main()
