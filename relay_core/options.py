"""What is said of an option that nobody knows."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches


def refuse_unknown(owner: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raises TypeError, as Python does for a wrong argument, in the words of who gave it.

    :param owner: what they called, e.g. `Broker`
    """
    for name in given:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}"
            raise TypeError(f"{owner} has no option {name!r}; {advice}")
