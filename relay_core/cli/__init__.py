"""The `relay` command. `main` is what the console script and `python -m relay_core.cli` call.

Each command imports what it needs when it runs, so that `relay version` and `relay --help` stay quick.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line and exit."""
    from relay_core.cli.app import relay

    relay(prog_name="relay")


__all__ = ["main"]
