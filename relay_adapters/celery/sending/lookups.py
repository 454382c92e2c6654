"""Finds a setting of a Celery app without an exception for each place in which it is not.

Celery looks a setting up by its new and its old name in the app's own settings, in those that were added and in the
defaults, and each miss is a KeyError raised and caught; a publish looks up seven, mostly defaults. Here the same places
are asked whether they have it. Where one alone does, that is it, in whatever order they come; all else is Celery's.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from types import SimpleNamespace
from typing import Any


def install() -> None:
    """For all apps of this process, where Celery is in use. Repeating it is harmless."""
    utils: Any = sys.modules.get("celery.app.utils")
    if utils is not None and not hasattr(utils.Settings.__getitem__, "relay_stock"):
        utils.Settings.__getitem__ = _asking(utils.Settings)


def _asking(settings: Any) -> Any:
    stock, to_keys = settings.__getitem__, settings._to_keys
    # what says of itself, as a plain dict does, whether it has a name: the second is the module that an app reads
    known = {dict, sys.modules["celery.utils.collections"].DictAttribute}

    @lru_cache(maxsize=1024)
    def names_of(key: str, prefix: str | None, others: Any) -> tuple[str, ...]:
        names = to_keys(SimpleNamespace(prefix=prefix, _keys=others), key)
        return tuple(dict.fromkeys([*names, *[other(key) for other in others or ()]]))

    def __getitem__(self: Any, key: str) -> Any:
        place = None
        if self.key_t is None:
            names = names_of(key, self.prefix, self._keys)
            for mapping in self.maps:
                if type(mapping) not in known:
                    return stock(self, key)
                for name in names:
                    if name in mapping:
                        if place is not None:
                            return stock(self, key)
                        place = mapping, name
        return stock(self, key) if place is None else place[0][place[1]]

    __getitem__.relay_stock = stock  # type: ignore[attr-defined]
    return __getitem__
