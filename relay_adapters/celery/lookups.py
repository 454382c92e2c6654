"""Finds a setting of a Celery app without an exception for each place in which it is not.

Celery looks a setting up by its new and its old name in the app's own settings, in those that were added and in the
defaults, and each miss is a KeyError raised and caught. A publish looks up seven, mostly defaults. Here the same names
are looked up in the same places in the same order, and a plain dict is asked.
"""

from __future__ import annotations

import sys
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

_NOWHERE = object()


def install() -> None:
    """For all apps of this process, where Celery is in use. Repeating it is harmless."""
    utils: Any = sys.modules.get("celery.app.utils")
    if utils is not None and not hasattr(utils.Settings.__getitem__, "relay_stock"):
        utils.Settings.__getitem__ = _asking(utils.Settings.__getitem__, utils.Settings._to_keys)


def _asking(stock: Any, to_keys: Any) -> Any:
    @lru_cache(maxsize=1024)
    def names_of(key: str, prefix: str | None, others: Any) -> tuple[str, ...]:
        names: tuple[str, ...] = to_keys(SimpleNamespace(prefix=prefix, _keys=others), key)
        return names

    def __getitem__(self: Any, key: str) -> Any:
        if self.key_t is None:
            names = names_of(key, self.prefix, self._keys)
            for settings in self.maps:
                find = settings.get if type(settings) is dict else partial(_find, settings)
                for name in names:
                    value = find(name, _NOWHERE)
                    if value is not _NOWHERE:
                        return value
        return stock(self, key)

    __getitem__.relay_stock = stock  # type: ignore[attr-defined]
    return __getitem__


def _find(settings: Any, name: str, default: Any) -> Any:
    """In one that is no plain dict, such as the module or the Django settings that an app reads."""
    try:
        return settings[name]
    except KeyError:
        return default
